"""A split that lives on the device, and batches of it as a pure function of (key, step)."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from transformer.data.tokenizer import BOS, PAD
from transformer.sharding import constrain


class Batch(NamedTuple):
    """What a step reads; the nouns are explained in `transformer`."""

    source: Int[Array, "B S"]
    source_segments: Int[Array, "B S"]
    target_in: Int[Array, "B T"]
    target_out: Int[Array, "B T"]
    target_segments: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def make_batch(source: Int[Array, "B S"], target: Int[Array, "B T"]) -> Batch:
    """One example a row: `target` ends with EOS, and both are padded at their end."""
    real = target != PAD
    start = jnp.full_like(target[:, :1], BOS)
    return Batch(
        source=source,
        source_segments=(source != PAD).astype(jnp.int32),
        target_in=jnp.where(real, jnp.concatenate([start, target[:, :-1]], axis=1), PAD),
        target_out=target,
        target_segments=real.astype(jnp.int32),
        weights=real.astype(jnp.float32),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dataset:
    """A split as two arrays of tokens: a pytree that jitted functions take as an argument.

    source: [examples, S] int32, EOS at each end, then padding.
    target: [examples, T] int32, likewise.
    batch_size: examples a batch.
    """

    source: Array | np.ndarray
    target: Array | np.ndarray
    batch_size: int = field(metadata={"static": True})

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
        keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(epoch)
        rows = jax.vmap(lambda index, k: permute(index, len(self), k))(within, keys)
        source, target = (
            constrain(tokens[rows], "batch", "length") for tokens in (self.source, self.target)
        )
        return make_batch(source, target)


def permute(index: UInt32[Array, ""], size: int, key: Array) -> UInt32[Array, ""]:
    """Where the random permutation of 0 … size - 1 that `key` stands for sends `index`.

    A permutation that is computed an element at a time, so that a batch costs its own
    size and no step holds or sorts a whole epoch. It is a Feistel network (Luby and
    Rackoff 1988) of six rounds over the smallest even number of bits that holds
    `size`, walked until it lands below `size` (Black and Rogaway 2002).
    """
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    low = np.uint32((1 << half) - 1)
    round_keys = jax.random.bits(key, (6,), jnp.uint32)

    def mix(x):
        # The finaliser of MurmurHash3: every bit of x reaches every bit of the result.
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def network(x):
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        return (left << half) | right

    return jax.lax.while_loop(lambda x: x >= size, network, network(index))
