"""Training rows: one example per row (unpacked) or as many as fit (packed)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from transformer.data.ragged import RaggedArray, TokenPairs
from transformer.errors import UserError

Sides = tuple[Int[np.ndarray, "*B S"], Int[np.ndarray, "*B T"]]  # sources and targets, int32
OPEN_ROWS = 64  # newest rows in which `_first_fit` looks for room


@dataclass(frozen=True)
class TokenRows:
    """Padded rows of tokens on the host, built on demand."""

    pairs: TokenPairs  # all examples
    members: RaggedArray  # row → the indices of its examples, in order
    widths: tuple[int, int]  # the most tokens in the source and in the target of a row
    packed: bool  # whether a row may hold several examples

    def __len__(self) -> int:
        return len(self.members)

    def take(self, index: Int[np.ndarray, "taken"]) -> Sides:
        """The sources and the targets of some rows, each padded at the end."""
        members = self.members.take(index)
        taken = (side.take(members.values) for side in self.pairs)
        joined = (
            RaggedArray(side.values, np.diff(side.offsets[members.offsets])) for side in taken
        )
        source, target = map(RaggedArray.to_padded, joined, self.widths)
        return source, target


def unpacked_rows(pairs: TokenPairs, kept: Int[np.ndarray, "kept"] | None = None) -> TokenRows:
    """One example per row: those with the indices `kept`, or all."""
    kept = np.arange(len(pairs.source)) if kept is None else kept
    source, target = pairs.lengths()[kept].max(0, initial=1).tolist()
    members = RaggedArray(kept.astype(np.int32), np.ones_like(kept))
    return TokenRows(pairs, members, (source, target), packed=False)


def pack_rows(rows: TokenRows, length: int) -> TokenRows:
    """Packs the examples of unpacked rows into rows of `length` tokens.

    The order in which they are placed depends only on their number. A row has the same examples in
    every epoch, so that a batch remains a function of its step.
    """
    if (longest := max(rows.widths)) > length:
        raise UserError(
            f"data.pack_length={length}: the longest example has {longest} tokens (EOS included); "
            "set pack_length to that or more, to 0 for one example per row, or data.max_length to "
            "leave out longer examples"
        )
    examples = rows.members.values
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    row_of = _first_fit(rows.pairs.lengths()[examples[order]], length)
    # A stable sort: the examples of a row stay in the order in which they were placed.
    members = examples[order[np.argsort(row_of, kind="stable")]]
    packed = RaggedArray(members, np.bincount(row_of))
    return TokenRows(rows.pairs, packed, (length, length), packed=True)


def _first_fit(lengths: Int[np.ndarray, "pairs 2"], capacity: int) -> Int[np.ndarray, "pairs"]:
    """The row of each pair: the first of the newest `OPEN_ROWS` with room for source and target."""
    row_of = np.empty(len(lengths), np.int64)
    room = np.zeros((0, 2), int)  # in the open rows
    opened = 0
    for pair, size in enumerate(lengths):
        fits = np.flatnonzero((room >= size).all(1))
        if not fits.size:
            room = np.concatenate([room, [[capacity, capacity]]])[-OPEN_ROWS:]
            opened += 1
        which = fits[0] if fits.size else len(room) - 1
        room[which] -= size
        row_of[pair] = opened - len(room) + which
    return row_of


def filter_by_length(pairs: TokenPairs, max_length: int) -> tuple[Int[np.ndarray, "kept"], str]:
    """The indices of the examples to train on, and a text that counts those left out.

    A source or a target may have `max_length` tokens, EOS included; 0: no limit.
    """
    lengths = pairs.lengths()
    empty = lengths.min(1) <= 1
    long = (lengths.max(1) > max_length) & ~empty & (max_length > 0)
    masks = {"with an empty text": empty, f"with a text of more than {max_length} tokens": long}
    left_out = ", ".join(f"{mask.sum():,} {why}" for why, mask in masks.items() if mask.any())
    kept = np.flatnonzero(~(empty | long))
    if not kept.size:
        raise UserError(
            f"data.max_length={max_length} leaves no training example ({left_out}); "
            "raise it, or set it to 0"
        )
    return kept, left_out
