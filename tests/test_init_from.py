"""A run that starts from the parameters of another."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import TOKENIZER, refused, train
from tests.test_average import drawn, make_run
from tests.test_config import TWO, of, resolved
from tests.test_training import equal
from transformer.data.tokenizer import SymbolTokenizer
from transformer.data.toy import ALPHABET
from transformer.init_from import initial_state
from transformer.run import Run
from transformer.training import loop
from transformer.training.interruption import Interrupted

NORM = {"model.norm": "batch"}
REVERSED = SymbolTokenizer(ALPHABET[::-1])  # other tokens, as many


def small(*given):
    """A random state with variances above 0."""
    return jax.tree.map(lambda x: x if x.dtype.kind in "iu" else abs(x) / 10, drawn(*given))


def source(path, rng, **changes):
    """The folder of a run with tokenizers of its own and random variables, and its state."""
    options = {"steps": (10,), "drawn": small, "tokenizer": REVERSED}
    workdir, states, _ = make_run(path, rng, **options, **changes)
    return workdir.path, states[0]


def give_tokenizers(folder, kind, target_kind=None, **sides):
    """Replaces the tokenizers of a run; files are read as the kinds that its config names."""
    record = json.loads((folder / "config.json").read_text())
    record["config"]["data"] |= {"tokenizer": kind, "target_tokenizer": target_kind}
    for side, tokenizer in sides.items():
        (folder / "tokenizers" / side).write_bytes(tokenizer.to_bytes())
        named = ("source", "target") if side == "shared" else (side,)
        record["corpus"] |= {f"{name}_tokenizer": tokenizer.digest() for name in named}
    (folder / "config.json").write_text(json.dumps(record))


def opened(folder, data_dir, workdir=None, **changes):
    return Run(resolved({"init_from": str(folder)} | changes), workdir, data_dir=data_dir)


def start(run):
    with jax.set_mesh(run.mesh):
        run.check()
        return initial_state(run)


@pytest.mark.parametrize("replicas", [(1, 1), (1, 2), (2, 2)])
def test_a_run_starts_where_another_is_and_with_an_optimizer_of_its_own(
    replicas, tmp_path, rng, data_dir, capsys
):
    before, after = (TWO | {"replicas": count} if count > 1 else {} for count in replicas)
    folder, saved = source(tmp_path / "a", rng, ema_decay=0.9, **NORM, **before)
    run = opened(folder, data_dir, ema_decay=0.5, **NORM, **after, **{"mesh.data": 2})
    state, fresh = start(run), run.init(run.config.seeds(), run.config.hparams())
    wanted, count = saved.variables(), len(run.model.shapes)
    if replicas == (1, 2):
        wanted = {name: np.stack([leaf] * 2) for name, leaf in wanted.items()}
    assert equal(state.variables(), wanted)
    assert equal(state.params, state.ema_params)
    assert not equal(saved.params, saved.ema_params)
    assert equal(state[:5], fresh[:5])  # step, skipped, failed, seed, hparams
    assert equal(state.opt_state, fresh.opt_state)
    where = [jax.tree.map(lambda leaf: leaf.sharding, x) for x in (state, run.abstract_state)]
    assert where[0] == where[1]
    said = f"init {count} of {count} parameters from {folder}, step 10"
    assert " ".join(capsys.readouterr().out.split()).endswith(said)
    if replicas == (1, 1):
        theirs = Run.saved(folder, mesh=run.mesh)
        with jax.set_mesh(run.mesh):
            scores = theirs.totals(theirs.restore().variables(), run.data["test"])
            assert equal(run.totals(state.variables(), run.data["test"]), scores)


DEEPER = {"model.num_layers": 2}
SECOND = ("encoder/layers/1/*", "decoder/layers/1/*")
ONLY = r"decoder/layers/1/\S* is only"


@pytest.mark.parametrize(
    ("before", "after", "message", "patterns"),
    [
        ({}, DEEPER, rf"{ONLY} here, .*and \d+ more .*'decoder/lay.*/1/\*',", SECOND),
        (DEEPER, {}, f"{ONLY} there", SECOND),
        ({}, {"model.d_ff": 64}, r"is \[16, 32\] there and \[16, 64\] here", ("*feed_forward/*",)),
        ({}, {"data.tokenizer": "bytes"}, r" embedding/embedding is \[32, 16\] there", ("emb*",)),
        (None, {}, " embedding/embedding is of another vocabulary", ("embedding/*",)),
    ],
)
def test_what_does_not_fit_is_refused_or_initialised_anew(
    before, after, message, patterns, tmp_path, rng, data_dir, capsys
):
    folder, saved = source(tmp_path / "a", rng, **before or {})
    if before is None:
        give_tokenizers(folder, "words", shared=REVERSED)
    assert len(refused(message, start, opened(folder, data_dir, **after))) < 600
    run = opened(folder, data_dir, init_new=patterns, **after)
    state, fresh = start(run), run.init(run.config.seeds(), run.config.hparams())
    said = " ".join(capsys.readouterr().out.split())
    assert ("left behind: decoder/layers/1" in said) == (before == DEEPER) == ("new: " not in said)
    assert ("differs model.num_layers: " in said) == (DEEPER in (before, after))
    parts = [pattern.strip("/*") for pattern in patterns]
    for name, value in state.params.items():
        wanted = fresh if any(part in name for part in parts) else saved
        assert np.array_equal(value, wanted.params[name]), name


def test_the_embeddings_of_a_side_are_compared_with_its_tokens(tmp_path, rng, data_dir):
    untied = {"model.tie_embeddings": "none"}
    folder, _ = source(tmp_path / "a", rng, **untied)
    give_tokenizers(folder, "characters", "words", source=TOKENIZER, target=REVERSED)
    own = opened(folder, data_dir, **untied, **{"data.target_tokenizer": "characters"})
    differs = "is of another vocabulary"
    pair = f"fit: output_embedding/embedding {differs}, target_embedding/embedding {differs} "
    refused(pair, start, own)


def test_a_bias_of_the_logits_is_of_the_targets_tokens(tmp_path, rng, data_dir):
    knobs = {"model.tie_embeddings": "target_output", "model.logits_bias": True}
    folder, _ = source(tmp_path / "a", rng, **knobs)
    give_tokenizers(folder, "characters", "words", source=TOKENIZER, target=REVERSED)
    own = opened(folder, data_dir, **knobs, **{"data.target_tokenizer": "characters"})
    refused("fit: logits_bias is of another .*, target_embedding/embedding is of", start, own)


def test_a_mistake_is_a_line(tmp_path, rng, data_dir):
    folder, _ = source(tmp_path / "a", rng)
    two, _ = source(tmp_path / "two", rng, **TWO)
    empty = Path(shutil.copytree(folder, tmp_path / "empty"))
    shutil.rmtree(empty / "checkpoints")
    for place, changes, message in (
        (tmp_path / "none", {}, "init_from: .*none holds no run"),
        (empty, {}, "init_from: .*empty has no checkpoint yet"),
        (two, {}, "init_from: .* has 2 replicas and this run 1; name"),
        (folder, {"init_new": ("decoder",)}, "init_new: 'decoder' matches no .* nearest are deco"),
        (folder, {"init_new": ("*",)}, "init_new leaves nothing of"),
        (folder, {"freeze": ("*",)}, "freeze matches all parameters"),
        (folder, {"freeze": ("encodr/*",)}, "freeze: 'encodr/.' matches no parameter; .* encoder/"),
    ):
        refused(message, lambda: start(opened(place, data_dir, **changes)))  # noqa: B023
    refused(r"another config \(.*init_from: ", opened(folder, data_dir, folder).train)
    next((folder / "checkpoints" / "10" / "default").glob("manifest.json")).unlink()
    refused("10 is damaged", start, opened(folder, data_dir))


def test_an_interrupted_run_resumes_without_the_folder_and_keeps_what_is_frozen(
    tmp_path, rng, data_dir, monkeypatch, capsys
):
    """Bit-identical to one that is left alone, with clipping, weight decay and an average."""
    folder, saved = source(tmp_path / "a", rng, **NORM)
    changes = {"ema_decay": 0.9, "freeze": ("encoder/*", "embedding/*"), **NORM}
    changes |= of("optimizer.", name="adamw", weight_decay=0.1, clip_norm=0.1)

    def trained(name):
        run = opened(folder, data_dir, tmp_path / name, **changes)
        train(run)
        return run.restore()

    whole = trained("whole")
    sizes = {name: leaf.size for name, leaf in saved.params.items()}
    count = sum(size for name, size in sizes.items() if name.startswith("decoder"))
    assert f"{sum(sizes.values()):,}, of which {count:,} trained" in capsys.readouterr().out
    stop = lambda self: self.save_and_interrupt() if self.step == 4 else None  # noqa: E731
    monkeypatch.setattr(loop.TrainingLoop, "interrupt_if_requested", stop)
    with pytest.raises(Interrupted):
        trained("cut")
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert equal(trained("cut"), whole)
    for state in (whole.params, whole.variables()):
        same = {name for name in state if np.array_equal(state[name], saved.variables()[name])}
        assert same == {name for name in state if not name.startswith("decoder")}
