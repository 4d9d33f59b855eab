"""Tokens in files beside their dataset: made once, and from then on read as memory is.

A folder of int32 tokens and int64 offsets for each side, and of their checksums, which are
verified when it is opened. Files that are damaged are made again.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from transformer.data.ragged import Ragged, mapped
from transformer.data.rows import Pairs
from transformer.files import checksum, unfinished

MANIFEST = "manifest.json"


def stored(folder: Path, make: Callable[[], Iterable[Pairs]]) -> Pairs:
    """The pairs in `folder`, or those that `make` gives in parts, which are kept there.

    Where nothing can be kept, as among datasets of others or on a full disk, they are in memory.
    """
    with contextlib.suppress(FileNotFoundError):
        if intact(folder):
            return opened(folder)
        print(f"{folder} is damaged; it is made again")
        shutil.rmtree(folder, ignore_errors=True)
    fresh = unfinished(folder)
    try:
        write(fresh, make())
        with contextlib.suppress(OSError):  # another process was sooner
            fresh.rename(folder)
        return opened(folder)
    except OSError:
        parts = list(make())
        return Pairs(*(Ragged.joining(list(side)) for side in zip(*parts, strict=True)))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def paths(folder: Path, side: str) -> tuple[Path, Path]:
    """Where a side's values and offsets are."""
    return folder / f"{side}.values", folder / f"{side}.offsets"


def opened(folder: Path) -> Pairs:
    """The pairs of a folder."""
    return Pairs(*(mapped(*paths(folder, side)) for side in Pairs._fields))


def intact(folder: Path) -> bool:
    """Whether the files of a folder are as they were written.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return record == checksums(folder)
    except (OSError, ValueError):
        return False


def checksums(folder: Path) -> dict[str, list[int]]:
    """Of each file of a folder."""
    files = (path for side in Pairs._fields for path in paths(folder, side))
    return {path.name: checksum(path) for path in files}


def write(folder: Path, parts: Iterable[Pairs]) -> None:
    """Writes pairs that come in parts, of which one is in memory at a time."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files = [
            [stack.enter_context(path.open("wb")) for path in paths(folder, side)]
            for side in Pairs._fields
        ]
        ends = np.zeros(len(files), np.int64)
        for _, offsets in files:
            offsets.write(np.zeros(1, np.int64).tobytes())
        for part in parts:
            for which, ((values, offsets), side) in enumerate(zip(files, part, strict=True)):
                values.write(side.values.astype(np.int32).tobytes())
                offsets.write((side.offsets[1:] + ends[which]).astype(np.int64).tobytes())
                ends[which] += side.offsets[-1]
    (folder / MANIFEST).write_text(json.dumps(checksums(folder)), encoding="utf-8")


def in_parts(count: int, size: int) -> Iterator[range]:
    """0 … count - 1, so many at a time."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
