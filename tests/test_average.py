import math
import shutil

import jax
import numpy as np
import pytest

from configs import base
from tests.helpers import TOKENIZER, program
from tests.test_checkpoint import metrics
from tests.test_training import equal
from transformer import sharding
from transformer.averaging import average, in_a_row, mean
from transformer.checkpoint import Checkpoints
from transformer.data.load import Tokenizers
from transformer.errors import UserError
from transformer.trained import load, outline
from transformer.workdir import Workdir

KNOBS = {
    "model.width": 16,
    "model.heads": 2,
    "model.ff_width": 32,
    "save_every": 10,
    "optimizer.warmup_steps": 2,
}
EVALUATED = ("params", "statistics", "average")
BATCH_NORM = {"model.norm": "batch"}
EMA = {"ema_decay": 0.9}
POPULATION = {"replicas": 2, "per_replica.learning_rate": (1e-3, 2e-3)}


def drawn(model, like, step, rng):
    """A state of `step` with random numbers for all that is a float."""

    def draw(leaf):
        whole = np.issubdtype(leaf.dtype, np.integer)
        values = np.zeros(leaf.shape) if whole else rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(draw, like)
    steps = np.full(like.step.shape, step, np.int32)
    return state._replace(step=jax.device_put(steps, like.step.sharding))


def make_run(path, rng, steps=(10, 20, 30), tokenizer=TOKENIZER, drawn=drawn, **changes):
    """The folder of a run that was never trained, the states in it, and their abstract twin."""
    workdir = Workdir(str(path))
    config = base.get_config()
    config.update_from_flattened_dict(KNOBS | changes)
    tokenizers = Tokenizers(tokenizer, tokenizer)
    tokenizers.save(workdir.tokenizers)
    workdir.write_config(config, {"dataset": "toy"} | tokenizers.digests())
    *_, model, like = outline(workdir, sharding.one_device())
    states = [drawn(model, like, step, rng) for step in steps]
    with Checkpoints(workdir.checkpoints, keep=len(steps)) as checkpoints:
        for state in states:
            checkpoints.save(state, metrics(0.5))
    return workdir, states, like


def only_checkpoint(workdir, like):
    with Checkpoints(workdir.checkpoints, keep=None) as checkpoints:
        (step,) = checkpoints.manager.all_steps()
        assert step == checkpoints.find("latest") == checkpoints.find("best")
        assert checkpoints.interval(step) == {}
        return step, checkpoints.restore(step, like)


def exact(arrays):
    """The mean, added up without any rounding."""
    columns = zip(*(np.asarray(array).ravel().tolist() for array in arrays), strict=True)
    values = [math.fsum(column) / len(arrays) for column in columns]
    return np.array(values, np.float32).reshape(arrays[0].shape)


def files_of(path):
    """Every file and when it was written."""
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else None)
        for file in [path, *path.rglob("*")]
    }


@pytest.mark.parametrize(
    "changes",
    [{}, BATCH_NORM | EMA, POPULATION | EMA],
    ids=["plain", "batch norm and moving average", "population"],
)
def test_the_last_checkpoints_become_a_run_of_their_mean(changes, tmp_path, rng):
    workdir, states, like = make_run(tmp_path / "run", rng, steps=(10, 20, 30, 33), **changes)
    before = files_of(workdir.path)
    into = Workdir(str(tmp_path / "new" / "mean"))
    assert average(workdir, into, 3) == [20, 30, 33]
    assert files_of(workdir.path) == before

    step, state = only_checkpoint(into, like)
    assert step == state.taken() == 33
    for field in EVALUATED:
        for name, array in getattr(state, field).items():
            wanted = exact([getattr(one, field)[name] for one in states[1:]])
            np.testing.assert_array_equal(array, wanted, err_msg=name)
    rest = set(state._fields) - set(EVALUATED)
    assert all(equal(getattr(state, name), getattr(states[-1], name)) for name in rest)
    assert bool(state.average) == ("ema_decay" in changes)
    assert bool(state.statistics) == ("model.norm" in changes)

    # What evaluates and predicts finds what it needs.
    trained = load(into, sharding.one_device())
    assert equal(trained.variables, state.variables())
    assert trained.step == 33
    assert into.plots.is_dir()
    made_of = {"averaged": {"workdir": str(workdir.path), "steps": [20, 30, 33]}}
    assert into.read_record() == workdir.read_record() | made_of
    kept = [(folder.tokenizers / "shared").read_bytes() for folder in (workdir, into)]
    assert kept[0] == kept[1]


def test_the_mean_of_equal_states_is_one_of_them_bit_for_bit(tmp_path, rng):
    """Whatever their number, with zeros of both signs and the least and the largest numbers."""
    _, (state,), _ = make_run(tmp_path, rng, steps=(10,), **BATCH_NORM | EMA)
    limits = np.finfo(np.float32)
    odd = np.array([0.0, -0.0, limits.smallest_subnormal, limits.max, 1 / 3, -np.inf, np.nan])
    odd = np.resize(odd.astype(np.float32), 16)
    (name,) = list(state.statistics)[:1]
    array = jax.device_put(odd, state.statistics[name].sharding)
    state = state._replace(statistics=state.statistics | {name: array})
    for count in (1, 3, 7, 10):
        found = jax.tree.leaves(mean([state] * count))
        for one, other in zip(jax.tree.leaves(state), found, strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
            assert one.sharding == other.sharding


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([10, 20, 30], [10, 20, 30]),
        ([10, 30, 40], [30, 40]),
        ([10, 30], [30]),
        ([10, 20, 23], [10, 20, 23]),  # stopped, or its end
        ([10, 21], [21]),
        ([15, 20, 30], [15, 20, 30]),  # an end from which it went on
        ([15, 25], [25]),
        ([7], [7]),
    ],
)
def test_a_best_checkpoint_that_stands_apart_is_none_of_the_last(steps, last):
    assert in_a_row(steps, 10) == last


def test_what_cannot_be_averaged_is_refused_in_a_line(tmp_path, rng):
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10, 30, 40, 50))
    into = Workdir(str(tmp_path / "mean"))

    def refused(message, workdir=workdir, into=into, last=3):
        with pytest.raises(UserError, match=message) as caught:
            average(workdir, into, last)
        assert "\n" not in str(caught.value)

    refused(
        r"last=4: \S+run has 3 checkpoints in a row \(at 10, 30, 40, 50; save_every=10\); lower "
        r"it, or train with --config.keep_checkpoints=4, which keeps more",
        last=4,
    )
    refused("last=0: it must be at least 1", last=0)
    refused("holds no run: train first", workdir=Workdir(str(tmp_path / "none")))
    refused(
        "would be inside of .*only read; choose another --into",
        into=Workdir(f"{workdir.path}/../run/mean"),
    )
    (workdir.checkpoints / "50" / "default" / "manifest.ocdbt").unlink()
    refused(r"50 is damaged \(default/manifest.ocdbt is missing\); delete it to go on from step 40")
    assert not into.path.exists()
    shutil.rmtree(workdir.checkpoints / "50")
    average(workdir, into, 1)  # of the newest alone
    before = files_of(into.path)
    refused("mean is there already; choose another --into, or delete it", last=1)
    for allow_changes in (False, True):  # and no training goes on in it
        with pytest.raises(UserError, match=r"mean holds an average of checkpoints.*another --wor"):
            into.claim(workdir.read_config(), allow_changes=allow_changes)
    assert files_of(into.path) == before


def test_the_program_takes_as_many_as_it_is_told_and_names_the_new_folder(tmp_path, rng, capsys):
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10, 20, 30, 33))
    with program("scripts/average.py", f"--workdir={workdir.path}/", "--last=2") as script:
        script.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "at steps 30, 33" in said
    mean = Workdir(f"{workdir.path}_average")
    assert mean.read_record()["averaged"]["steps"] == [30, 33]
    into = tmp_path / "mean"
    with (
        program("scripts/average.py", f"--workdir={workdir.path}", f"--into={into}") as script,
        pytest.raises(UserError, match=r"last=5: .* has 4 checkpoints in a row"),
    ):
        script.main()
