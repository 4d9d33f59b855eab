"""Runs that are asked to stop: by a signal, in the middle of an interval."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.test_programs import ROOT, TINY, bit_identical, finish, results, start, wait_for
from transformer.training.interruption import RESUME, Interrupted, StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_is_noticed_and_what_was_before_comes_back(number, capsys):
    before = signal.getsignal(number)
    with StopRequests() as requests:  # as in a notebook, which no request may end
        assert not requests.stop()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while requests.asked is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.stop()
        with pytest.raises(Interrupted, match="after step 9, the last one, which is saved"):
            requests.all_is_saved(9)
    assert signal.getsignal(number) is before
    assert f"{signal.Signals(number).name}: stopping with a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "trained"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_request_ends_a_process_that_waits_inside_a_call(number, trained):
    """`read` of a silent pipe goes on after a handler, as the compiler does."""
    code = "import sys; from transformer.training.interruption import StopRequests\n"
    code += f"with StopRequests(True) as r: r.something_to_save = {trained};"
    code += " print('ready', flush=True); sys.stdin.read()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said = process.stderr.readline() + process.stderr.readline()
        if not trained:
            assert "stopped before the first step, nothing to save" in said
            assert process.wait(timeout=2) == RESUME
            return
        assert "stopping with a checkpoint" in said
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=2) == 128 + number


@pytest.mark.slow
def test_a_population_that_was_asked_to_stop_ends_as_one_left_alone(tmp_path, data_dir):
    """Twice, at any step. Its data may be made by processes; the other's lie on the devices."""
    flags = (*TINY, "--config.steps=150", f"--data_dir={data_dir}", "--config.replicas=2")
    flags = (*flags, "--config.log_every=25", "--config.save_every=50", "--config.eval_every=50")
    flags = (*flags, "--config.batch_size=256")  # slow enough to stop between two lines of metrics
    whole, stopped, places = tmp_path / "whole", tmp_path / "stopped", []
    finish(start("train.py", *flags, f"--workdir={whole}"))
    for number, workers in ((signal.SIGTERM, 1), (signal.SIGINT, 2)):
        by = f"--config.data.num_workers={workers}"
        process = start("train.py", *flags, by, f"--workdir={stopped}")
        later = places[-1] + 25 if places else 25
        wait_for(process, lambda n=later: any(row["step"] >= n for row in results(stopped)))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == RESUME, errors
        places.append(int(re.search(r"stopped at step ([\d,]+)", errors)[1].replace(",", "")))
    assert places[0] < places[1] < 150
    assert any(place % 25 for place in places)
    out = finish(start("train.py", *flags, f"--workdir={stopped}"))
    assert f"resuming at step {places[1]:,}" in " ".join(out.split())
    bit_identical(whole, stopped)
    assert sorted(os.listdir(whole / "checkpoints")) == sorted(os.listdir(stopped / "checkpoints"))
