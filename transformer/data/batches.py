"""Batches: a batch is a pure function of (dataset, data key, step).

`Dataset` holds all rows on the devices. `streaming.StreamedDataset` has the same methods `batch`,
`window`, `empty_window`, `wait_share` and `close`, and returns the same batches.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.data.packing import TokenRows
from transformer.data.permutation import permute, round_keys
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.parallel.mesh import constrain


class Batch(NamedTuple):
    """The input of a train step; `transformer.__doc__` explains the fields.

    Positions are None for unpacked rows, where a token's position is its index in the row.
    """

    source: Int[Array, "B S"]
    source_segments: Int[Array, "B S"]
    target_in: Int[Array, "B T"]
    target_out: Int[Array, "B T"]
    target_segments: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    source_positions: Int[Array, "B S"] | None = None
    target_positions: Int[Array, "B T"] | None = None

    def inputs(self) -> dict[str, Any]:
        """The arguments of a call of the model."""
        return {
            name: value
            for name, value in self._asdict().items()
            if name not in ("target_out", "weights")
        }


def make_batch(source: Int[Array, "B S"], target: Int[Array, "B T"], packed: bool = False) -> Batch:
    """Makes a batch of rows of tokens.

    Args:
      source: int32 rows, each sequence with EOS at its end, padded at the end.
      target: their targets in the same order, likewise.
      packed: whether a row may hold several examples. The k-th target of a row then belongs to its
        k-th source, and positions restart in each.
    """
    real = target != PAD
    start = jnp.full_like(target[:, :1], BOS)
    before = jnp.concatenate([start, target[:, :-1]], axis=1)
    if not packed:
        return Batch(
            source=source,
            source_segments=(source != PAD).astype(jnp.int32),
            target_in=jnp.where(real, before, PAD),
            target_out=target,
            target_segments=real.astype(jnp.int32),
            weights=real.astype(jnp.float32),
        )
    return Batch(
        source=source,
        source_segments=segment_ids(source),
        target_in=jnp.where(real, jnp.where(before == EOS, BOS, before), PAD),
        target_out=target,
        target_segments=segment_ids(target),
        weights=real.astype(jnp.float32),
        source_positions=positions(source),
        target_positions=positions(target),
    )


def segment_ids(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """1, 2, … for the examples of packed rows, 0 for padding."""
    ends = (tokens == EOS).astype(jnp.int32)
    return jnp.where(tokens != PAD, 1 + jnp.cumsum(ends, axis=1) - ends, 0)


def positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, … from the first token of each example of packed rows; 0 for padding."""
    index = jnp.arange(tokens.shape[1])
    first = jnp.pad(tokens[:, :-1] == EOS, ((0, 0), (1, 0)))
    place = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jnp.where(tokens != PAD, place, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dataset:
    """All rows of a split as two arrays: a pytree, to be passed to jitted functions.

    source: [rows, S] int32, each sequence with EOS at its end, padded at the end.
    target: [rows, T] int32, likewise.
    batch_size: rows per batch.
    packed: whether a row may hold several examples; see `packing.pack_rows`.
    """

    source: Array | np.ndarray
    target: Array | np.ndarray
    batch_size: int = field(metadata={"static": True})
    packed: bool = field(default=False, metadata={"static": True})

    @classmethod
    def from_rows(cls, rows: TokenRows, batch_size: int) -> "Dataset":
        """A dataset of all `rows`."""
        source, target = rows.take(np.arange(len(rows)))
        return cls(source, target, batch_size, rows.packed)

    def __len__(self) -> int:
        return self.source.shape[0]

    def longest(self) -> int:
        """The number of tokens in the longest source or target, EOS included."""
        return max(self.source.shape[1], self.target.shape[1])

    def head(self, rows: int) -> "Dataset":
        """The first `rows` examples, as one batch."""
        return Dataset(self.source[:rows], self.target[:rows], rows)

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        """The batch of a training step, counted from 0, for the data key of a run.

        Each epoch contains every row once, in a new order. A batch may span two epochs, so no row
        is dropped.
        """
        first = step.astype(jnp.uint32) * np.uint32(self.batch_size)
        place = first + jnp.arange(self.batch_size, dtype=jnp.uint32)
        epoch, within = place // np.uint32(len(self)), place % np.uint32(len(self))
        keys = jax.vmap(round_keys, (None, 0))(key, epoch)
        rows = jax.vmap(lambda index, k: permute(index, len(self), k))(within, keys)
        source, target = (
            constrain(tokens[rows], "batch", "length") for tokens in (self.source, self.target)
        )
        return make_batch(source, target, self.packed)

    def window(self, step: int) -> tuple["Dataset", int]:
        """The data to pass to jitted steps from `step` on, and the number of steps it is for."""
        return self, sys.maxsize

    def empty_window(self) -> "Dataset":
        """A window with the shapes of the others, for compilation."""
        return self

    def wait_share(self) -> float | None:
        """The fraction of windows since the last call that were not ready; None: not streamed."""
        return None

    def close(self) -> None:
        """Stops background workers, if any."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchWindow:
    """The rows of consecutive batches, made on the host; see `streaming`.

    With replicas, all arrays have a leading axis [replicas].

    source: [steps, B, S] int32, rows like those of a `Dataset`.
    target: [steps, B, T] int32, likewise.
    first: the first step.
    packed: whether a row may hold several examples.
    """

    source: Array | np.ndarray
    target: Array | np.ndarray
    first: Int[Array, "*replicas"] | np.ndarray
    packed: bool = field(metadata={"static": True})

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        """The batch of a step of this window; `key` is unused, as the rows are already drawn."""
        source, target = (
            constrain(tokens[step - self.first], "batch", "length")
            for tokens in (self.source, self.target)
        )
        return make_batch(source, target, self.packed)
