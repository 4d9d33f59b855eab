import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOKENIZER, program, refused
from tests.test_checkpoint import metrics
from tests.test_training import equal
from transformer.averaging import average, consecutive, mean
from transformer.config import default_config
from transformer.data.corpus import Tokenizers
from transformer.parallel.mesh import one_device_mesh
from transformer.run import Run
from transformer.training.checkpoint import Checkpoints
from transformer.workdir import Workdir

KNOBS = {"model.d_model": 16, "model.num_heads": 2, "model.d_ff": 32, "save_every": 10}
KNOBS["optimizer.warmup_steps"] = 2
EVALUATED = ("params", "batch_stats", "ema_params")
BATCH_NORM = {"model.norm": "batch", "ema_decay": 0.9}
POPULATION = {"replicas": 2, "per_replica.learning_rate": (1e-3, 2e-3), "ema_decay": 0.9}


def drawn(model, like, step, rng):
    """A state of `step` with random numbers for all that is a float."""

    def draw(leaf):
        values = rng.normal(size=leaf.shape) * (not np.issubdtype(leaf.dtype, np.integer))
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    steps = jax.device_put(np.full(like.step.shape, step, np.int32), like.step.sharding)
    return jax.tree.map(draw, like)._replace(step=steps)


def make_run(path, rng, steps=(10, 20, 30), tokenizer=TOKENIZER, drawn=drawn, **changes):
    """The folder of a run that was never trained, the states in it, and their abstract twin."""
    workdir = Workdir(str(path))
    config = default_config()
    config.update_from_flattened_dict(KNOBS | changes)
    tokenizers = Tokenizers(*tokenizer.sides())
    tokenizers.save(workdir.tokenizers)
    workdir.write_config(config, {"dataset": "toy"} | tokenizers.digests())
    run = Run.saved(workdir.path, mesh=one_device_mesh())
    run.tokenizers = tokenizers
    model, like = run.model, run.abstract_state
    states = [drawn(model, like, step, rng) for step in steps]
    with Checkpoints(workdir.checkpoints, keep=len(steps), best="sequence_accuracy") as checkpoints:
        for state in states:
            checkpoints.save(state, metrics(0.5))
    return workdir, states, like


def files_of(path):
    """Every file and when it was written."""
    files = (path, *path.rglob("*"))
    return {x: (x.stat().st_mtime_ns, x.read_bytes() if x.is_file() else None) for x in files}


@pytest.mark.parametrize("changes", [{}, BATCH_NORM, POPULATION])
def test_the_last_checkpoints_become_a_run_of_their_mean(changes, tmp_path, rng):
    workdir, states, like = make_run(tmp_path / "run", rng, steps=(10, 20, 30, 33), **changes)
    before = files_of(workdir.path)
    into = Workdir(str(tmp_path / "new" / "mean"))
    assert average(workdir, into, 3) == [20, 30, 33]
    assert files_of(workdir.path) == before

    with Checkpoints(into.checkpoints, keep=None, best="sequence_accuracy") as checkpoints:
        assert checkpoints.steps() == [33]
        assert checkpoints.find("latest") == checkpoints.find("best") == 33
        assert checkpoints.interval(33) == {}
        state = checkpoints.restore(33, like)
    assert state.taken() == 33
    for field in EVALUATED:
        for name, array in getattr(state, field).items():
            arrays = np.stack([getattr(one, field)[name] for one in states[1:]])
            wanted = np.vectorize(math.fsum, signature="(n)->()")(np.moveaxis(arrays, 0, -1)) / 3
            np.testing.assert_array_equal(array, wanted.astype(np.float32), err_msg=name)
    rest = set(state._fields) - set(EVALUATED)
    assert all(equal(getattr(state, name), getattr(states[-1], name)) for name in rest)
    assert bool(state.ema_params) == ("ema_decay" in changes)
    assert bool(state.batch_stats) == ("model.norm" in changes)

    # What evaluates and predicts finds what it needs.
    restored = Run.saved(into.path, mesh=one_device_mesh()).restore()
    assert equal(restored, state)
    assert into.plots.is_dir()
    made_of = {"averaged": {"workdir": str(workdir.path), "steps": [20, 30, 33]}}
    assert into.read_record() == workdir.read_record() | made_of
    assert len({(each.tokenizers / "shared").read_bytes() for each in (workdir, into)}) == 1


def test_the_mean_of_equal_states_is_one_of_them_bit_for_bit(tmp_path, rng):
    _, (state,), _ = make_run(tmp_path, rng, steps=(10,), **BATCH_NORM)
    limits, name = np.finfo(np.float32), next(iter(state.batch_stats))
    odd = np.array([0.0, -0.0, limits.smallest_subnormal, limits.max, 1 / 3, -np.inf, np.nan])
    array = jnp.asarray(np.resize(odd.astype(np.float32), 16), device=state.step.sharding)
    state = state._replace(batch_stats=state.batch_stats | {name: array})
    for count in (1, 3, 7, 10):
        for one, other in zip(*map(jax.tree.leaves, (state, mean([state] * count))), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
            assert one.sharding == other.sharding


def test_a_best_checkpoint_that_stands_apart_is_none_of_the_last():
    for steps in ([10, 20, 30], [10, 20, 23], [15, 20, 30]):
        assert consecutive(steps, [10]) == steps
    assert consecutive([10, 30, 40], [10]) == [30, 40]
    assert consecutive([10, 21], [10]) == [21]
    assert consecutive([10, 20], [10, 4]) == [20]  # early stopping saves at 12 and 16 too


def test_what_cannot_be_averaged_is_refused_in_a_line(tmp_path, rng):
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10, 30, 40, 50))
    into = Workdir(str(tmp_path / "mean"))

    few = r"last=4: \S+run has 3 checkpoints in a row \(at 10, 30, 40, 50; save_every=10"
    refused(few, average, workdir, into, 4)
    refused("last=0: it must be at least 1", average, workdir, into, 0)
    refused("holds no run: train first", average, Workdir(str(tmp_path / "none")), into, 3)
    inside = Workdir(f"{workdir.path}/../run/mean")
    refused("is inside the averaged run; choose another --into", average, workdir, inside, 3)
    (workdir.checkpoints / "50" / "default" / "manifest.ocdbt").unlink()
    damage = r"50 is damaged \(default/manifest.ocdbt is missing\)"
    refused(damage, average, workdir, into, 3)
    assert not into.path.exists()
    shutil.rmtree(workdir.checkpoints / "50")
    average(workdir, into, 1)  # of the newest alone
    before = files_of(into.path)
    refused("mean already exists", average, workdir, into, 1)
    message = r"mean holds an average of checkpoints.*another --wor"
    for allowed in (False, True):  # and no training goes on in it
        refused(message, into.claim, workdir.read_config(), allow_changes=allowed)
    assert files_of(into.path) == before


def test_the_program_takes_as_many_as_it_is_told_and_names_the_new_folder(tmp_path, rng, capsys):
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10, 20, 30, 33))
    with program("scripts/average.py", f"--workdir={workdir.path}/", "--last=2") as script:
        script.main()
    assert "at steps 30, 33" in " ".join(capsys.readouterr().out.split())
    averaged = Workdir(f"{workdir.path}_average").read_record()["averaged"]
    assert averaged["steps"] == [30, 33]
