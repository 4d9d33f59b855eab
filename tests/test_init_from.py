"""A run that starts from the parameters of another, and the names of parameters in its config."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import TOKENIZER, refused
from tests.test_average import drawn, make_run
from tests.test_config import TWO, of, resolved
from tests.test_training import equal
from transformer.config import RunConfig
from transformer.data.tokenizer import SymbolTokenizer
from transformer.data.toy import ALPHABET
from transformer.init_from import initial_state
from transformer.run import Run
from transformer.training import loop
from transformer.training.interruption import Interrupted

NORM = {"model.norm": "batch"}


def source(path, rng, **changes):
    """The folder of a run of which every variable is random, and its state."""

    def small(*given):  # and positive, as variances are
        return jax.tree.map(lambda x: x if x.dtype.kind in "iu" else abs(x) / 10, drawn(*given))

    workdir, states, _ = make_run(path, rng, steps=(10,), drawn=small, **changes)
    return str(workdir.path), states[0]


def opened(folder, data_dir, workdir=None, **changes):
    config = resolved({"init_from": str(folder)} | changes)
    return Run(config, workdir, data_dir=data_dir)


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
    kept = {"params": {}, "ema_params": {}, "batch_stats": {}}
    assert equal(state._replace(**kept), fresh._replace(**kept))
    like = run.abstract_state
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, state, like))
    said = f"init {count} of {count} parameters from {folder}, step 10"
    assert " ".join(capsys.readouterr().out.split()).endswith(said)

    if replicas != (1, 1):
        return
    theirs = Run.saved(folder, mesh=run.mesh, data_dir=data_dir)
    data = run.data["validation"]
    with jax.set_mesh(run.mesh):
        one = theirs.totals(theirs.restore().variables(), data)
        other = run.totals(state.variables(), data)
    assert equal(one, other)


# Of the same size. Files are read as the kind that the config names.
REVERSED = SymbolTokenizer(ALPHABET[::-1])
OTHER = {"data.tokenizer": "words"}


def give_tokenizers(folder, kind, target_kind=None, **sides):
    """Replaces the tokenizers of a run."""
    file = Path(folder) / "config.json"
    record = json.loads(file.read_text())
    record["config"]["data"] |= {"tokenizer": kind, "target_tokenizer": target_kind}
    for side, tokenizer in sides.items():
        (file.parent / "tokenizers" / side).write_bytes(tokenizer.to_bytes())
        named = ("source", "target") if side == "shared" else (side,)
        record["corpus"] |= {f"{name}_tokenizer": tokenizer.digest() for name in named}
    file.write_text(json.dumps(record))


LAYER = "decoder/layers/1/*"


@pytest.mark.parametrize(
    ("before", "after", "message", "patterns"),
    [
        ({}, {"model.num_layers": 2}, r"decoder/layers/1/\S* is only here, .*and \d+ more", None),
        ({"model.num_layers": 2}, {}, r"decoder/layers/1/\S* is only there", None),
        ({}, {"model.d_ff": 64}, r"is \[16, 32\] there and \[16, 64\] here", ("*feed_forward/*",)),
        ({}, {"data.tokenizer": "bytes"}, r" embedding/embedding is \[32, 16\] there", ("emb*",)),
        (OTHER, {}, "embedding is of another vocabulary", ("emb*",)),
        *[(TWO, change, "has 2 replicas and this run [13]; name", ()) for change in ({}, None)],
    ],
)
def test_what_does_not_fit_is_refused_or_initialised_anew(
    before, after, message, patterns, tmp_path, rng, data_dir, capsys
):
    folder, saved = source(tmp_path / "a", rng, **before if before is not OTHER else {})
    if before is OTHER:
        give_tokenizers(folder, "words", shared=REVERSED)
    after = {"replicas": 3} if after is None else after
    said = refused(f"^init_from.*{message}", start, opened(folder, data_dir, **after))
    if patterns == ():
        return
    assert len(said) < 600
    patterns = patterns or ("encoder/layers/1/*", LAYER)
    run = opened(folder, data_dir, init_new=patterns, **after)
    state, fresh = start(run), run.init(run.config.seeds(), run.config.hparams())
    said = " ".join(capsys.readouterr().out.split())
    assert ("left behind: decoder/layers/1" in said) == ("model.num_layers" in before)
    assert ("new: " in said) == ("model.num_layers" not in before)
    for name, value in state.params.items():
        is_new = any(part in name for part in ("layers/1", *(p.strip("/*") for p in patterns)))
        assert np.array_equal(value, (fresh if is_new else saved).params[name]), name


def test_an_embedding_of_a_side_is_compared_with_the_tokens_of_that_side(tmp_path, rng, data_dir):
    untied = {"model.tie_embeddings": False}
    folder, _ = source(tmp_path / "a", rng, **untied)
    give_tokenizers(folder, "characters", "words", source=TOKENIZER, target=REVERSED)
    own = opened(folder, data_dir, **untied, **{"data.target_tokenizer": "characters"})
    said = refused("of another vocabulary", start, own)
    tables = "output_embedding/embedding", "target_embedding/embedding"
    assert ", ".join(f"{name} is of another vocabulary" for name in tables) in said
    assert said.count("another vocabulary") == 2


def test_a_mistake_is_a_line(tmp_path, rng, data_dir):
    folder, _ = source(tmp_path / "a", rng)
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty)
    shutil.rmtree(empty / "checkpoints")
    for place, changes, message in (
        (tmp_path / "none", {}, "init_from: .*none holds no run"),
        (empty, {}, "init_from: .*empty has no checkpoint yet"),
        (folder, {"init_new": ("decoder",)}, "init_new: 'decoder' matches no .* nearest are deco"),
        (folder, {"init_new": ("*",)}, "init_new leaves nothing of"),
        (folder, {"freeze": ("*",)}, "freeze matches all parameters"),
        (folder, {"freeze": ("encodr/*",)}, "freeze: 'encodr/.' matches no parameter; .* encoder/"),
    ):
        refused(message, lambda: start(opened(place, data_dir, **changes)))  # noqa: B023
    refused("freeze=x: patterns of names", RunConfig, freeze="x")
    own = opened(tmp_path / "x" / ".." / "a", data_dir, folder)
    refused("is the folder of this run itself; leave it out", own.train)
    next((Path(folder) / "checkpoints" / "10" / "default").glob("manifest.json")).unlink()
    refused("10 is damaged", start, opened(folder, data_dir))


def test_an_interrupted_run_resumes_without_the_folder_and_keeps_what_is_frozen(
    tmp_path, rng, data_dir, monkeypatch, capsys
):
    """Bit-identical to one that is left alone, with clipping, weight decay and an average."""
    folder, saved = source(tmp_path / "a", rng, **NORM)
    changes = {"ema_decay": 0.9, "freeze": ("encoder/*", "embedding/*"), **NORM}
    changes |= of("optimizer.", name="adamw", weight_decay=0.1, clip_norm=0.1)

    def train(name):
        with jax.numpy_dtype_promotion("standard"):
            run = opened(folder, data_dir, tmp_path / name, **changes)
            run.train()
        return run.state

    whole = train("whole")
    count = sum(leaf.size for name, leaf in saved.params.items() if name.startswith("decoder"))
    total = sum(leaf.size for leaf in saved.params.values())
    assert f"{total:,}, of which {count:,} trained" in capsys.readouterr().out
    stop = lambda self: self.save_and_interrupt() if self.step == 4 else None  # noqa: E731
    monkeypatch.setattr(loop.TrainingLoop, "interrupt_if_requested", stop)
    with pytest.raises(Interrupted):
        train("cut")
    monkeypatch.undo()
    shutil.rmtree(folder)
    resumed = train("cut")
    assert equal(resumed, whole)
    for state in (whole.params, whole.variables()):
        same = {name for name in state if np.array_equal(state[name], saved.variables()[name])}
        # The trained biases of keys have no gradient.
        assert same == {name for name in state if not name.startswith("decoder")}
