"""Runs that end because their validation metric no longer improves."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests import helpers
from tests.helpers import refused
from tests.test_config import resolved
from tests.test_programs import results
from tests.test_train import KNOBS, steps_with
from transformer.run import Run
from transformer.training import loop
from transformer.training.early_stopping import EarlyStopping
from transformer.training.interruption import Interrupted, StopRequests

# Of the evaluations at 5, 6, 10, 12 and 14 the tiny model has a sequence accuracy of 0 in all.
PATIENCE = {"patience": 2}
# The second replica does not learn, so it ends at its second evaluation; the first one improves.
TWO = {"replicas": 2, "mesh.replica": 1, "best_metric": "loss", "model.dropout_rate": 0.0}
TWO |= {"per_replica.learning_rate": (1e-2, 1e-30)}


def make(folder, data_dir, **changes):
    return Run(resolved(KNOBS | changes), folder, data_dir=data_dir)


def train(folder, data_dir, allow_changes=False, **changes):
    return helpers.train(make(folder, data_dir, **changes), allow_changes=allow_changes)


def same(one, other, but=("ended",)):
    left, right = (state._replace(**dict.fromkeys(but, 0)) for state in (one, other))
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, data_dir):
    """A run that stops early, and its folder."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    return folder, train(folder, data_dir, **PATIENCE)


def history(patience, values, metric="sequence_accuracy"):
    """Whether a run with these values of its evaluations ends after each of them."""
    run = EarlyStopping(resolved({"patience": patience, "best_metric": metric}), [])
    for step, value in enumerate(values, 1):
        run.add(0, step, {f"validation/{metric}": value})
        yield run.reason(0) is not None


def test_patience_counts_the_evaluations_since_the_first_of_the_best_values():
    nan = np.nan
    assert list(history(2, [0.5, 0.6, 0.6, 0.5])) == [False, False, False, True]
    assert list(history(1, [0.5, 0.6, 0.6])) == [False, False, True]
    assert list(history(2, [0.5, nan, 0.6, nan, nan])) == [False] * 4 + [True]
    assert list(history(2, [nan, nan, nan])) == [False, False, True]
    assert list(history(1, [3.0, 2.0, 2.5], "loss")) == [False, False, True]
    rows = [{"step": 1, "replica": 1, "validation/loss": 1.0}, {"step": 2, "train/loss": 9.0}]
    cfg = resolved({"patience": 1, "replicas": 2, "best_metric": "loss"})
    run = EarlyStopping(cfg, [*rows, {"step": 3, "replica": 1, "validation/perplexity": 3.0}])
    run.add(1, 1, {"validation/loss": 1.0})  # validated again after an interruption
    assert [run.reason(k) for k in range(2)] == [None, None]
    run.add(1, 1_000, {"validation/loss": 1.5})
    said = "validation/loss has not improved for an evaluation; best 1 at step 1"
    assert [run.reason(k) for k in range(2)] == [None, said]


def test_a_run_that_stops_early_is_the_run_that_was_trained_to_that_step(
    ended, tmp_path, data_dir, capsys
):
    folder, state = ended
    whole = train(tmp_path / "whole", data_dir, eval_every=5)
    capsys.readouterr()
    run = make(tmp_path / "whole", data_dir)
    with jax.set_mesh(run.mesh):
        same(state, run.restore("10"))
    assert (state.taken(), int(state.ended)) == (10, 10)
    assert steps_with(folder, "validation/loss") == [5, 6, 10]
    assert sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*")) == ["10", "5", "6"]
    assert json.loads((folder / "results.json").read_text())["step"] == 10
    assert (folder / "plots" / "learning_curve.png").exists()

    again = shutil.copytree(folder, tmp_path / "again")
    before = results(again)
    same(train(again, data_dir, **PATIENCE), state, but=())
    assert results(again) == before
    assert "finished    stopped early at step 10 of 14 (patience=2)" in capsys.readouterr().out
    refused(r"another config \(patience: 2 → 0\)", train, again, data_dir)
    refused(r"eval_every: 6 → 7", train, again, data_dir, **PATIENCE, eval_every=7)
    more = "stopped early at step 10 of 20 .*, and takes no more steps; raise patience with"
    refused(more, train, again, data_dir, **PATIENCE, steps=20)
    same(train(again, data_dir, allow_changes=True), whole)  # and goes on without


def test_a_resumed_run_stops_where_it_would_have_stopped(ended, tmp_path, data_dir, monkeypatch):
    stops = iter([False] * 5 + [True])  # dispatches end at 1, 4, 5, 6 and 8
    monkeypatch.setattr(loop.DispatchSize, "seconds", 1e9)
    monkeypatch.setattr(StopRequests, "stop", lambda self: next(stops))
    with pytest.raises(Interrupted, match="stopped at step 8 of 14"):
        train(tmp_path, data_dir, **PATIENCE)
    monkeypatch.undo()
    same(train(tmp_path, data_dir, **PATIENCE), ended[1], but=())
    assert results(tmp_path) == results(ended[0])


@pytest.fixture(scope="module")
def population(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("population") / "run"
    return folder, train(folder, data_dir, **TWO, patience=1)


def test_a_replica_ends_alone_and_keeps_its_state_and_its_metrics(population, tmp_path, data_dir):
    folder, state = population
    whole = train(tmp_path / "whole", data_dir, **TWO, save_every=6, keep_checkpoints=9)
    assert state.ended.tolist() == [0, 6]
    with jax.set_mesh(make(folder, data_dir, **TWO).mesh):
        at_6 = make(tmp_path / "whole", data_dir, **TWO).restore("6")
    one = lambda tree, k: jax.tree.map(lambda leaf: leaf[k], tree)  # noqa: E731
    same(one(state, 0), one(whole, 0))
    same(one(state, 1), one(at_6, 1), but=("ended", "step"))
    rows = results(folder)
    assert max(row["step"] for row in rows if row["replica"] == 1) == 6
    assert max(row["step"] for row in rows if row["replica"] == 0) == 14
    own = json.loads((folder / "results.json").read_text())["replicas"]
    assert [each["step"] for each in own] == [14, 6]
    assert all(np.isfinite(each["test/loss"]) for each in own)
    message = "patience=0: replica 1 stopped early when it was 1, and has missed steps since"
    refused(message, train, folder, data_dir, allow_changes=True, **TWO)


@pytest.mark.parametrize("step", [None, 10])
def test_a_population_with_an_ended_replica_resumes_exactly(
    step, population, tmp_path, data_dir, monkeypatch
):
    """Between dispatches of other sizes, before and after its end; while it is validated."""
    if step is None:
        stops = iter([False] * 5 + [True])
        monkeypatch.setattr(loop.DispatchSize, "seconds", 1e9)
        monkeypatch.setattr(StopRequests, "stop", lambda self: next(stops))
    else:
        stop = lambda self: self.save_and_interrupt() if self.step == step else None  # noqa: E731
        monkeypatch.setattr(loop.TrainingLoop, "interrupt_if_requested", stop)
    with pytest.raises(Interrupted, match=r"stopped at step (8|10) of 14"):
        train(tmp_path / "run", data_dir, **TWO, patience=1)
    monkeypatch.undo()
    same(train(tmp_path / "run", data_dir, **TWO, patience=1), population[1], but=())
    assert results(tmp_path / "run") == results(population[0])


def test_a_population_is_finished_when_all_replicas_have_ended(tmp_path, data_dir):
    rates = {"per_replica.learning_rate": (1e-30, 2e-30)}
    state = train(tmp_path / "run", data_dir, **TWO | rates, patience=1)
    assert (state.step.tolist(), state.ended.tolist()) == ([6, 6], [6, 6])


def test_at_the_last_step_no_run_stops_early(tmp_path, data_dir):
    assert train(tmp_path, data_dir, **PATIENCE, steps=10).ended == 0
