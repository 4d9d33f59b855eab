"""Batches made on the host by grain's worker processes, for data larger than device memory."""

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from transformer.data.batches import Batch, BatchWindow, make_batch
from transformer.data.packing import TokenRows
from transformer.data.permutation import permute_numpy, round_keys
from transformer.errors import UserError, needs
from transformer.parallel.mesh import partition_spec, place

WINDOW_BYTES = 2**26  # the maximum size of a window
WINDOW_STEPS = 100  # the maximum number of batches in a window
WINDOWS_AHEAD = 2  # windows to prefetch to the devices
BATCHES_AHEAD = 16  # batches that each worker prefetches
READY = 0.01  # seconds; a window that takes longer to arrive was not ready


class StreamedDataset:
    """Training rows that stay on the host; batches are bit-identical to those of `Dataset`.

    The workers make batches; a grain thread transfers them to the devices, a window of consecutive
    steps at a time. Results do not depend on the window or the number of workers. `keys` is the
    data key of the run, or of each replica; `num_steps` is the number of steps of the run.
    """

    def __init__(
        self,
        rows: TokenRows,
        batch_size: int,
        keys: Array,
        *,
        num_steps: int,
        num_workers: int,
        mesh: Mesh,
    ):
        with needs("text"):
            import grain
        self.grain = grain
        self.rows, self.batch_size, self.keys = rows, batch_size, keys
        self.num_steps, self.num_workers, self.mesh = num_steps, num_workers, mesh
        row_bytes = sum(rows.widths) * np.dtype(np.int32).itemsize
        self.window_steps = min(WINDOW_STEPS, max(1, WINDOW_BYTES // (batch_size * row_bytes)))
        self.windows: Any = None  # an iterator, once workers are started
        self.held: BatchWindow | None = None  # holds the steps `begin` to `end` - 1
        self.begin = self.end = 0
        self.taken = self.waited = 0  # windows since the last `wait_share`

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        """The batch of a step, made in this process; see `Dataset.batch`."""
        begin = int(step)
        source, target = HostBatches(self.rows, self.batch_size, key, begin, begin + 1)[begin]
        return make_batch(jnp.asarray(source), jnp.asarray(target), self.rows.packed)

    def empty_window(self) -> BatchWindow:
        """A window with the shapes of the others, for compilation."""
        return self.place_window(0, [])

    def window(self, step: int) -> tuple[BatchWindow, int]:
        """The data to pass to jitted steps from `step` on, and the number of steps it is for.

        A step that is neither in the last window nor directly after it restarts the workers.

        Raises:
          UserError: a worker has ended.
        """
        if self.held is None or not self.begin <= step < self.end:
            if self.windows is None or step != self.end:
                self.close()
                self.windows = self.start_workers(step)
            self.held = self.next_window()
            self.begin, self.end = step, min(step + self.window_steps, self.num_steps)
        return self.held, self.end - step

    def next_window(self) -> BatchWindow:
        """Waits for the next window, and counts it if it was not ready."""
        started = time.perf_counter()
        try:
            found = next(self.windows)
        except Exception as error:  # grain's type depends on how the worker ended
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"a worker process that makes batches has ended: {reason}; run the same command "
                "again to resume from the last checkpoint, or with data.num_workers=0"
            ) from error
        self.taken += 1
        self.waited += time.perf_counter() - started > READY
        return found

    def wait_share(self) -> float | None:
        """The fraction of windows since the last call that were not ready."""
        share = self.waited / max(self.taken, 1)
        self.taken = self.waited = 0
        return share

    def close(self) -> None:
        """Stops the workers."""
        if self.windows is not None:
            self.windows.close()
        self.windows = None

    def start_workers(self, begin: int) -> Any:
        """An iterator over the windows from step `begin` on."""
        if not flags.FLAGS.is_parsed():  # grain reads its flags, in a test or a notebook too
            flags.FLAGS.mark_as_parsed()
        grain = self.grain
        source: Any = HostBatches(self.rows, self.batch_size, self.keys, begin, self.num_steps)
        batches = grain.MapDataset.source(source)[begin : self.num_steps]
        workers = grain.MultiprocessingOptions(
            num_workers=self.num_workers, per_worker_buffer_size=BATCHES_AHEAD
        )

        def placed(index: int, batches: list[tuple[np.ndarray, np.ndarray]]) -> BatchWindow:
            return self.place_window(begin + index * self.window_steps, batches)

        windows = (
            batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(workers, partial(live_with, os.getpid()))
            .batch(self.window_steps, batch_fn=list)
            .map_with_index(placed)
        )
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(
                windows, prefetch_buffer_size=WINDOWS_AHEAD
            )
        )

    def place_window(self, first: int, batches: list[tuple[np.ndarray, np.ndarray]]) -> BatchWindow:
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
        return BatchWindow(sides[0], sides[1], step, self.rows.packed)


class HostBatches:
    """The rows of the batches of steps `begin` to `end` - 1 in NumPy: a source for grain."""

    def __init__(self, rows: TokenRows, batch_size: int, keys: Array, begin: int, end: int):
        self.rows, self.batch_size, self.end = rows, batch_size, end
        self.first_epoch, last = (step * batch_size // len(rows) for step in (begin, end))
        epochs = jnp.arange(self.first_epoch, last + 1, dtype=jnp.uint32)
        self.round_keys = np.asarray(all_round_keys(jnp.atleast_1d(keys), epochs))
        self.replicas = keys.shape

    def __len__(self) -> int:
        return self.end

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources [*replicas, B, S] and the targets [*replicas, B, T] of a step."""
        size = len(self.rows)
        epoch, within = np.divmod(step * self.batch_size + np.arange(self.batch_size), size)
        found = [
            self.rows.take(permute_numpy(within, size, keys[epoch - self.first_epoch]))
            for keys in self.round_keys
        ]
        source, target = (
            np.stack(side).reshape(*self.replicas, *side[0].shape)
            for side in zip(*found, strict=True)
        )
        return source, target


@jax.jit
def all_round_keys(
    keys: Array, epochs: UInt32[Array, "epochs"]
) -> UInt32[Array, "replicas epochs 6"]:
    """The round keys of each epoch for each data key."""
    return jax.vmap(jax.vmap(round_keys, (None, 0)), (0, None))(keys, epochs)


def live_with(parent: int, *_: int) -> None:
    """Makes a worker process ignore stop signals and end with its parent."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
