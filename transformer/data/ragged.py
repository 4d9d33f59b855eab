"""Rows of unequal length, one after another in one array."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import PAD


@dataclass(frozen=True, eq=False)
class Ragged:
    """Row i is `values[offsets[i] : offsets[i + 1]]`.

    values: all rows, joined; of a large corpus a file in the place of memory.
    offsets: int64, one more than there are rows.
    """

    values: Int[np.ndarray, "values"]
    offsets: Int[np.ndarray, "ends"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """Of lists, as int32."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int32, offsets[-1])
        return cls(values, offsets)

    @classmethod
    def unpadded(cls, tokens: Int[np.ndarray, "rows width"]) -> "Ragged":
        """Of rows that are padded at their end."""
        real = tokens != PAD
        return cls(tokens[real], np.concatenate([[0], np.cumsum(real.sum(1))]))

    @classmethod
    def joining(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of each, one after another."""
        lengths = np.concatenate([part.lengths() for part in parts])
        values = np.concatenate([part.values for part in parts])
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]))

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        """Files go to another process as their names."""
        if isinstance(self.values, np.memmap) and isinstance(self.offsets, np.memmap):
            return mapped, (self.values.filename, self.offsets.filename)
        return Ragged, (self.values, self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Of all rows."""
        return np.diff(self.offsets)

    def take(self, index: Int[np.ndarray, "taken"]) -> "Ragged":
        """Some of the rows."""
        first = self.offsets[index]
        lengths = self.offsets[index + 1] - first
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(first, lengths) + within], offsets)

    def padded(self, width: int) -> Int[np.ndarray, "rows {width}"]:
        """A row each, int32, padded at the end."""
        tokens = np.full((len(self), width), PAD, np.int32)
        tokens[np.arange(width) < self.lengths()[:, None]] = self.values
        return tokens

    def joined(self, counts: Int[np.ndarray, "groups"]) -> "Ragged":
        """The first counts[0] rows as one, the next counts[1] as one, and so on."""
        return Ragged(self.values, self.offsets[np.concatenate([[0], np.cumsum(counts)])])


def mapped(values: Path, offsets: Path) -> Ragged:
    """In two files, of int32 and of int64, of which only what is looked at is read."""
    return Ragged(np.memmap(values, np.int32, "r"), np.memmap(offsets, np.int64, "r"))
