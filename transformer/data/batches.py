"""A split that lives on the device, and batches of it as a pure function of (key, step)."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from transformer.data.feistel import ROUNDS, half_width, network
from transformer.data.rows import Rows
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.parallel.mesh import constrain


class Batch(NamedTuple):
    """What a step reads; the nouns are explained in `transformer`.

    Positions are None where a row holds one example: a token then stands where it is.
    """

    source: Int[Array, "B S"]
    source_segments: Int[Array, "B S"]
    target_in: Int[Array, "B T"]
    target_out: Int[Array, "B T"]
    target_segments: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    source_positions: Int[Array, "B S"] | None = None
    target_positions: Int[Array, "B T"] | None = None


def make_batch(source: Int[Array, "B S"], target: Int[Array, "B T"], packed: bool = False) -> Batch:
    """Examples a row: each source and each target ends with EOS, rows are padded at their end.

    Args:
      source: one source a row; packed, as many as fit, one after another.
      target: their targets in the same order.
      packed: whether a row may hold several. Segment k of a target then belongs to segment
        k of its row's source, and positions start anew in each.
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
        source_segments=segments(source),
        target_in=jnp.where(real, jnp.where(before == EOS, BOS, before), PAD),
        target_out=target,
        target_segments=segments(target),
        weights=real.astype(jnp.float32),
        source_positions=positions(source),
        target_positions=positions(target),
    )


def segments(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Of packed rows: 1, 2, … for the tokens up to each EOS, 0 for padding."""
    ends = (tokens == EOS).astype(jnp.int32)
    return jnp.where(tokens != PAD, 1 + jnp.cumsum(ends, axis=1) - ends, 0)


def positions(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Of packed rows: 0, 1, … from the first token of each segment; 0 for padding."""
    index = jnp.arange(tokens.shape[1])
    first = jnp.pad(tokens[:, :-1] == EOS, ((0, 0), (1, 0)))
    place = index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jnp.where(tokens != PAD, place, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dataset:
    """A split as two arrays of tokens: a pytree that jitted functions take as an argument.

    source: [rows, S] int32, EOS at each end, then padding.
    target: [rows, T] int32, likewise.
    batch_size: rows a batch.
    packed: whether a row may hold several examples; see `rows.pack`.
    """

    source: Array | np.ndarray
    target: Array | np.ndarray
    batch_size: int = field(metadata={"static": True})
    packed: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, rows: Rows, batch_size: int) -> "Dataset":
        """All of `rows`."""
        source, target = rows.take(np.arange(len(rows)))
        return cls(source, target, batch_size, rows.packed)

    def __len__(self) -> int:
        return self.source.shape[0]

    def longest(self) -> int:
        """Tokens in the longest source or target, EOS included."""
        return max(self.source.shape[1], self.target.shape[1])

    def head(self, rows: int) -> "Dataset":
        """The first `rows` examples, as one batch."""
        return Dataset(self.source[:rows], self.target[:rows], rows)

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        """The batch of training step `step` (from 0): an endless walk, shuffled anew each epoch.

        Epochs follow each other without a gap, so each example comes exactly once in
        each of them, whatever the batch size.
        """
        first = step.astype(jnp.uint32) * np.uint32(self.batch_size)
        place = first + jnp.arange(self.batch_size, dtype=jnp.uint32)
        epoch, within = place // np.uint32(len(self)), place % np.uint32(len(self))
        keys = jax.vmap(epoch_key, (None, 0))(key, epoch)
        rows = jax.vmap(lambda index, k: permute(index, len(self), k))(within, keys)
        source, target = (
            constrain(tokens[rows], "batch", "length") for tokens in (self.source, self.target)
        )
        return make_batch(source, target, self.packed)


def permute(index: UInt32[Array, ""], size: int, key: Array) -> UInt32[Array, ""]:
    """Where the random permutation of 0 … size - 1 that `key` stands for sends `index`."""
    keys, half = round_keys(key), half_width(size)
    return jax.lax.while_loop(
        lambda x: x >= size, lambda x: network(x, keys, half), network(index, keys, half)
    )


def round_keys(key: Array) -> UInt32[Array, "6"]:
    """The keys of the permutation that `key` stands for."""
    return jax.random.bits(key, (ROUNDS,), jnp.uint32)


def epoch_key(key: Array, epoch: UInt32[Array, ""]) -> Array:
    """The key of an epoch's order."""
    return jax.random.fold_in(key, epoch)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The batches of some steps that follow each other, made on the host; see `streaming`.

    Of a population all arrays have a first axis more, [replicas].

    source: [steps, B, S] int32, rows as those of a `Dataset`.
    target: [steps, B, T] int32, likewise.
    first: the number of the first step.
    packed: whether a row may hold several examples.
    """

    source: Array | np.ndarray
    target: Array | np.ndarray
    first: Int[Array, "*replicas"] | np.ndarray
    packed: bool = field(metadata={"static": True})

    def batch(self, key: Array, step: Int[Array, ""]) -> Batch:
        """The batch of training step `step`, which is one of these; `key` made it already."""
        source, target = (
            constrain(tokens[step - self.first], "batch", "length")
            for tokens in (self.source, self.target)
        )
        return make_batch(source, target, self.packed)
