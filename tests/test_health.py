"""NaN and Inf in training, and losses that jump."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_programs import TINY, complaint, finish, results, start
from tests.test_training import DATA, equal, pieces
from transformer.data.batches import Dataset
from transformer.health import NonfiniteError, Watchman, batch_of, find_operation
from transformer.training import make_train_step, make_train_steps, zero_sums

BAD = Dataset(DATA.source, DATA.target.at[0, 0].set(999), DATA.batch_size)  # no such token


MOST = 2  # steps that may be skipped


@pytest.fixture(scope="module")
def start_of_run():
    model, recipe, init = pieces({"ema_decay": 0.9, "dropout": 0.1, "max_skipped": MOST})
    return init(jnp.uint32(0)), jax.jit(make_train_steps(make_train_step(model, recipe)))


def is_bad(state, step):
    """Whether a step meets the token that makes its loss NaN."""
    return 999 in np.asarray(batch_of(state, BAD, step).target_out)


@pytest.mark.parametrize("most", [0, MOST, 100])
def test_a_bad_step_changes_nothing_and_is_counted(most, start_of_run):
    start, steps = start_of_run
    start = start._replace(skipped=jnp.int32(MOST - most))  # `most` more may be skipped
    state, sums = steps(start, zero_sums(), BAD, jnp.int32(12))
    met = [step for step in range(12) if is_bad(start, step)]
    assert 3 <= len(met) < 12
    counted = met[: most + 1]
    assert int(state.skipped - start.skipped) == len(counted)
    assert int(state.failed) == counted[-1]
    assert int(state.step) == 12
    last = met[most] if len(met) > most else 12
    assert float(sums["stopped"]) == 12 - last
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, sums)))
    # The same as a run of the good steps alone, up to the one at which it stops.
    alone, totals, good = start, zero_sums(), [i for i in range(last) if i not in met]
    for i in good:
        alone, totals = steps(alone._replace(step=jnp.int32(i)), totals, BAD, jnp.int32(1))
    for part in ("params", "moments", "average", "statistics"):
        assert equal(getattr(alone, part), getattr(state, part))
    for name in ("loss", "correct", "tokens", "gradient_norm"):
        assert float(totals[name]) == float(sums[name])
    assert float(sums["steps"]) == 12
    assert float(sums["skipped"]) == 12 - len(good)


def test_the_operation_is_found_that_makes_a_nan():
    model, recipe, init = pieces(
        {"name": "sgd", "clip_norm": 0.0}, norm="rms", position="none", heads=1
    )
    start = init(jnp.uint32(0))
    step = next(step for step in range(12) if is_bad(start, step))
    said = find_operation(model, recipe, start, BAD, step)
    assert "nan" in said
    assert "\n" not in said


def interval(loss, skipped=0, stopped=0):
    sums = {"skipped": np.float32(skipped), "stopped": np.float32(stopped)}
    return [sums], [{"train/loss": loss}]


def test_the_watchman_speaks_of_what_is_left_out_and_of_spikes(start_of_run, capsys):
    start, _ = start_of_run
    watchman = Watchman(start, most=3)
    for step in range(1, 14):
        watchman.look(step, *interval(1.0 + 0.01 * step), start)
    assert capsys.readouterr().out == ""
    watchman.look(14, *interval(5.0, skipped=2), start)
    out = capsys.readouterr().out
    assert "2 of the steps up to 14 left out for a NaN or Inf (at most 3 may be)" in out
    assert "loss 5 up to step 14, 4.7 times the median of the last 13 intervals" in out
    assert watchman.without_stopped([{"x": 1.0}]) == [{"x": 1.0}]
    with pytest.raises(NonfiniteError, match="step 9") as caught:
        watchman.look(15, *interval(np.nan, 1, 4), start._replace(failed=jnp.int32(9)))
    assert caught.value.step == 9


def test_a_replica_that_stops_leaves_the_others_alone(start_of_run, capsys):
    start, _ = start_of_run
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start)
    two = two._replace(failed=jnp.array([-1, 7]))
    watchman = Watchman(two, most=0)
    sums = [*interval(0.0)[0], *interval(0.0, 1, 3)[0]]
    metrics = [{"train/loss": 1.0}, {"train/loss": np.nan}]
    for step in (10, 20):
        watchman.look(step, sums, metrics, two)
    assert capsys.readouterr().out.count("replica 1: stopped at step 7, a NaN or Inf") == 1
    first, second = watchman.without_stopped([{"x": 1.0}, {"x": 2.0}])
    assert first == {"x": 1.0}
    assert np.isnan(second["x"])
    assert Watchman(two._replace(skipped=jnp.array([0, 1])), most=0).stopped == {1}
    with pytest.raises(NonfiniteError, match="step 7"):
        Watchman(two._replace(skipped=jnp.array([1, 1])), most=0)


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_its_batch_and_the_operation(tmp_path, data_dir):
    flags = (*TINY, f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--config.steps=60")
    # Every step is logged: of the one that fails there is nothing to divide by.
    flags = (*flags, "--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0")
    flags = (*flags, "--config.log_every=1")
    line = complaint("train.py", *flags, "--config.debug_nans=true")
    step = int(line.split("of step ")[1].split()[0])
    assert 0 < step < 20
    assert "it comes from nan generated by primitive" in line
    assert "lower optimizer.learning_rate" in line
    with np.load(tmp_path / f"batch_of_step_{step}.npz") as arrays:
        assert arrays["source"].shape == (128, arrays["source"].shape[1])
    assert os.listdir(tmp_path / "checkpoints") == []
    assert all(row["step"] <= 20 for row in results(tmp_path))


@pytest.mark.slow
def test_a_population_ends_with_the_replicas_that_are_left(tmp_path, data_dir):
    flags = (*TINY, f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--config.steps=40")
    flags = (*flags, "--config.replicas=2", "--config.per_replica.learning_rate=(1e-3,1e30)")
    out = finish(start("train.py", *flags))
    assert "replica 1: stopped at step" in out
    line = complaint("train.py", *flags, "--config.max_skipped_steps=3", "--allow_changes")
    assert "max_skipped_steps=3: replica 1 stopped when it was 0, and has missed steps" in line
    for row in results(tmp_path):
        assert np.isnan(list(row.values())[-1]) == (row["replica"] == 1 and row["step"] > 5)
