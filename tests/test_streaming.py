"""Batches made on the host: those of the device, in order, and workers that end with their run."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from operator import itemgetter

import jax
import numpy as np
import pytest

from tests.test_packing import dataset
from tests.test_programs import ROOT
from tests.test_sharding import mesh_of
from transformer.data.batches import Dataset
from transformer.data.rows import pack
from transformer.data.streaming import Stream
from transformer.errors import UserError
from transformer.training.step import stream

SEEDS = np.array([0, 7], np.uint32)


def rows_of(count, packed):
    rows = dataset(np.random.default_rng(0), count)
    return pack(rows, 40) if packed else rows


def streamed(rows, batch_size, steps, workers=1):
    feed = Stream(rows, batch_size, SEEDS, steps=steps, workers=workers, mesh=mesh_of(1, 1, 1))
    feed.most = 3
    return feed


of_step = jax.jit(lambda data, seed, step: data.batch(stream(seed, "data"), step))


def assert_equal(one, other, *place):  # the batches in two datasets, or windows
    jax.tree.map(np.testing.assert_array_equal, of_step(one, *place), of_step(other, *place))


@pytest.mark.parametrize(("count", "size", "packed"), [(5, 8, False), (100, 16, True)])
def test_a_batch_is_the_same_by_whom_and_where_it_is_made(count, size, packed):
    """Also where an epoch ends within it, and where several do."""
    rows = rows_of(count, packed)
    feed, data = streamed(rows, size, 40), Dataset.of(rows, size)
    for step, seed in itertools.product((0, 1, 7, 39), SEEDS):
        assert_equal(data, feed.at(step, seed), seed, step)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_windows_follow_each_other_from_any_step_and_end_with_their_workers(workers):
    rows = rows_of(100, packed=True)
    feed, data, step = streamed(rows, 4, 20, workers), Dataset.of(rows, 4), 12
    with feed.running(step):
        while step < 20:
            window, left = feed.following(step)
            assert left == min(3 - step % 3, 20 - step)
            for within, k in itertools.product(range(step, step + left), range(2)):
                assert_equal(data, jax.tree.map(itemgetter(k), window), SEEDS[k], within)
            step += min(left, 2)  # a dispatch may end before its window does
        assert 0.0 <= feed.waited() <= 1.0
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_the_end_of_a_worker_is_explained():
    feed = streamed(rows_of(100, packed=True), 4, 40)
    with feed.running(0):
        feed.following(0)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(UserError, match=r"processes that make batches have ended: .*data\.wor"):
            all(feed.following(3 * k) for k in range(13))


ORPHANS = """
from tests.test_streaming import multiprocessing, rows_of, streamed, time
feed = streamed(rows_of(100, packed=False), 4, 10**6)
with feed.running(0):
    feed.following(0)
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
        assert alive(worker)
        process.kill()
    for _ in range(200):
        time.sleep(0.1 * alive(worker))
    assert not alive(worker)


def alive(pid):
    with (
        contextlib.suppress(FileNotFoundError),
        open(f"/proc/{pid}/stat", encoding="utf-8") as file,
    ):
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False
