"""Pairs of token sequences, and rows of training made of them: one pair a row, or several.

NumPy alone: the processes that make batches on the host import nothing else (`streaming`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt32

from transformer.data.feistel import half_width, network
from transformer.data.ragged import Ragged
from transformer.errors import UserError

OPEN = 64  # rows that `packed` still looks for room in


class Pairs(NamedTuple):
    """Sources, and their targets in the same order, as tokens with EOS at each end."""

    source: Ragged
    target: Ragged

    def sizes(self) -> Int[np.ndarray, "pairs 2"]:
        """Tokens of each source and its target."""
        return np.stack([self.source.lengths(), self.target.lengths()], axis=1)


@dataclass(frozen=True)
class Rows:
    """What `Dataset` holds as arrays, made when it is asked for.

    pairs: all there are.
    members: row → the numbers of its pairs, in their order.
    widths: tokens in a row's source and target, at most.
    packed: whether a row may hold several pairs.
    """

    pairs: Pairs
    members: Ragged
    widths: tuple[int, int]
    packed: bool

    def __len__(self) -> int:
        return len(self.members)

    def take(
        self, index: Int[np.ndarray, "taken"]
    ) -> tuple[Int[np.ndarray, "taken S"], Int[np.ndarray, "taken T"]]:
        """The sources and targets of some rows, each padded at its end."""
        own = self.members.take(index)
        source, target = (
            side.take(own.values).joined(own.lengths()).padded(width)
            for side, width in zip(self.pairs, self.widths, strict=True)
        )
        return source, target


def alone(pairs: Pairs, kept: Int[np.ndarray, "kept"] | None = None) -> Rows:
    """A pair a row; of `kept` pairs, or of all."""
    kept = np.arange(len(pairs.source)) if kept is None else kept
    source, target = pairs.sizes()[kept].max(0, initial=1).tolist()
    members = Ragged(kept.astype(np.int32), np.arange(len(kept) + 1))
    return Rows(pairs, members, (source, target), packed=False)


def pack(rows: Rows, length: int) -> Rows:
    """The pairs of `rows`, as many in each row of `length` tokens as fit.

    They go, in an order that depends on their number alone, into the first of the `OPEN` youngest
    rows that has room for source and target. What lies together does so in every epoch, so that a
    batch stays a function of its number.

    Args:
      rows: a pair each.
      length: tokens in a packed row's source, and in its target.

    Raises:
      UserError: an example is longer than a row.
    """
    if max(rows.widths) > length:
        raise UserError(
            f"data.pack_length={length}: the longest example has {max(rows.widths)} tokens, its "
            "end included; raise it to that, or to 0 for an example a row; data.max_length "
            "leaves longer ones out"
        )
    pairs = rows.members.values
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    place = first_fit(rows.pairs.sizes()[pairs[order]], length)
    # A stable sort: the pairs of a row stay in the order in which they came to it.
    members = pairs[order[np.argsort(place, kind="stable")]]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(place))])
    return Rows(rows.pairs, Ragged(members, offsets), (length, length), packed=True)


def first_fit(sizes: Int[np.ndarray, "pairs 2"], length: int) -> Int[np.ndarray, "pairs"]:
    """The row of each pair; see `pack`."""
    place = np.empty(len(sizes), np.int64)
    room = np.zeros((0, 2), int)  # of the open rows, which are the youngest
    opened = 0
    for pair, size in enumerate(sizes):
        fits = np.flatnonzero((room >= size).all(1))
        if fits.size:
            which = fits[0]
        else:
            room = np.concatenate([room, [[length, length]]])[-OPEN:]
            opened += 1
            which = len(room) - 1
        room[which] -= size
        place[pair] = opened - len(room) + which
    return place


class Batches:
    """The batches of the steps of training as NumPy arrays, each by its number.

    They hold what `Dataset.batch` gives on the device, whoever makes them, in whichever order.

    Args:
      rows: what they are made of.
      batch_size: rows a batch.
      keys: of each replica and epoch, from `epoch` on, the keys of its permutation.
      epoch: the first that there are keys of.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        keys: UInt32[np.ndarray, "replicas epochs 6"],
        epoch: int,
    ):
        self.rows, self.batch_size, self.keys, self.epoch = rows, batch_size, keys, epoch

    def __len__(self) -> int:
        return (self.epoch + self.keys.shape[1]) * len(self.rows) // self.batch_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources and targets of a step, from 0: [replicas, B, S] and [replicas, B, T]."""
        place = index * self.batch_size + np.arange(self.batch_size)
        epoch, within = np.divmod(place, len(self.rows))
        found = [
            self.rows.take(permuted(within, len(self.rows), keys[epoch - self.epoch]))
            for keys in self.keys
        ]
        source, target = (np.stack(side) for side in zip(*found, strict=True))
        return source, target


def permuted(
    index: Int[np.ndarray, "n"], size: int, keys: UInt32[np.ndarray, "n 6"]
) -> Int[np.ndarray, "n"]:
    """`feistel.permute` of each index under its own keys, in NumPy."""
    half = half_width(size)
    place = network(index.astype(np.uint32), keys.T, half)
    while (outside := place >= size).any():
        place[outside] = network(place[outside], keys[outside].T, half)
    return place.astype(np.int64)


def learnable(pairs: Pairs, longest: int) -> tuple[Int[np.ndarray, "kept"], dict[str, int]]:
    """The numbers of the pairs that one can learn from, and how many others there are, and why.

    Args:
      pairs: all there are.
      longest: tokens that a text may have, its end included; 0: as many as it likes.

    Raises:
      UserError: none is left.
    """
    sizes = pairs.sizes()
    empty = sizes.min(1) <= 1
    long = (sizes.max(1) > longest) & ~empty if longest else np.zeros_like(empty)
    counts = {"with an empty text": empty, f"with a text of more than {longest} tokens": long}
    counts = {reason: int(mask.sum()) for reason, mask in counts.items() if mask.any()}
    (kept,) = np.nonzero(~(empty | long))
    if not kept.size:
        raise UserError(
            f"data.max_length={longest}: no example is left, {said(counts)} being left out; "
            "raise it, "
            "or set it to 0"
        )
    return kept, counts


def said(counts: dict[str, int]) -> str:
    """`3 with an empty text, 1 with a text of more than 128 tokens`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
