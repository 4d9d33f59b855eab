"""Several processes on this machine, joined over its loopback, against one."""

import json
import re
import shutil
import signal
import socket
import time

import jax
import pytest

from tests.test_programs import TINY, finish, results, start
from transformer import hosts, sharding
from transformer.errors import UserError
from transformer.interruption import RESUME

STEPS, SAVED = 20, 10
SHORT = (
    *TINY,
    "--config.save_every=10",
    "--config.eval_every=10",
    "--config.keep_checkpoints=9",
    "--config.decode_margin=2",
    f"--config.steps={STEPS}",
)
# Parameters and their moments are split over all processes.
SPLIT = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
# Sums are taken in another order: 1.1e-7 has been seen, dropout included.
CLOSE = 1e-5


def launch(processes, *words, last=()):
    """The same program in so many processes, each with one device; the last has more words."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = (f"--coordinator={address}", f"--processes={processes}")
    more = [()] * (processes - 1) + [last]
    return [start(*words, *flags, f"--process={k}", *more[k]) for k in range(processes)]


def end(processes):
    """The standard output of each of them, which all must succeed."""
    return [finish(process) for process in processes]


def same(left, right):
    assert len(left) == len(right)
    for row, other in zip(left, right, strict=True):
        assert other == pytest.approx(row, rel=CLOSE), row["step"]


@pytest.mark.slow
def test_processes_train_resume_and_evaluate_together(tmp_path, data_dir):
    """Two give the losses of one; what they save goes on in one and in four; one of them writes."""
    data, flags = f"--data_dir={data_dir}", (*SHORT, *SPLIT)

    def train(processes, name):
        words = ("train.py", data, *flags, f"--workdir={tmp_path / name}")
        return launch(processes, *words)

    first, second = end(train(2, "two"))
    assert "2 × cpu" in first
    assert "mesh fsdp 2" in first
    assert "samples" in first
    assert [line for line in second.splitlines() if "[Gloo]" not in line] == []
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1
    saved = tmp_path / "two" / "checkpoints" / str(STEPS) / "default"
    assert len(list(saved.glob("ocdbt.process_*"))) == 2  # each has written its part

    for name in ("four", "one"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / str(STEPS))
    whole = start("train.py", data, *SHORT, f"--workdir={tmp_path / 'whole'}")
    for processes, name in ((4, "four"), (1, "one")):
        assert f"at step {SAVED} of {STEPS}" in end(train(processes, name))[0]
    finish(whole)
    steps = [row["step"] for row in results(tmp_path / "whole") if "train/loss" in row]
    assert steps == list(range(5, STEPS + 1, 5))
    for name in ("two", "four", "one"):
        same(results(tmp_path / "whole"), results(tmp_path / name))

    end(launch(2, "eval.py", data, f"--workdir={tmp_path / 'two'}"))
    finish(start("eval.py", data, f"--workdir={tmp_path / 'whole'}"))
    ours, theirs = (
        json.loads((tmp_path / name / "eval_test.json").read_text())["replicas"][0]["metrics"]
        for name in ("two", "whole")
    )
    assert ours == pytest.approx(theirs, rel=CLOSE)
    written = (tmp_path / "two" / "samples_test.tsv").read_text()
    assert written == (tmp_path / "whole" / "samples_test.tsv").read_text()
    assert (tmp_path / "two" / "plots" / "attention_test_0_cross.png").exists()


@pytest.mark.slow
def test_a_population_has_its_replicas_in_several_processes(tmp_path, data_dir):
    flags = (*SHORT, "--config.steps=10", "--config.replicas=2", f"--data_dir={data_dir}")
    one = start("train.py", *flags, f"--workdir={tmp_path / 'one'}", devices=1)
    out = end(launch(2, "train.py", *flags, f"--workdir={tmp_path / 'two'}"))
    assert "mesh replica 2" in out[0]
    finish(one)
    assert {row["replica"] for row in results(tmp_path / "two")} == {0, 1}
    same(results(tmp_path / "one"), results(tmp_path / "two"))


def wait_for(folder):
    """Until it is there."""
    deadline = time.monotonic() + 120
    while not folder.is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest(run):
    """The step of the newest checkpoint."""
    names = (path.name for path in (run / "checkpoints").iterdir())
    return max(int(name) for name in names if name.isdigit())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path, data_dir):
    """^C, which is passed on to JAX as the SIGTERM that a cluster sends."""
    run = tmp_path / "run"
    flags = (*SHORT, *SPLIT, f"--data_dir={data_dir}", f"--workdir={run}")
    flags = (*flags, "--config.steps_per_call=7", "--config.log_every=20")
    flags = (*flags, "--config.save_every=60", "--config.eval_every=60")
    both = launch(2, "train.py", *flags, "--config.steps=100000")
    wait_for(run / "checkpoints" / "60")
    both[1].send_signal(signal.SIGINT)
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == RESUME, errors
        assert "stopped at step" in errors
    saved = newest(run)
    last = saved // 20 * 20 + 40
    words = ("train.py", *flags, f"--config.steps={last}", "--allow_changes")
    assert f"at step {saved:,} of {last:,}" in end(launch(2, *words))[0]
    steps = [row["step"] for row in results(run) if "train/loss" in row]
    assert steps == [*range(20, last + 1, 20)]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_dies_the_other_does_not_wait(killed, tmp_path, data_dir):
    run = tmp_path / "run"
    flags = (*SHORT, *SPLIT, f"--data_dir={data_dir}", f"--workdir={run}")
    flags = (*flags, "--config.save_every=100", "--config.eval_every=100")
    both = launch(2, "train.py", *flags, "--config.steps=100000")
    wait_for(run / "checkpoints" / "100")
    both[killed].kill()
    began = time.monotonic()
    _, errors = both[1 - killed].communicate(timeout=150)
    assert time.monotonic() - began < 60
    both[killed].communicate()
    if killed == 0:  # who keeps all together; JAX notices the loss itself, and aborts
        assert both[1].returncode == -signal.SIGABRT, errors
        assert "another task died" in errors
        return
    assert both[0].returncode == 2, errors
    assert re.search("^error: .*another process", errors, re.MULTILINE)
    assert "Traceback" not in errors
    saved = newest(run)
    words = ("train.py", *flags, f"--config.steps={saved + 10}", "--allow_changes")
    assert f"at step {saved:,} of" in end(launch(2, *words))[0]


def complaints(processes):
    """The one line of each, which all must refuse and none may wait for another for long."""
    lines = []
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        (line,) = (line for line in errors.splitlines() if line.strip())
        lines.append(line)
    return lines


@pytest.mark.slow
def test_an_error_ends_all_processes_whoever_has_it(tmp_path, data_dir):
    flags = (*SHORT, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}")
    both = complaints(launch(2, "train.py", *flags, "--config.mesh.data=4"))
    assert all("needs 4 devices and there are 2" in line for line in both)

    first, second = complaints(launch(2, "train.py", *flags, last=["--workdir=/proc/none"]))
    assert "error: /proc/none: No such file" in second
    assert "error: stopped together with another process" in first


@pytest.mark.slow
def test_what_the_first_process_finds_wrong_is_everyones(tmp_path):
    code = """
import sys
from transformer import hosts
from transformer.errors import UserError

def check():
    assert hosts.first()
    raise UserError("damaged")

hosts.join(sys.argv[1], 2, int(sys.argv[2]), interruptible=False)
assert hosts.once(hosts.first) is True
order = open(sys.argv[3], "a")
hosts.in_turn(lambda: print(hosts.first(), file=order, flush=True))
try:
    hosts.once(check)
except UserError as error:
    print(error)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = ("-c", code, address)
    both = [start(*words, str(k), str(tmp_path / "order")) for k in (1, 0)]
    assert all(out.splitlines()[-1] == "damaged" for out in end(both))
    assert (tmp_path / "order").read_text() == "True\nFalse\n"


def test_alone_nothing_is_joined(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it connects")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    hosts.join(None, None, None, interruptible=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # as sweeps submit their programs
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    hosts.join(None, None, None, interruptible=False)
    assert hosts.first()
    assert not hosts.several()


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"TPU_WORKER_HOSTNAMES": "worker-0,worker-1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_a_cluster_is_left_to_jax(environment, monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: asked.append(how))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join(None, None, None, interruptible=False)
    hosts.join("auto", None, None, interruptible=False)
    assert asked == [{"initialization_timeout": hosts.PATIENCE}] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, 0), "several processes need all of --coordinator"),
        (("host:1", 2, None), "several processes need all"),
        ((None, 2, 0), "several processes need all"),
        (("host", 2, 0), "several processes need all"),
        (("auto", 2, 0), "several processes need all"),
        (("host:1", 2, 2), "--process=2 of --processes=2: they are counted from 0 to 1"),
        (("localhost:1", 2, 1), "--coordinator=localhost:1: nobody answered in 0 s"),
    ],
)
def test_flags_that_lead_nowhere_are_explained(flags, message, monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE", 0)
    with pytest.raises(UserError, match=message):
        hosts.join(*flags, interruptible=False)


def test_who_waits_for_the_coordinator_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "PATIENCE", 1)
    monkeypatch.setattr(hosts, "SILENCE", 0)
    with pytest.raises(UserError, match="nobody answered in 1 s"):
        hosts.find("localhost:1")
    said = capsys.readouterr().err
    assert said.count("localhost:1: nobody answers yet") == 1
    assert said.endswith("waiting for process 0, 1 s at most\n")


def test_once_and_in_turn_are_plain_calls_in_one_process():
    calls = []
    assert hosts.once(lambda: calls.append(1) or {"a": 1}) == {"a": 1}
    assert hosts.in_turn(lambda: calls.append(2) or "b") == "b"
    assert calls == [1, 2]


def test_processes_that_are_left_out_are_explained(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"one of 4 of a TPU slice; .* --coordinator=auto"):
        sharding.find_devices()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="takes 1 of the 8 devices of 4 processes"):
        sharding.one_device()
