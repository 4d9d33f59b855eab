"""Several processes on this machine, joined over its loopback, against one."""

import json
import re
import signal
import socket
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from tests.helpers import refused
from tests.test_programs import TINY, finish, newest, results, start, wait_for
from transformer.parallel import hosts
from transformer.parallel.mesh import find_devices, one_device_mesh
from transformer.training.interruption import RESUME
from transformer.workdir import write_json

SHORT = (*TINY, "--config.log_every=4", "--config.save_every=4", "--config.eval_every=4")
SHORT = (*SHORT, "--config.keep_checkpoints=9", "--config.decode_margin=2")
SHORT = (*SHORT, "--config.optimizer.schedule=constant")  # of runs that end elsewhere too the same
# Rounding does not grow, however many steps a run takes until it is stopped.
SHORT = (*SHORT, "--config.optimizer.learning_rate=1e-4")
SPLIT = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")  # state is split over all processes
CLOSE = 1e-5  # sums are taken in another order: 1.1e-7 has been seen after 20 steps


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def launch(processes, *words, last=()):
    """The same program in so many processes, each with one device; the last has more words."""
    flags = (f"--coordinator={free_address()}", f"--processes={processes}")
    more = [()] * (processes - 1) + [last]
    return [start(*words, *flags, f"--process={k}", *more[k]) for k in range(processes)]


def same(left, right):
    assert len(left) == len(right)
    for row, other in zip(left, right, strict=True):
        assert other == pytest.approx(row, rel=CLOSE), row["step"]


@pytest.mark.slow
def test_a_run_of_which_a_process_dies_resumes_and_ends_as_one_of_one_process(tmp_path, data_dir):
    run, whole, data = tmp_path / "run", tmp_path / "whole", f"--data_dir={data_dir}"
    flags = (*SHORT, data, f"--workdir={run}", "--allow_changes")

    def kill(victim, at):
        """What the other of two processes says, and with which status it ends."""
        both = launch(2, "train.py", *flags, *SPLIT, "--config.steps=100000")
        wait_for(both[0], (run / "checkpoints" / str(at)).is_dir)
        both[victim].kill()
        _, errors = both[1 - victim].communicate(timeout=60)
        both[victim].communicate()
        return errors, both[1 - victim].returncode

    # Process 0 keeps all together; JAX notices the loss itself, and aborts.
    errors, status = kill(0, at=4)
    assert (status, "another task died" in errors) == (-signal.SIGABRT, True), errors
    saved = newest(run)
    out = finish(start("train.py", *flags, f"--config.steps={saved + 4}"))
    assert f"at step {saved:,} of {saved + 4:,}" in out
    errors, status = kill(1, at=saved + 8)
    assert (status, "Traceback" in errors) == (2, False), errors
    assert re.search("^error: .*another process", errors, re.MULTILINE)
    saved = newest(run)
    last = f"--config.steps={saved + 4}"
    four = launch(4, "train.py", *flags, *SPLIT, last)
    one = start("train.py", *SHORT, data, last, f"--workdir={whole}")
    first, *others = map(finish, four)
    assert f"at step {saved:,} of {saved + 4:,}" in first
    assert all(words in first for words in ("4 × cpu", "mesh fsdp 4", "samples"))
    assert all("[Gloo]" in line for out in others for line in out.splitlines())
    parts = run / "checkpoints" / str(saved + 4) / "default"
    assert len(list(parts.glob("ocdbt.process_*"))) == 4  # each has written its part
    assert len(list(run.glob("events.out.tfevents.*"))) == 4  # of each start one
    finish(one)
    rows = [row["step"] for row in results(whole) if "train/loss" in row]
    assert rows == list(range(4, saved + 5, 4))
    same(results(whole), results(run))

    both = launch(2, "eval.py", data, f"--workdir={run}")
    list(map(finish, (*both, start("eval.py", data, f"--workdir={whole}"))))
    found = (json.loads((folder / "eval_test.json").read_text()) for folder in (run, whole))
    ours, theirs = (each["replicas"][0]["metrics"] for each in found)
    assert ours == pytest.approx(theirs, rel=CLOSE)
    assert len({(folder / "samples_test.tsv").read_text() for folder in (run, whole)}) == 1
    assert (run / "plots" / "attention_test_0_cross.png").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path, data_dir):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = (*SHORT, f"--data_dir={data_dir}", "--config.replicas=2")
    flags = (*flags, "--config.log_every=8", "--config.save_every=16", "--config.eval_every=16")
    there = f"--workdir={run}"
    both = launch(2, "train.py", *flags, there, "--config.steps=100000")
    wait_for(both[0], (run / "checkpoints" / "16").is_dir)
    both[1].send_signal(signal.SIGINT)
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, "stopped at step" in errors) == (RESUME, True), errors
    saved = newest(run)
    last = saved // 8 * 8 + 16
    flags = (*flags, f"--config.steps={last}")
    both = launch(2, "train.py", *flags, there, "--allow_changes")
    out, *_ = map(finish, (*both, start("train.py", *flags, f"--workdir={whole}")))
    assert all(words in out for words in (f"at step {saved:,} of {last:,}", "mesh replica 2"))
    rows = results(run)
    logged = [(row["step"], row["replica"]) for row in rows if "train/loss" in row]
    assert sorted(logged) == [(step, k) for step in range(8, last + 1, 8) for k in range(2)]
    same(results(whole), rows)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path, data_dir):
    flags = (*SHORT, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}")
    said = []
    for process in launch(2, "train.py", *flags, last=["--workdir=/proc/none"]):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        said += filter(str.strip, errors.splitlines())
    first, second = said
    assert first.startswith("error: stopped together with another process")
    assert second.startswith("error: /proc/none: No such file")


@pytest.mark.slow
def test_what_the_first_process_finds_wrong_is_everyones(tmp_path):
    code = """import sys
from transformer.parallel import hosts
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
    words = ("-c", code, free_address())
    both = [start(*words, str(k), str(tmp_path / "order")) for k in (1, 0)]
    assert [finish(process).splitlines()[-1] for process in both] == ["damaged"] * 2
    assert (tmp_path / "order").read_text() == "True\nFalse\n"


def test_alone_nothing_is_joined_and_a_cluster_is_left_to_jax(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: asked.append(how))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: asked.append("a connection"))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    tasks, workers, pod = "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX"
    for environment, count in (
        *(({}, 0), ({tasks: "1", workers: "localhost"}, 0)),  # as sweeps submit their programs
        *(({tasks: "2"}, 1), ({workers: "worker-0,worker-1"}, 1)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", pod: "0"}, 1),
    ):
        for name in (tasks, workers, pod):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked.clear()
        hosts.join(None, None, None, interruptible=False)
        assert asked == [{"initialization_timeout": hosts.PATIENCE}] * count, environment
    hosts.join("auto", None, None, interruptible=False)
    assert len(asked) == 2
    assert (hosts.first(), hosts.several()) == (True, False)
    once, in_turn = (Mock(return_value=each) for each in ({"a": 1}, "b"))
    assert (hosts.once(once), hosts.in_turn(in_turn)) == ({"a": 1}, "b")
    assert once.call_count == in_turn.call_count == 1


def test_flags_that_lead_nowhere_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "PATIENCE", 0)
    incomplete = [("host:1", None, 0), ("host:1", 2, None), (None, 2, 0), ("host", 2, 0)]
    for flags, message in (
        *((each, "several processes need all of --coordinator") for each in incomplete),
        (("auto", 2, 0), "several processes need all of --coordinator"),
        (("host:1", 2, 2), "--process=2: it must be at most 1"),
        (("localhost:1", 2, 1), "--coordinator=localhost:1: .*: no answer in 0 s"),
    ):
        refused(message, hosts.join, *flags, interruptible=False)
    monkeypatch.setattr(hosts, "PATIENCE", 1)
    monkeypatch.setattr(hosts, "SILENCE", 0)
    capsys.readouterr()
    refused("no answer in 1 s", hosts.find, "localhost:1")
    said = capsys.readouterr().err
    assert said.count("waiting for process 0, 1 s at most") == 1
    assert said.endswith("waiting for process 0, 1 s at most\n")


def test_processes_left_out_are_explained_and_the_first_alone_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    refused("one of 4 of a TPU slice; .* --coordinator=auto", find_devices)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    refused("needs 1 devices .*8 .*4 processes must use all", one_device_mesh)
    for process, writes in ((1, False), (0, True)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert hosts.several()
        assert hosts.first() == writes
        write_json(tmp_path / "file.json", {})
        assert (tmp_path / "file.json").exists() == writes


def test_whatever_fails_on_the_first_process_ends_the_others_too(monkeypatch):
    sent = []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "first", lambda: True)
    broadcast = lambda x: sent.append(np.asarray(x)) or sent[-1]  # noqa: E731
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", broadcast)
    with pytest.raises(ZeroDivisionError):
        hosts.once(lambda: 1 / 0)
    message = "the first process failed: ZeroDivisionError: division by zero"
    assert json.loads(sent[1].tobytes()) == [None, message]
