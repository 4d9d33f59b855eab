"""Rows of unequal length, one after another in one array."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import PAD


class Ragged(NamedTuple):
    """Row i is `values[offsets[i] : offsets[i + 1]]`.

    values: all rows, joined; of a large corpus a file in the place of memory.
    offsets: int64, one more than there are rows.
    """

    values: Int[np.ndarray, "values"]
    offsets: Int[np.ndarray, "rows+1"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """Of lists, as int32."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int32, offsets[-1])
        return cls(values, offsets)

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
