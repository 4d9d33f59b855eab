"""Token sequences of unequal length, in memory or in files with checksums."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizer import PAD
from transformer.files import checksum, temporary

MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class RaggedArray:
    """Rows of unequal length: row i is `values[offsets[i] : offsets[i + 1]]`.

    values: int32, the concatenated rows; may be a memory-mapped file.
    offsets: int64, one more than there are rows; likewise.
    """

    values: Int[np.ndarray, "values"]
    offsets: Int[np.ndarray, "ends"]

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> "RaggedArray":
        """Rows of these lengths, cut from `values` in order."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]))

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> "RaggedArray":
        """One row per list."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum())
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_padded(cls, tokens: Int[np.ndarray, "rows width"]) -> "RaggedArray":
        """The rows of `tokens` without their trailing padding."""
        real = tokens != PAD
        return cls.from_lengths(tokens[real], real.sum(1))

    @classmethod
    def concatenate(cls, parts: Iterable["RaggedArray"]) -> "RaggedArray":
        """The rows of all parts."""
        parts = list(parts)
        lengths = np.concatenate([part.lengths() for part in parts])
        return cls.from_lengths(np.concatenate([part.values for part in parts]), lengths)

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        """Pickles memory-mapped files by name: worker processes map them again."""
        if isinstance(self.values, np.memmap) and isinstance(self.offsets, np.memmap):
            return map_files, (self.values.filename, self.offsets.filename)
        return RaggedArray, (self.values, self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Int[np.ndarray, "rows"]:
        """The length of each row."""
        return np.diff(self.offsets)

    def take(self, index: Int[np.ndarray, "taken"]) -> "RaggedArray":
        """The rows with these indices."""
        first = self.offsets[index]
        lengths = self.offsets[index + 1] - first
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return RaggedArray(self.values[np.repeat(first, lengths) + within], offsets)

    def to_padded(self, width: int) -> Int[np.ndarray, "rows {width}"]:
        """An int32 array of the rows, padded at the end."""
        tokens = np.full((len(self), width), PAD, np.int32)
        tokens[np.arange(width) < self.lengths()[:, None]] = self.values
        return tokens

    def merge_rows(self, counts: Int[np.ndarray, "groups"]) -> "RaggedArray":
        """Joins the first counts[0] rows into one, the next counts[1] into the next, and so on."""
        return RaggedArray(self.values, self.offsets[np.concatenate([[0], np.cumsum(counts)])])


def map_files(values: Path, offsets: Path) -> RaggedArray:
    """Memory-mapped files of int32 and int64; only what is accessed is read."""
    return RaggedArray(np.memmap(values, np.int32, "r"), np.memmap(offsets, np.int64, "r"))


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
        if is_intact(folder):
            return TokenPairs(*(map_files(*side) for side in pair_files(folder)))
        print(f"{folder} is damaged and is written again")
        shutil.rmtree(folder, ignore_errors=True)
    fresh = temporary(folder)
    try:
        write_pairs(fresh, tokenize())
        with contextlib.suppress(OSError):  # another process has finished first
            fresh.rename(folder)
        return TokenPairs(*(map_files(*side) for side in pair_files(folder)))
    except OSError:
        return TokenPairs(*map(RaggedArray.concatenate, zip(*tokenize(), strict=True)))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def pair_files(folder: Path) -> list[tuple[Path, Path]]:
    """The files of values and of offsets of each side."""
    return [(folder / f"{side}.values", folder / f"{side}.offsets") for side in TokenPairs._fields]


def checksums(folder: Path) -> dict[str, list[int]]:
    """File name → checksum."""
    return {path.name: checksum(path) for side in pair_files(folder) for path in side}


def is_intact(folder: Path) -> bool:
    """Whether the files of a folder are as they were written."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return record == checksums(folder)
    except (OSError, ValueError):
        return False


def write_pairs(folder: Path, chunks: Iterable[TokenPairs]) -> None:
    """Writes pairs that come in chunks, and their manifest."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files = [
            [stack.enter_context(path.open("wb")) for path in side] for side in pair_files(folder)
        ]
        ends = [0] * len(files)
        for _, offsets in files:
            offsets.write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            for k, ((values, offsets), side) in enumerate(zip(files, chunk, strict=True)):
                values.write(side.values.astype(np.int32).tobytes())
                offsets.write((side.offsets[1:] + ends[k]).astype(np.int64).tobytes())
                ends[k] += int(side.offsets[-1])
    (folder / MANIFEST).write_text(json.dumps(checksums(folder)), encoding="utf-8")


def chunk_ranges(count: int, size: int) -> Iterator[range]:
    """Ranges of at most `size` that cover 0 … count - 1."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
