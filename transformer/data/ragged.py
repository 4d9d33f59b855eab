"""Token sequences of unequal length, in memory or in files with checksums."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import PAD
from transformer.files import checksum, temporary

MANIFEST = "manifest.json"


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

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        """Pickles mapped files by name: worker processes map them again."""
        if isinstance(self.values, np.memmap):
            return _map_rows, (str(self.values.filename).removesuffix(".values"),)
        return RaggedArray, (self.values, self.lengths())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Int[np.ndarray, "rows"]:
        return np.diff(self.offsets)

    def take(self, index: Int[np.ndarray, "taken"]) -> "RaggedArray":
        """The rows with these indices."""
        first = self.offsets[index]
        lengths = self.offsets[index + 1] - first
        shift = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
        return RaggedArray(self.values[np.arange(len(shift)) + shift], lengths)

    def to_padded(self, width: int) -> Int[np.ndarray, "rows {width}"]:
        """An int32 array of the rows, padded at the end."""
        tokens = np.full((len(self), width), PAD, np.int32)
        tokens[np.arange(width) < self.lengths()[:, None]] = self.values
        return tokens


def _map_rows(path: str) -> RaggedArray:
    """The rows of a side of `cached_pairs`; only the values that are accessed are read."""
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
        return TokenPairs(*map(_concatenate, sides))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _concatenate(parts: Sequence[RaggedArray]) -> RaggedArray:
    values, lengths = zip(*((part.values, part.lengths()) for part in parts), strict=True)
    return RaggedArray(np.concatenate(values), np.concatenate(lengths))


def _map_pairs(folder: Path) -> TokenPairs:
    return TokenPairs(*(_map_rows(str(folder / side)) for side in TokenPairs._fields))


def _checksums(folder: Path) -> dict[str, list[int]]:
    sides = itertools.product(TokenPairs._fields, ("values", "lengths"))
    return {f"{side}.{kind}": checksum(folder / f"{side}.{kind}") for side, kind in sides}
