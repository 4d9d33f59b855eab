"""Batches made on the host by grain's worker processes, for data larger than device memory."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from transformer.data.batches import Batch, BatchWindow, make_batch, permute_numpy, round_keys
from transformer.data.packing import Sides, TokenRows
from transformer.data.tokenizer import BOS
from transformer.errors import explained, needs
from transformer.parallel.mesh import partition_spec, place

WINDOW_BYTES = 2**26  # the maximum size of a window
WINDOW_STEPS = 100  # the maximum number of batches in a window
WINDOWS_AHEAD = 2  # windows to prefetch to the devices
BATCHES_AHEAD = 16  # batches that each worker prefetches
READY = 0.01  # seconds; a window that takes longer to arrive was not ready
draw_round_keys = jax.jit(jax.vmap(jax.vmap(round_keys, (None, 0)), (0, None)))  # keys, epochs


@dataclass(eq=False)
class StreamedDataset:
    """Training rows that stay on the host; has the methods of `Dataset` and the same batches.

    The workers make batches; a grain thread transfers them to the devices, a window of consecutive
    steps at a time. Results do not depend on the window or the number of workers.
    """

    rows: TokenRows
    batch_size: int
    keys: Array  # the data key of the run, or of each replica
    num_steps: int  # of the run
    num_workers: int
    mesh: Mesh
    start: int = BOS  # see `make_batch`

    def __post_init__(self):
        with needs("text"):
            import grain
        self.grain = grain
        fitting = WINDOW_BYTES // (self.batch_size * sum(self.rows.widths) * 4)  # bytes of an int32
        self.window_steps = min(WINDOW_STEPS, max(1, fitting))
        self.windows: Any = None  # an iterator, once workers are started
        self.held: Any = None  # the newest window
        self.steps = range(0)  # of that window
        self.waited: list[bool] = []  # for each window since the last `wait_share`

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        begin = int(step)
        drawn = HostBatches(self.rows, self.batch_size, key, begin, begin + 1)
        source, target = drawn(begin)
        sides = jnp.asarray(source), jnp.asarray(target)
        return make_batch(*sides, self.rows.packed, self.start)

    def empty_window(self) -> BatchWindow:
        return self.place_window(0, [])

    def window(self, step: int) -> tuple[BatchWindow, int]:
        """A step neither in the last window nor directly after it restarts the workers."""
        if step not in self.steps:
            if self.windows is None or step != self.steps.stop:
                self.close()
                self.windows = self.start_workers(step)
            started = time.perf_counter()
            with explained(  # grain's type depends on how the worker ended
                "a worker process that makes batches has ended: {reason}; run the same command "
                "again to resume from the last checkpoint, or with data.num_workers=0"
            ):
                self.held = next(self.windows)
            self.waited.append(time.perf_counter() - started > READY)
            self.steps = range(step, min(step + self.window_steps, self.num_steps))
        return self.held, self.steps.stop - step

    def wait_share(self) -> float | None:
        share = sum(self.waited) / max(len(self.waited), 1)
        self.waited.clear()
        return share

    def close(self) -> None:
        if self.windows is not None:
            self.windows.close()
        self.windows = None

    def start_workers(self, begin: int) -> Any:
        """An iterator over the windows from step `begin` on."""
        if not flags.FLAGS.is_parsed():  # grain reads its flags, in a test or a notebook too
            flags.FLAGS.mark_as_parsed()
        grain = self.grain
        drawn = HostBatches(self.rows, self.batch_size, self.keys, begin, self.num_steps)
        batches = grain.MapDataset.range(begin, self.num_steps).map(drawn)
        workers = grain.MultiprocessingOptions(
            num_workers=self.num_workers, per_worker_buffer_size=BATCHES_AHEAD
        )
        windows = (
            batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(workers, partial(_live_with, os.getpid()))
            .batch(self.window_steps, batch_fn=list)
            .map_with_index(lambda k, made: self.place_window(begin + k * self.window_steps, made))
        )
        prefetch = grain.experimental.ThreadPrefetchIterDataset
        return iter(prefetch(windows, prefetch_buffer_size=WINDOWS_AHEAD))

    def place_window(self, first: int, batches: list[Sides]) -> BatchWindow:
        """Shards the batches of the steps from `first` on over the devices."""

        def on_mesh(array: np.ndarray, *axes: str | None) -> jax.Array:
            where = PartitionSpec(*["replica"] * self.keys.ndim, *partition_spec(axes))
            return place(array, NamedSharding(self.mesh, where))

        sides = []
        for side, width in enumerate(self.rows.widths):
            shape = (*self.keys.shape, self.window_steps, self.batch_size, width)
            tokens = np.zeros(shape, np.int32)
            for k, batch in enumerate(batches):
                tokens[..., k, :, :] = batch[side]
            # The step pads and shards a length that the mesh does not divide.
            length = "length" if width % self.mesh.shape["context"] == 0 else None
            sides.append(on_mesh(tokens, None, "batch", length))
        step = on_mesh(np.full(self.keys.shape, first, np.int32))
        return BatchWindow(sides[0], sides[1], step, self.rows.packed, self.start)


class HostBatches:
    """The rows of the batches of steps `begin` to `end` - 1 in NumPy."""

    def __init__(self, rows: TokenRows, batch_size: int, keys: Array, begin: int, end: int):
        self.rows, self.batch_size = rows, batch_size
        self.first_epoch, last = (step * batch_size // len(rows) for step in (begin, end))
        epochs = jnp.arange(self.first_epoch, last + 1, dtype=jnp.uint32)
        self.round_keys = np.asarray(draw_round_keys(jnp.atleast_1d(keys), epochs))
        self.shape = (*keys.shape, batch_size, -1)

    def __call__(self, step: int) -> Sides:
        size = len(self.rows)
        epoch, within = np.divmod(step * self.batch_size + np.arange(self.batch_size), size)
        drawn = (keys[epoch - self.first_epoch] for keys in self.round_keys)
        found = [self.rows.take(permute_numpy(within, size, keys)) for keys in drawn]
        source, target = (np.stack(side).reshape(self.shape) for side in zip(*found, strict=True))
        return source, target


def _live_with(parent: int, *_: int) -> None:
    """Makes a worker process ignore stop signals and end with its parent."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
