import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_programs import TINY, complaint, finish, results, start
from tests.test_training import DATA, equal, pieces, runner
from transformer.data.batches import Dataset
from transformer.parallel.replicas import mask_stopped
from transformer.training.health import HealthMonitor, NonfiniteError, batch_of, find_operation
from transformer.training.metrics import zero_sums

MOST = 2  # steps that may be skipped
KNOBS = {"ema_decay": 0.9, "dropout_rate": 0.1, "max_skipped_steps": MOST}
MODEL, STEP_CONFIG, INIT = pieces(KNOBS)
BAD = Dataset(DATA.source, DATA.target.at[0, 0].set(999), DATA.batch_size)  # no such token
run = runner(MODEL, STEP_CONFIG)


def bad_steps(state):  # of the first 12: they meet the token, which makes their loss NaN
    return [i for i in range(12) if (batch_of(state, BAD, i).target_out == 999).any()]


@pytest.mark.parametrize("most", [0, MOST, 100])
def test_a_bad_step_changes_nothing_and_is_counted(most):
    start = INIT(np.uint32(0))._replace(skipped=jnp.int32(MOST - most))  # `most` more may be
    state, sums = run(start, 12, data=BAD)
    met = bad_steps(start)
    assert 3 <= len(met) < 12
    counted, last = met[: most + 1], met[most] if len(met) > most else 12
    assert (state.skipped - start.skipped, state.failed) == (len(counted), counted[-1])
    # The same as a run of the good steps alone, up to the one at which it stops.
    alone, totals, good = start, zero_sums(), [i for i in range(last) if i not in met]
    for i in good:
        skipped = start.skipped + i - good.index(i)
        alone, totals = run(alone._replace(step=jnp.int32(i), skipped=skipped), 1, totals, BAD)
    alone = alone._replace(step=jnp.int32(12), skipped=state.skipped, failed=state.failed)
    assert equal(alone, state)
    own = {"steps": 12.0, "skipped": 12.0 - len(good), "stopped": 12.0 - last}
    assert jax.tree.map(float, sums) == jax.tree.map(float, totals) | own


def test_the_operation_is_found_that_makes_a_nan():
    model, config, init = pieces({"name": "sgd"}, norm="rms", position_encoding="none", num_heads=1)
    start = init(np.uint32(0))
    step = bad_steps(start)[0]
    start = start._replace(step=np.int32(step))
    said = find_operation(model, config, start, batch_of(start, BAD, step))
    assert "nan" in said
    assert "\n" not in said


def interval(loss, skipped=0.0, stopped=0.0):
    return [{"skipped": skipped, "stopped": stopped}], [{"train/loss": loss}]


def test_skipped_updates_and_loss_spikes_are_printed(capsys):
    start = INIT(np.uint32(0))
    monitor = HealthMonitor(start, max_skipped=3)
    for step in range(1, 14):
        monitor.check(step, *interval(1.0 + 0.01 * step), start)
    assert not capsys.readouterr().out
    monitor.check(14, *interval(5.0, skipped=2), start)
    out = capsys.readouterr().out
    assert "2 of the updates up to step 14 skipped for a NaN or Inf (at most 3 may be)" in out
    assert "loss spike: 5 up to step 14, 4.7 times the median of the last 13 intervals" in out


def test_a_replica_that_leaves_the_mean_makes_no_loss_spike(capsys):
    start = INIT(np.uint32(0))
    monitor = HealthMonitor(start, max_skipped=3)
    for step in range(1, 16):
        (a, b), (c, d) = interval(0.1 if step < 14 else np.nan), interval(5.0)
        sums, metrics = [*a, *a, *c], [*b, *b, *d]
        monitor.check(step, sums, metrics, start)
    assert not capsys.readouterr().out
    with pytest.raises(NonfiniteError, match="step 9"):
        monitor.check(15, *interval(np.nan, 1, 4), start._replace(failed=jnp.int32(9)))


def test_a_replica_that_stops_does_not_stop_the_others(capsys):
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), INIT(np.uint32(0)))
    two = two._replace(failed=jnp.array([-1, 7]))
    monitor = HealthMonitor(two, max_skipped=0)
    sums, metrics = map(list.__add__, interval(1.0), interval(np.nan, 1, 3))
    for step in (10, 20):
        monitor.check(step, sums, metrics, two)
    assert capsys.readouterr().out.count("replica 1: stopped at step 7 for a NaN or Inf") == 1
    others = mask_stopped([{"x": 1.0}, {"x": 2.0}], monitor.stopped)
    np.testing.assert_equal(others, [{"x": 1.0}, {"x": np.nan}])
    resumed = HealthMonitor(two._replace(skipped=jnp.array([0, 1])), max_skipped=0)
    assert resumed.stopped.tolist() == [False, True]
    with pytest.raises(NonfiniteError, match="step 7"):
        HealthMonitor(two._replace(skipped=jnp.array([1, 1])), max_skipped=0)


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_its_batch_and_the_operation(tmp_path, data_dir):
    """Every step is logged: of the one that fails there is nothing to divide by."""
    flags = [*TINY, f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--config.steps=40"]
    flags += ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0"]
    line = complaint("train.py", *flags, "--config.log_every=1", "--config.debug_nans=true")
    assert re.search("it comes from nan generated by .* lower optimizer.learning_rate", line)
    step = int(line.split("of step ")[1].split()[0])
    assert 0 < step < 20
    with np.load(tmp_path / f"batch_of_step_{step}.npz") as arrays:
        assert len(arrays["source"]) == 16
    assert os.listdir(tmp_path / "checkpoints") == []
    assert all(row["step"] <= 20 for row in results(tmp_path))


@pytest.mark.slow
def test_a_population_ends_with_the_replicas_that_are_left(tmp_path, data_dir):
    flags = [*TINY, f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--config.steps=40"]
    flags += ["--config.replicas=2", "--config.per_replica.learning_rate=(1e-3,1e30)"]
    assert "replica 1: stopped at step" in finish(start("train.py", *flags))
    line = complaint("train.py", *flags, "--config.max_skipped_steps=3", "--allow_changes")
    assert "max_skipped_steps=3: replica 1 stopped when it was 0, and has missed steps" in line
    for row in results(tmp_path):
        assert np.isnan(list(row.values())[-1]) == (row["replica"] == 1 and row["step"] > 5)
