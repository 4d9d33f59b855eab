"""Batches: a batch is a pure function of (dataset, data key, step).

`Dataset` holds all rows on the devices. `streaming.StreamedDataset` has the same methods `batch`,
`window`, `empty_window`, `wait_share` and `close`, and returns the same batches.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from transformer.data.packing import TokenRows
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.parallel.mesh import constrain

Source = Int[Array, "B S"]
Target = Int[Array, "B T"]
ROUNDS = 6  # of the Feistel network
RoundKeys = UInt32[Array, "6"]


class Batch(NamedTuple):
    """The input of a train step; `transformer.__doc__` explains the fields."""

    source: Source
    source_segments: Source
    target_in: Target
    target_out: Target
    target_segments: Target
    weights: Float[Array, "B T"]
    source_positions: Source | None = None  # None: the index in the row, if it is unpacked
    target_positions: Target | None = None

    def inputs(self) -> dict[str, Any]:
        """The arguments of a call of the model."""
        given = self._asdict()
        return {name: given[name] for name in given if name not in ("target_out", "weights")}


def make_batch(source: Source, target: Target, packed: bool = False, start: int = BOS) -> Batch:
    """A batch of rows of tokens, each sequence with EOS at its end, padded at the end.

    A packed row may hold several examples: the k-th target belongs to the k-th source, and
    positions restart in each. `start` is what the decoder reads first.
    """
    real = target != PAD
    before = jnp.concatenate([jnp.full_like(target[:, :1], start), target[:, :-1]], axis=1)
    if packed:
        before = jnp.where(before == EOS, start, before)
    return Batch(
        source,
        _segment_ids(source, packed),
        jnp.where(real, before, PAD),
        target,
        _segment_ids(target, packed),
        real.astype(jnp.float32),
        *(map(_positions, (source, target)) if packed else ()),
    )


def _segment_ids(tokens: Target, packed: bool) -> Target:
    """1, 2, … for the examples of a row, 0 for padding."""
    if not packed:
        return (tokens != PAD).astype(jnp.int32)
    ends = (tokens == EOS).astype(jnp.int32)
    return jnp.where(tokens != PAD, 1 + jnp.cumsum(ends, axis=1) - ends, 0)


def _positions(tokens: Target) -> Target:
    """0, 1, … from the first token of each example of packed rows; 0 for padding."""
    index = jnp.arange(tokens.shape[1])
    first = jnp.pad(tokens[:, :-1] == EOS, ((0, 0), (1, 0)))
    place = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jnp.where(tokens != PAD, place, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dataset:
    """All rows of a split as two arrays: a pytree, to be passed to jitted functions."""

    source: Array | np.ndarray  # [rows, S] int32, each sequence with EOS, padded at the end
    target: Array | np.ndarray  # [rows, T] int32, likewise
    batch_size: int = field(metadata={"static": True})  # in rows
    packed: bool = field(default=False, metadata={"static": True})  # see `packing.pack_rows`
    start: int = field(default=BOS, metadata={"static": True})  # see `make_batch`

    @classmethod
    def from_rows(cls, rows: TokenRows, batch_size: int, start: int = BOS) -> "Dataset":
        return cls(*rows.take(np.arange(len(rows))), batch_size, rows.packed, start)

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
        # Replicated: devices that shared the draws would communicate in each round of its loop.
        return _placed(self, constrain(rows, None))

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
    """The rows of consecutive batches; see `streaming`. Replicas are a first axis of all arrays."""

    source: Array | np.ndarray  # [steps, B, S] int32, rows like those of a `Dataset`
    target: Array | np.ndarray  # [steps, B, T] int32, likewise
    first: Int[Array, "*replicas"] | np.ndarray  # the first step
    packed: bool = field(metadata={"static": True})
    start: int = field(default=BOS, metadata={"static": True})

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        """The batch of a step of this window; `key` is unused, as the rows are already drawn."""
        return _placed(self, step - self.first)


def _placed(data: Dataset | BatchWindow, index: Array) -> Batch:
    """The batch of these rows, sharded over the mesh."""
    source, target = (
        constrain(tokens[index], "batch", "length") for tokens in (data.source, data.target)
    )
    return make_batch(source, target, data.packed, data.start)


def round_keys(key: Array, epoch: UInt32[Array, ""]) -> RoundKeys:
    """The round keys of one epoch's permutation, for the data key of a run."""
    return jax.random.bits(jax.random.fold_in(key, epoch), (ROUNDS,), jnp.uint32)


def permute(index: UInt32[Array, ""], size: int, keys: RoundKeys) -> UInt32[Array, ""]:
    """The image of `index` under the random permutation of 0 … size - 1 with these round keys.

    Each element is computed on its own: no step stores or sorts an epoch. The permutation is a
    Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds `size`,
    applied until the result is below `size` (Black and Rogaway 2002).
    """
    first = _network(index, keys, size)
    return jax.lax.while_loop(lambda x: x >= size, lambda x: _network(x, keys, size), first)


def permute_numpy(
    index: Int[np.ndarray, "n"], size: int, keys: UInt32[np.ndarray, "n 6"]
) -> Int[np.ndarray, "n"]:
    """`permute` of each index with its own round keys, bit-identical in NumPy."""
    image = _network(index.astype(np.uint32), keys.T, size)
    while (outside := image >= size).any():
        image[outside] = _network(image[outside], keys[outside].T, size)
    return image.astype(np.int64)


def _network(x: Any, keys: Iterable[Any], size: int) -> Any:
    """The image of x under a Feistel network with one key per round, in uint32 of NumPy or JAX."""
    half = np.uint32(max(1, math.ceil(math.log2(max(size, 2)) / 2)))  # bits of a half
    mask = (np.uint32(1) << half) - np.uint32(1)
    left, right = x >> half, x & mask
    for key in keys:
        # The finaliser of MurmurHash3: every input bit affects every output bit.
        mixed = right ^ key
        mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint32(16))) & mask)
    return (left << half) | right
