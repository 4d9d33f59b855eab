import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_packing import dataset
from tests.test_programs import ROOT
from tests.test_sharding import mesh_of
from transformer.data.batches import Dataset
from transformer.data.packing import pack_rows
from transformer.data.streaming import StreamedDataset
from transformer.errors import UserError
from transformer.training.step import data_keys

KEYS = data_keys(np.array([0, 7], np.uint32))
of_step = jax.jit(lambda data, key, step: data.batch(key, step))
assert_equal = partial(jax.tree.map, np.testing.assert_array_equal)


def rows_of(count, packed):
    rows = dataset(np.random.default_rng(0), count)
    return pack_rows(rows, 40) if packed else rows


def streamed(rows, batch_size, steps, workers=1):
    data = StreamedDataset(rows, batch_size, KEYS, steps, workers, mesh_of(1, 1, 1))
    data.window_steps = 3
    return data


@pytest.mark.parametrize(
    ("count", "size", "workers"),
    [(100, 4, 0), (5, 8, 0), pytest.param(100, 4, 1, marks=pytest.mark.slow)],
)
def test_windows_hold_the_batches_of_the_device_from_any_step_and_workers_end(count, size, workers):
    """Also where several epochs end within a batch."""
    rows = rows_of(count, packed=count > size)
    stream, data = streamed(rows, size, 20, workers), Dataset.from_rows(rows, size)
    with contextlib.closing(stream):
        for begin in (12, 5):  # a step that does not follow starts anew
            step = begin
            while step < 20:
                window, left = stream.window(step)
                assert left == min(3 - (step - begin) % 3, 20 - step)
                for within, k in itertools.product(range(step, step + left), range(2)):
                    one = jax.tree.map(itemgetter(k), window)
                    wanted = of_step(data, KEYS[k], jnp.int32(within))
                    assert_equal(wanted, of_step(one, KEYS[k], jnp.int32(within)))
                    assert_equal(wanted, stream.batch(KEYS[k], jnp.int32(within)))  # by itself
                step += min(left, 2)  # a dispatch may end before its window does
        assert 0.0 <= stream.wait_share() <= 1.0
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_the_end_of_a_worker_is_explained():
    with contextlib.closing(streamed(rows_of(100, packed=True), 4, 1_000)) as stream:
        stream.window(0)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(UserError, match=r"worker process that makes .* has ended: .*data\.num"):
            all(stream.window(3 * k) for k in range(300))  # more than are made ahead


ORPHANS = """import sys
sys.path.append("scripts")  # as pytest has it
from tests.test_streaming import multiprocessing, rows_of, streamed, time
streamed(rows_of(100, packed=False), 4, 10**6).window(0)
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
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
