"""Runs that older versions have saved load, predict, evaluate and go on to the same numbers.

`old_runs.tar.xz` holds two folders of runs of 220 steps as they were at step 200, from before
knobs could be missing, and what that version made of them: `expected.json`. `toy` is a single run;
`text` has BPE and a tokenizer for each side, two replicas, batch norm, an average of the
parameters and one size for both vocabularies.
"""

import json
import tarfile

import jax
import numpy as np
import pytest

from tests.helpers import refused
from tests.test_programs import ROOT
from transformer import config as configs
from transformer import load, renamed
from transformer.config import RunConfig, default_config, differences, flat_knobs, saved_config
from transformer.parallel.mesh import one_device_mesh
from transformer.run import Run
from transformer.workdir import Workdir

TEXTS = ["abc", "hedc", "fi"]


@pytest.fixture(params=["toy", pytest.param("text", marks=pytest.mark.slow)])
def old(request, tmp_path, monkeypatch):
    """A run's folder, and what is expected of it."""
    monkeypatch.chdir(ROOT)  # its config names a file from there
    with tarfile.open(ROOT / "tests" / "old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / request.param
    return Workdir(str(folder)), json.loads((folder / "expected.json").read_text())


def test_an_old_run_predicts_evaluates_and_goes_on_to_its_numbers(old, data_dir, caplog):
    workdir, expected = old
    model = load(str(workdir.path), mesh=one_device_mesh())
    assert not caplog.records  # no library has anything to warn of
    for name, beams in (("greedy", 1), ("beam", 3)):
        found = model.generate(TEXTS, beam_size=beams)
        lines = [line.split("\t")[1:] for line in expected[name].splitlines()]
        assert [own[0].text for own in found] == [text for _, text in lines]
        scores = [float(score) for score, _ in lines]
        np.testing.assert_allclose([own[0].score for own in found], scores, atol=1e-3)

    run = Run.saved(workdir.path, mesh=one_device_mesh(), data_dir=data_dir)
    assert run.restore().taken() == 200
    with jax.set_mesh(run.mesh):
        evaluated = run.evaluate_replicas("test")
    for metrics, wanted in zip(evaluated, expected["evaluated"], strict=True):
        wanted = {f"test/{name.split('/')[1]}": value for name, value in wanted.items()}
        assert metrics | wanted == pytest.approx(metrics, rel=1e-4)
        assert metrics.keys() >= wanted.keys()

    config = workdir.read_config()
    config.mesh.data = config.mesh.replica = 1
    usual = flat_knobs(default_config())  # as a config file has it, which knows nothing of then
    config.update_from_flattened_dict({knob: usual[knob] for knob in renamed.BEFORE})
    with jax.numpy_dtype_promotion("standard"):
        run = Run(RunConfig.from_config_dict(config), workdir.path, data_dir=data_dir)
        run.train()
    assert run.restore("latest") is not run.state  # which a checkpoint read later does not replace
    assert run.state.taken() == 220
    results = json.loads(workdir.results.read_text())["replicas"]
    for found, wanted in zip(results, expected["resumed"], strict=True):
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)


def test_a_knob_that_a_run_was_saved_without_has_its_default_and_an_unknown_one_is_named():
    saved = default_config().to_dict()
    del saved["model"]["norm"], saved["best_metric"], saved["optimizer"]
    saved["steps_per_call"], saved["model"]["fused_qkv"] = 7, True  # which are no more
    assert not differences(saved_config(saved), default_config())
    saved["model"]["nrom"] = "rms"
    refused(r"knob model\.nrom .*mean model\.norm\?", saved_config, saved)
    saved["model"] = {"num_heads": None}
    with pytest.raises(ValueError, match=r"model\.num_heads is null"):
        saved_config(saved)


@pytest.mark.parametrize(("saved", "ties"), [(True, "all"), (False, "none"), ("inputs", "inputs")])
def test_embeddings_that_were_tied_or_not_still_are(saved, ties):
    config = default_config().to_dict()
    config["model"]["tie_embeddings"] = saved
    assert saved_config(config).model.tie_embeddings == ties


def test_a_plugin_of_a_saved_run_is_imported_only_if_the_command_names_it(old):
    workdir, _ = old
    record = json.loads(workdir.config.read_text())
    record["config"]["plugins"] = ["wave"]
    workdir.config.write_text(json.dumps(record))
    configs.loaded_plugins.discard("wave")
    refused("trained with wave, .* --plugins=wave", load, str(workdir.path))
    refused("plugins: none_such cannot be imported", configs.load_plugins, ["none_such"])
    load(str(workdir.path), plugins=["wave"], mesh=one_device_mesh())


def test_a_choice_that_only_a_config_file_knows_is_refused(monkeypatch):
    from transformer.modules.normalization import NORMS

    monkeypatch.setitem(NORMS, "mine", NORMS["rms"])
    config = default_config()
    config.model.norm = "mine"
    message = r"model\.norm=mine is defined .*config\.plugins"
    refused(message, RunConfig.from_config_dict, config)
    config.plugins = ("wave",)
    assert RunConfig.from_config_dict(config).model.norm == "mine"
