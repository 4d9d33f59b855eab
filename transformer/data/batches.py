"""A split that lives on the device, and batches of it as a pure function of (key, step)."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.errors import UserError
from transformer.sharding import constrain

OPEN = 64  # rows that `pack` still looks for room in


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
    packed: whether a row may hold several examples; see `pack`.
    """

    source: Array | np.ndarray
    target: Array | np.ndarray
    batch_size: int = field(metadata={"static": True})
    packed: bool = field(default=False, metadata={"static": True})

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
        return make_batch(source, target, self.packed)


def pack(data: Dataset, length: int) -> Dataset:
    """`data` with as many examples in each row of `length` tokens as fit.

    Examples go, in an order that depends on their number alone, into the first of the
    `OPEN` youngest rows that has room for source and target. What lies together does so in every
    epoch, so that a batch stays a function of its number.

    Raises:
      UserError: an example is longer than a row.
    """
    if data.longest() > length:
        raise UserError(
            f"data.pack={length}: the longest example has {data.longest()} tokens, its end "
            "included; raise it to that, or to 0 for an example a row"
        )
    source, target = np.asarray(data.source), np.asarray(data.target)
    sizes = np.stack([(source != PAD).sum(1), (target != PAD).sum(1)], axis=1)
    rows: list[list[int]] = []
    room = np.zeros((0, 2), int)  # of the open rows, the last ones of `rows`
    for example in np.random.default_rng(len(data)).permutation(len(data)).tolist():
        fits = np.flatnonzero((room >= sizes[example]).all(1))
        if fits.size:
            place = fits[0]
            rows[place - len(room)].append(example)
        else:
            room = np.concatenate([room, [[length, length]]])[-OPEN:]
            rows.append([example])
            place = len(room) - 1
        room[place] -= sizes[example]
    return Dataset(
        source=packed_rows(source, rows, length),
        target=packed_rows(target, rows, length),
        batch_size=data.batch_size,
        packed=True,
    )


def packed_rows(
    tokens: Int[np.ndarray, "examples _"], rows: list[list[int]], length: int
) -> Int[np.ndarray, "rows {length}"]:
    """The tokens of each row's examples, one after another, then padding."""
    packed = np.full((len(rows), length), PAD, tokens.dtype)
    for into, row in zip(packed, rows, strict=True):
        together = tokens[row][tokens[row] != PAD]
        into[: len(together)] = together
    return packed


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
