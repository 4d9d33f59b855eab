"""Batches made on the host: those of the device, in order, and workers that end with their run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_packing import dataset
from tests.test_programs import ROOT
from tests.test_sharding import mesh_of
from transformer.data.batches import Dataset
from transformer.data.rows import pack
from transformer.errors import UserError
from transformer.streaming import Stream
from transformer.training import stream

SEEDS = np.array([0, 7], np.uint32)


def rows_of(count, packed):
    rows = dataset(np.random.default_rng(0), count)
    return pack(rows, 40) if packed else rows


def streamed(rows, batch_size, steps, seeds=SEEDS, workers=1, most=3):
    return Stream(
        rows,
        batch_size,
        seeds,
        steps=steps,
        stop_after=lambda step, most: min(steps, step + most, step - step % 5 + 5),
        most=most,
        workers=workers,
        mesh=mesh_of(1, 1, 1),
    )


def of_step(data, seed, step):
    """The batch of a step as arrays of NumPy."""
    data = jax.tree.map(jnp.asarray, data)
    return jax.tree.map(np.asarray, data.batch(stream(jnp.uint32(seed), "data"), jnp.int32(step)))


def assert_equal(one, other):
    for name, wanted in one._asdict().items():
        np.testing.assert_array_equal(getattr(other, name), wanted, err_msg=name)


@pytest.mark.parametrize(
    ("count", "batch_size", "packed"),
    [(5, 8, False), (64, 8, False), (100, 16, True), (1, 3, True)],
)
def test_a_batch_is_the_same_by_whom_and_where_it_is_made(count, batch_size, packed):
    """Also where an epoch ends within it, and where several do."""
    rows = rows_of(count, packed)
    feed = streamed(rows, batch_size, 40)
    for step in (0, 1, 7, 39):
        for seed in SEEDS:
            own = of_step(feed.at(step, seed), seed, step)
            assert_equal(of_step(Dataset.of(rows, batch_size), seed, step), own)


def check_windows(feed, data, begin, steps):
    """The windows that follow from a step on hold the batches of the steps, in order."""
    step = begin
    while step < steps:
        window = feed.following()
        for within in range(step, min(step + 3, step - step % 5 + 5, steps)):
            for replica, seed in enumerate(SEEDS):
                own = jax.tree.map(lambda leaf, k=replica: leaf[k], window)
                assert_equal(of_step(data, seed, within), of_step(own, seed, within))
            step += 1
    assert 0.0 <= feed.waited() <= 1.0


def test_windows_follow_each_other_from_any_step_without_workers():
    rows = rows_of(100, packed=True)
    feed = streamed(rows, 4, 20, workers=0)
    with feed.running(12):
        check_windows(feed, Dataset.of(rows, 4), 12, 20)


@pytest.mark.slow
def test_windows_follow_each_other_from_any_step_and_end_with_their_workers():
    rows = rows_of(100, packed=True)
    data, feed = Dataset.of(rows, 4), streamed(rows, 4, 40)
    with feed.running(12):
        check_windows(feed, data, 12, 40)
    assert not multiprocessing.active_children()

    with feed.running(0):
        feed.following()
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(UserError, match=r"processes that make batches have ended: .*data\.wor"):
            all(feed.following() for _ in range(40))


ORPHANS = """
import multiprocessing, time
from tests.test_streaming import rows_of, streamed
feed = streamed(rows_of(100, packed=False), 4, 10**6)
with feed.running(0):
    feed.following()
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed_and_leave_signals_to_it():
    command = [sys.executable, "-c", ORPHANS]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        worker = int(process.stdout.readline())
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, each)
        time.sleep(1.0)
        os.kill(worker, 0)  # it lives
        process.kill()
    deadline = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
