"""Token sequences of unequal length, in memory or in files, and the training rows made of them.

A row holds one example (unpacked) or as many as fit (packed).
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import PAD
from transformer.errors import UserError
from transformer.files import checksum, temporary

MANIFEST = "manifest.json"
Sides = tuple[Int[np.ndarray, "*B S"], Int[np.ndarray, "*B T"]]  # sources and targets, int32
OPEN_ROWS = 64  # newest rows in which `_first_fit` looks for room


class RaggedArray:
    """Rows of the given lengths, cut in order from int32 values, which may be a mapped file."""

    def __init__(self, values: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "rows"]):
        self.values = values
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])  # row i begins at offsets[i]

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> "RaggedArray":
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum())
        return cls(values, lengths)

    @classmethod
    def concatenate(cls, parts: Sequence["RaggedArray"]) -> "RaggedArray":
        values, lengths = zip(*((part.values, part.lengths()) for part in parts), strict=True)
        return cls(np.concatenate(values), np.concatenate(lengths))

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        """Pickles mapped files by name: worker processes map them again."""
        if isinstance(self.values, np.memmap):
            return map_files, (str(self.values.filename).removesuffix(".values"),)
        return RaggedArray, (self.values, self.lengths())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Int[np.ndarray, "rows"]:
        return np.diff(self.offsets)

    def take(self, index: Int[np.ndarray, "taken"]) -> "RaggedArray":
        first = self.offsets[index]
        lengths = self.offsets[index + 1] - first
        shift = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
        return RaggedArray(self.values[np.arange(len(shift)) + shift], lengths)

    def to_padded(self, width: int) -> Int[np.ndarray, "rows {width}"]:
        """An int32 array of the rows, padded at the end."""
        tokens = np.full((len(self), width), PAD, np.int32)
        tokens[np.arange(width) < self.lengths()[:, None]] = self.values
        return tokens


def map_files(path: str) -> RaggedArray:
    """A side of `cached_pairs`; only the values that are accessed are read."""
    values = np.memmap(f"{path}.values", np.int32, "r")
    return RaggedArray(values, np.fromfile(f"{path}.lengths", np.int32))


class TokenPairs(NamedTuple):
    """Tokenized sources and their targets in the same order; each sequence ends with EOS."""

    source: RaggedArray
    target: RaggedArray

    def lengths(self) -> Int[np.ndarray, "pairs 2"]:
        """The numbers of tokens of each source and its target, EOS included."""
        return np.stack([self.source.lengths(), self.target.lengths()], axis=1)


def cached_pairs(folder: Path, tokenize: Callable[[], Iterable[TokenPairs]]) -> TokenPairs:
    """The pairs stored in `folder`, or those that `tokenize()` yields, which are then stored there.

    Checksums are verified at each call, and a damaged folder is rewritten. If `folder` cannot be
    written (a read-only dataset, a full disk), the pairs are kept in memory.
    """
    if folder.is_dir():
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == _checksums(folder):
                return _map_pairs(folder)
        print(f"{folder} is damaged and is written again")
        shutil.rmtree(folder, ignore_errors=True)
    fresh = temporary(folder)
    try:
        fresh.mkdir(parents=True)
        for chunk in tokenize():
            for side, rows in chunk._asdict().items():
                for kind, numbers in (("values", rows.values), ("lengths", rows.lengths())):
                    with (fresh / f"{side}.{kind}").open("ab") as file:
                        file.write(numbers.astype(np.int32).tobytes())
        (fresh / MANIFEST).write_text(json.dumps(_checksums(fresh)), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process has finished first
            fresh.rename(folder)
        return _map_pairs(folder)
    except OSError:
        sides = zip(*tokenize(), strict=True)
        return TokenPairs(*map(RaggedArray.concatenate, sides))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _map_pairs(folder: Path) -> TokenPairs:
    return TokenPairs(*(map_files(str(folder / side)) for side in TokenPairs._fields))


def _checksums(folder: Path) -> dict[str, list[int]]:
    sides = itertools.product(TokenPairs._fields, ("values", "lengths"))
    return {f"{side}.{kind}": checksum(folder / f"{side}.{kind}") for side, kind in sides}


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
        joined = (RaggedArray(x.values, np.diff(x.offsets[members.offsets])) for x in taken)
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
        found = f"the longest example has {longest} tokens (EOS included)"
        knobs = "set pack_length to that or more, to 0 for one example per row, or data.max_length"
        raise UserError(f"data.pack_length={length}: {found}; {knobs} to leave out longer examples")
    examples = rows.members.values
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    row_of = _first_fit(rows.pairs.lengths()[examples[order]], length)
    # A stable sort: the examples of a row stay in the order in which they were placed.
    members = examples[order[np.argsort(row_of, kind="stable")]]
    packed = RaggedArray(members, np.bincount(row_of))
    return TokenRows(rows.pairs, packed, (length, length), packed=True)


def _first_fit(lengths: Int[np.ndarray, "pairs 2"], capacity: int) -> Int[np.ndarray, "pairs"]:
    """The row of each pair: the first of the newest `OPEN_ROWS` with room for source and target.

    One integer holds the room in all open rows, the oldest in its lowest bits, so that a single
    subtraction compares a pair with all of them. A row has a field for the source and one for the
    target; a field's highest bit is set, and subtracting more than the room below it clears it.
    """
    field = capacity.bit_length() + 1  # in bits
    width = 2 * field
    every_row = sum(1 << width * row for row in range(OPEN_ROWS))
    flags = every_row << field - 1  # the highest bits of the source fields
    room = flags | flags << field  # rows not yet opened are full
    newest = width * (OPEN_ROWS - 1)
    empty_row = (capacity | 1 << field - 1) * (1 | 1 << field) << newest
    row_of, opened = [], 0
    for size in (lengths @ [1, 1 << field]).tolist():
        left = room - size * every_row
        if fits := left & left >> field & flags:
            place = (fits & -fits).bit_length() - field  # of the lowest bit set
        else:
            room, place = room >> width | empty_row, newest
            opened += 1
        room -= size << place
        row_of.append(opened - OPEN_ROWS + place // width)
    return np.array(row_of, np.int64)


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
        fault = f"data.max_length={max_length} leaves no training example ({left_out})"
        raise UserError(f"{fault}; raise it, or set it to 0")
    return kept, left_out
