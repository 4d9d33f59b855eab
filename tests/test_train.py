"""`Run.train` in this process: what it logs and saves, and how it goes on."""

import json
import os
import re
import shutil
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from tests.helpers import refused, train
from tests.test_config import FILES, SMALL, of, resolved
from tests.test_programs import results
from transformer import cli
from transformer.errors import UserError
from transformer.run import Run
from transformer.run_training import describe_passes
from transformer.training import loop
from transformer.training.checkpoint import Checkpoints
from transformer.training.interruption import Interrupted, StopRequests

# Logs at 4, 5, 8, 10, 12 and 14, for a save ends an interval too; validates at 5, 6, 10, 12, 14.
KNOBS = SMALL | of("", steps=14, eval_every=6, save_every=5, keep_checkpoints=3)
KNOBS |= {"model.dropout_rate": 0.1}


def run(workdir, data_dir, allow_changes=False, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    found = Run(resolved(KNOBS | changes), workdir, data_dir=data_dir)
    return train(found, allow_changes=allow_changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """A run that is left alone: its folder, its last state, and the steps of each interval."""
    folder, intervals = tmp_path_factory.mktemp("train") / "whole", []
    recorded = Mock(side_effect=loop.finalize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finalize", recorded)
        state = run(folder, data_dir)
    intervals = [int(call.args[0].sums["steps"]) for call in recorded.call_args_list]
    return folder, state, intervals


def steps_with(folder, metric):
    return [row["step"] for row in results(folder) if metric in row]


def test_metrics_are_of_the_interval_that_ends_there(whole):
    folder, _, intervals = whole
    ends = [4, 5, 8, 10, 12, 14]
    assert steps_with(folder, "train/loss") == ends
    assert steps_with(folder, "validation/loss") == [5, 6, 10, 12, 14]
    assert intervals == np.diff([0, *ends]).tolist()


# Between dispatches; while it is validated, where a checkpoint is due too and where it is not.
@pytest.mark.parametrize("step", [None, 5, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(step, whole, tmp_path, data_dir, monkeypatch):
    folder, state, _ = whole
    if step is None:
        stops = iter([False] * 4 + [True])  # dispatches end at 1, 4, 5, 6: 7 is not reached
        monkeypatch.setattr(loop.DispatchSize, "seconds", 1e9)
        monkeypatch.setattr(StopRequests, "stop", lambda self: next(stops))
    else:
        stop = lambda self: self.save_and_interrupt() if self.step == step else None  # noqa: E731
        monkeypatch.setattr(loop.TrainingLoop, "interrupt_if_requested", stop)
    with pytest.raises(Interrupted, match=f"stopped at step {step or 6} of 14, and saved"):
        run(tmp_path / "run", data_dir)
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:  # which no checkpoint covers
        log.write('{"step": 7, "train/loss": 1.0}\n')
    resumed = run(tmp_path / "run", data_dir)
    assert results(tmp_path / "run") == results(folder)
    names = [sorted(os.listdir(each / "checkpoints")) for each in (folder, tmp_path / "run")]
    assert names[0] == names[1]
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


LONGER = [{"replicas": 2, "mesh__replica": 1}, {"data__num_workers": 1}]


@pytest.mark.parametrize(
    "changes", [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in LONGER)]
)
def test_a_finished_run_continues_to_the_bits_of_one_of_more_steps(
    changes, tmp_path, data_dir, monkeypatch, capsys
):
    folder, changes = tmp_path / "run", {"optimizer__schedule": "constant", **changes}
    run(folder, data_dir, **changes)
    refused(r"config \(steps: 14 → 12\)", run, folder, data_dir, steps=12, **changes)
    assert json.loads((folder / "results.json").read_text())["step"] == 14
    stop = lambda self: self.save_and_interrupt() if self.step == 15 else None  # noqa: E731
    monkeypatch.setattr(loop.TrainingLoop, "interrupt_if_requested", stop)
    with pytest.raises(Interrupted):
        run(folder, data_dir, steps=20, **changes)
    monkeypatch.undo()
    assert not (folder / "results.json").exists()  # or it would seem to be done
    state = run(folder, data_dir, steps=20, **changes)
    assert "learning rate jumps" not in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["step"] == 20
    whole = run(tmp_path / "whole", data_dir, steps=20, **changes)
    jax.tree.map(np.testing.assert_array_equal, state, whole)


@pytest.mark.parametrize("step_seconds", [0.001, 0.3, 7.0])
def test_dispatches_take_about_a_second(step_seconds, monkeypatch):
    """A step that takes longer has one of its own, and no other waits behind it."""
    now, ends, running = [0.0], [], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    size = loop.DispatchSize()
    for _ in range(6):
        steps, slow = size.steps, size.steps == 1
        running.append(steps)
        if slow or len(running) > 1:  # waits for this one, or for the one before
            now[0] += running.pop(0) * step_seconds
        running = running if not slow else []
        size.dispatched(steps)
        ends.append(steps)
    assert ends[0] == 1
    size.interrupted()
    size.measured(100, 100 * 10 * step_seconds)  # the machine is ten times slower in an interval
    assert size.steps <= max(1.0, 0.11 / step_seconds)
    assert all(1 <= steps <= max(1.0, 1.1 / step_seconds) for steps in ends)
    assert ends[-1] >= 0.7 / step_seconds or ends[-1] == 1


def test_the_first_dispatch_of_an_interval_is_measured_from_the_end_of_the_one_before(monkeypatch):
    now, size = [0.0], loop.DispatchSize()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    size.steps = 10
    size.dispatched(10)
    now[0] = 1.0
    size.measured(10, 1.0)  # the interval before it has ended
    now[0] = 2.0
    size.dispatched(10)
    assert size.steps == 10


def test_the_best_checkpoint_is_the_most_accurate_of_those_that_are_saved(whole):
    folder, *_ = whole
    validated = {row["step"]: row for row in results(folder) if "validation/loss" in row}
    saved = {step: validated[step] for step in (5, 10, 14)}

    def merit(step):
        return saved[step]["validation/sequence_accuracy"], -saved[step]["validation/loss"]

    with Checkpoints(folder / "checkpoints", keep=None, best="sequence_accuracy") as checkpoints:
        assert checkpoints.steps() == [5, 10, 14]
        assert checkpoints.find("latest") == 14
        assert checkpoints.find("best") == max(saved, key=merit)


def test_a_folder_is_of_one_config_and_one_dataset(whole, tmp_path, data_dir, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for message, allowed, changes in (
        (r"config \(optimizer.beta1: 0.9 → 0.8; .*--allow_changes", 0, {"optimizer__beta1": 0.8}),
        ("14 is of another config", 1, {"model__d_ff": 64}),
        ("has seed 0 and step 14", 1, {"seed": 5}),
        (r"another config \(data.vocab_size: .*steps: 14", 0, {"data__vocab_size": 300}),  # unused
        (r"other tokens \(data.tokenizer: characters → bytes\)", 1, {"data__tokenizer": "bytes"}),
    ):
        refused(message, run, folder, data_dir, bool(allowed), steps=16, **changes)
    for path, content in before.items():
        assert path.name == "lock" or path.read_bytes() == content, path
    capsys.readouterr()
    state = run(folder, data_dir, allow_changes=True, steps=16, optimizer__beta1=0.8)
    assert state.taken() == 16
    said = " ".join(capsys.readouterr().out.split())
    assert "the learning rate jumps after 14 updates, from 0 to 0.000286, since the config" in said
    assert f"and a new run with --config.init_from={folder} starts with a warm-up" in said
    assert steps_with(folder, "train/loss") == [4, 5, 8, 10, 12, 14, 15, 16]
    record = json.loads((folder / "config.json").read_text())
    record["corpus"]["dataset"] = "toy_strings/reverse_tiny/0.9.0"
    (folder / "config.json").write_text(json.dumps(record))
    message = r"trained on other data \(dataset toy_strings.* → toy"
    refused(message, run, folder, data_dir, steps=16, optimizer__beta1=0.8)
    (folder / "config.json").write_text("{")
    refused("config.json is damaged", run, folder, data_dir, steps=16, optimizer__beta1=0.8)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("no"), 2, "error: no\n"),
        (PermissionError(13, "Permission denied", "a"), 2, "error: a: Permission denied; fix"),
        (MemoryError("x"), 2, "error: out of memory (x)"),
        (Interrupted("stopped"), 75, "stopped\n"),  # EX_TEMPFAIL: a scheduler starts it again
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes from"),
    ],
)
def test_what_ends_a_program_is_a_line_and_a_status(error, status, said, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.explained(fail)
    assert end.value.code == status
    assert capsys.readouterr().err.startswith(said)


def test_a_run_says_how_often_it_reads_its_data_and_what_to_do_if_that_is_absurd(data_dir):
    def said(**changes):
        return describe_passes(Run(resolved(KNOBS | changes), data_dir=data_dir))

    assert said(steps=500) == "4 over 2,000 examples"
    assert said(steps=25_000) == "200 over 2,000 examples"
    much = "1,000 over 2,000 examples: more than 200 seldom help; consider steps=6200 or patience"
    assert said(steps=125_000) == much
    found = said(steps=20_000, **FILES, **{"data.dataset": "files", "model.d_model": 64})
    assert re.search(r"patience, and, for [\d,]+ tokens, .*configs/translate_small\.py$", found)
    tiny = {"data.dataset": "files", "model.d_model": 4, "model.d_ff": 4}
    assert "small" not in said(steps=20_000, **FILES, **tiny)
