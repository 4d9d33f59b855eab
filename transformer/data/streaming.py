"""Where the training loop's batches come from: the devices' own memory, or processes on the host.

What fits lies on the devices, and a step picks its rows there. What does not is streamed: grain's
worker processes make the batches of the steps to come, a thread stacks some of them into a window
and places it, and the loop finds it there. Batch k holds the same tokens either way, so
that neither the way nor the number of workers changes a result.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from transformer.data.batches import Dataset, Window, epoch_key, round_keys
from transformer.data.rows import Batches, Rows
from transformer.errors import UserError, needs
from transformer.parallel.mesh import partition_spec, place
from transformer.training.step import stream

WINDOW_BYTES = 2**26  # of a window's batches, at most
WINDOW_STEPS = 100  # batches in a window, at most
AHEAD = 2  # windows that wait for the loop
WORKER_AHEAD = 16  # batches that each worker has ready
PATIENCE = 0.1  # seconds between looks at whether to stop


class Resident:
    """Training data that lies on the devices."""

    def __init__(self, data: Dataset):
        self.data = data

    def blank(self) -> Dataset:
        """What a dispatch of no steps reads."""
        return self.data

    @contextlib.contextmanager
    def running(self, begin: int) -> Iterator[None]:
        """While batches are asked for, from a step on."""
        yield

    def following(self, step: int) -> tuple[Dataset, int]:
        """What a dispatch from `step` on reads, and how many steps it may take."""
        return self.data, sys.maxsize

    def waited(self) -> float | None:
        """The share of the dispatches since the last call that waited for data; None: none can."""
        return None

    def at(self, step: int, seed: Any) -> Dataset:
        """What a step of the run with that seed reads."""
        return self.data


class Stream:
    """Training data that worker processes make while the devices compute.

    Args:
      rows: what it is made of.
      batch_size: rows a batch.
      seeds: of the replicas.
      steps: of the whole run.
      workers: processes.
      mesh: the devices.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seeds: np.ndarray | np.uint32,
        *,
        steps: int,
        workers: int,
        mesh: Mesh,
    ):
        with needs("text"):
            import grain
        self.grain = grain
        self.rows, self.batch_size, self.seeds, self.steps = rows, batch_size, seeds, steps
        self.workers, self.mesh = workers, mesh
        row = sum(rows.widths) * np.dtype(np.int32).itemsize
        self.most = min(WINDOW_STEPS, max(1, WINDOW_BYTES // (batch_size * row)))
        self.windows = self.waits = 0

    def blank(self) -> Window:
        """A window without batches."""
        return self.window([], 0)

    def at(self, step: int, seed: Any) -> Window:
        """The window of one step, of the run with that seed."""
        (source,), (target,) = self.batches(np.atleast_1d(seed), step, step + 1)[step]
        return Window(source[None], target[None], np.array(step, np.int32), self.rows.packed)

    def batches(self, seeds: np.ndarray | np.uint32, begin: int, end: int) -> Batches:
        """Those of steps `begin` to `end` - 1."""
        first, last = (step * self.batch_size // len(self.rows) for step in (begin, end))
        epochs = jnp.arange(first, last + 1, dtype=jnp.uint32)
        keys = permutation_keys(jnp.atleast_1d(jnp.asarray(seeds)), epochs)
        return Batches(self.rows, self.batch_size, np.asarray(keys), first)

    def window(self, parts: Sequence[tuple[np.ndarray, np.ndarray]], first: int) -> Window:
        """The batches of steps from `first` on, on the devices, each of which has its rows."""
        replicas = np.atleast_1d(self.seeds).size
        sides = []
        for which, width in enumerate(self.rows.widths):
            tokens = np.zeros((replicas, self.most, self.batch_size, width), np.int32)
            for k, part in enumerate(parts):
                tokens[:, k] = part[which]
            # A length that the devices do not divide stays whole, until the step divides it.
            length = "length" if width % self.mesh.shape["context"] == 0 else None
            sides.append(self.place(tokens, (None, "batch", length)))
        step = self.place(np.full(replicas, first, np.int32), ())
        return Window(sides[0], sides[1], step, self.rows.packed)

    def place(self, array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        """An array [replicas, *axes] on the devices; of a single run its one row."""
        where = partition_spec(axes)
        if np.ndim(self.seeds):
            where = PartitionSpec("replica", *where)
        else:
            array = array[0, ...]
        return place(array, NamedSharding(self.mesh, where))

    @contextlib.contextmanager
    def running(self, begin: int) -> Iterator[None]:
        """While batches are asked for, from step `begin` on."""
        self.ready: queue.Queue[Window | BaseException] = queue.Queue(AHEAD)
        self.end = begin  # of the window at hand
        self.ends = threading.Event()
        thread = threading.Thread(target=self.fill, args=(begin,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ends.set()
            thread.join()

    def following(self, step: int) -> tuple[Window, int]:
        """The window of a dispatch from `step` on, and how many steps are left in it.

        Raises:
          UserError: a worker has ended.
        """
        if step < self.end:
            return self.held, self.end - step
        self.windows += 1
        self.waits += self.ready.empty()
        window = self.ready.get()
        if isinstance(window, BaseException):
            reason = " ".join(str(window).split())[:200]
            raise UserError(
                f"the processes that make batches have ended: {reason}; the same command goes on "
                "from the last checkpoint; with data.num_workers=0 there are none"
            ) from window
        self.held, self.end = window, min(step + self.most, self.steps)
        return window, self.end - step

    def waited(self) -> float:
        """The share of the windows since the last call that were not there yet."""
        share = self.waits / max(self.windows, 1)
        self.windows = self.waits = 0
        return share

    def fill(self, begin: int) -> None:
        """Makes windows until nobody asks for more; what goes wrong is put in the place of one."""
        iterator = None
        try:
            iterator = self.iterate(begin)
            step = begin
            while step < self.steps and not self.ends.is_set():
                stop = min(step + self.most, self.steps)
                self.offer(self.window([next(iterator) for _ in range(step, stop)], step))
                step = stop
        except Exception as error:  # whatever a worker's end is to grain
            self.offer(error)
        finally:
            if iterator is not None:
                iterator.close()

    def offer(self, window: Window | BaseException) -> None:
        """Waits until the loop has room for one more, or wants none."""
        while not self.ends.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(window, timeout=PATIENCE)
                return

    def iterate(self, begin: int) -> Any:
        """An iterator of grain over the batches from step `begin` on."""
        if not flags.FLAGS.is_parsed():  # grain reads its own, in a test or a notebook too
            flags.FLAGS.mark_as_parsed()
        batches = self.batches(self.seeds, begin, self.steps)
        grain = self.grain
        here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        several = grain.MultiprocessingOptions(
            num_workers=self.workers, per_worker_buffer_size=WORKER_AHEAD
        )
        source: Any = grain.MapDataset.source(batches)
        steps = source[begin : self.steps].to_iter_dataset(here)
        return iter(steps.mp_prefetch(several, partial(live_with, os.getpid())))


@jax.jit
def permutation_keys(
    seeds: UInt32[Array, "replicas"], epochs: UInt32[Array, "epochs"]
) -> UInt32[Array, "replicas epochs 6"]:
    """The keys of the order of each epoch, for each seed."""

    def keys(seed: Array, epoch: Array) -> Array:
        return round_keys(epoch_key(stream(seed, "data"), epoch))

    return jax.vmap(jax.vmap(keys, (None, 0)), (0, None))(seeds, epochs)


def live_with(parent: int, *_: int) -> None:
    """Has a worker leave signals to the process that started it, and end when that does.

    Args:
      parent: that process.
      *_: grain says which worker this is, and of how many.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
