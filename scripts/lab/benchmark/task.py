"""The task: reverse strings, at a few sizes. Imports NumPy alone, so that a peer loads no JAX."""

import random
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAD, BOS, EOS, FIRST = 0, 1, 2, 3  # as `transformer.data.tokenizer` numbers them; the first symbol
SYMBOLS = sorted(string.ascii_letters + string.digits)[:60]  # what strings consist of
VOCABULARY = 64  # with the unknown symbol of `SymbolTokenizer`
HELD_OUT = 1_000  # strings that are not in the training set
POOL = 10  # batches whose strings are sorted together by length


@dataclass(frozen=True)
class Size:
    """A model, the strings that it reverses, and how it is trained."""

    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int  # of the encoder and of the decoder
    longest: int  # symbols in the longest source; lengths are uniform from 1
    examples: int  # training strings
    batch: int  # strings per step
    pack: int  # tokens in a packed row
    round: int  # steps that a contender takes in its turn
    steps: int  # of training to the target; 0: too large for that
    learning_rate: float = 2e-3
    warmup_steps: int = 100

    @property
    def room(self) -> int:
        """Tokens that an output may have: EOS, and a few more than the longest target."""
        return self.longest + 8


SMALL = {
    "trial": Size(32, 2, 64, 1, 4, 4_000, 32, 16, 10, 1_000, 4e-3, 20),
    "tiny": Size(128, 4, 512, 2, 32, 65_536, 128, 64, 20, 1_500),
}
# device → name → size. On a GPU a batch fills the device, and all contenders fit at once.
SIZES = {
    "cpu": SMALL | {"base": Size(512, 8, 2048, 6, 64, 8_192, 16, 128, 10, 0)},
    "gpu": SMALL
    | {
        "base": Size(512, 8, 2048, 6, 64, 131_072, 256, 256, 20, 2_000, 5e-4, 400),
        "big": Size(1024, 16, 4096, 6, 127, 65_536, 128, 256, 10, 0),
    },
}


def draw(size: Size, count: int, *, held_out: bool, seed: int = 0) -> list[str]:
    """Strings of uniform lengths and symbols; a hash decides which, one in ten, are held out."""
    rng, found = random.Random(f"{seed} {held_out}"), []
    while len(found) < count:
        string = "".join(rng.choices(SYMBOLS, k=rng.randint(1, size.longest)))
        if (zlib.crc32(string.encode()) % 10 == 0) == held_out:
            found.append(string)
    return found


def save(size: Size, folder: Path) -> None:
    """Writes the strings of a size and their targets, which every contender reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, strings in {
        "train": draw(size, size.examples, held_out=False),
        "test": draw(size, HELD_OUT, held_out=True),
        "validation": draw(size, HELD_OUT, held_out=True, seed=1),
    }.items():
        lines = "".join(f"{string}\t{string[::-1]}\n" for string in strings)
        (folder / f"{name}.tsv").write_text(lines, encoding="utf-8")


class Strings(NamedTuple):
    """Sources and targets [n, longest + 1] int32: symbols, EOS, then padding."""

    source: np.ndarray
    target: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [n] of each source, and of its target, EOS included."""
        return (self.source != PAD).sum(1)


def load(folder: Path, split: str) -> Strings:
    """The tokens of a split, train or test."""
    lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    found = np.full((2, len(lines), max(map(len, lines)) // 2 + 1), PAD, np.int32)
    for row, line in enumerate(lines):
        for side, text in enumerate(line.split("\t")):
            found[side, row, : len(text) + 1] = [*(FIRST + SYMBOLS.index(x) for x in text), EOS]
    return Strings(*found)


def batches(lengths: np.ndarray, batch: int, seed: int, batching: str) -> Iterator[np.ndarray]:
    """The rows [batch] of each training step, each string at most once per epoch.

    `padded` batches are in random order; `bucketed` ones hold strings of similar length. Strings
    that do not fill a batch wait for the next epoch.
    """
    rng, pool = np.random.default_rng(seed), POOL if batching == "bucketed" else 1
    count = len(lengths) // (batch * pool) * batch * pool
    if not count:
        raise ValueError(f"{len(lengths)} strings are too few for {pool} batches of {batch}")
    while True:
        pools = rng.permutation(len(lengths))[:count].reshape(-1, pool * batch)
        if batching == "bucketed":
            order = np.argsort(lengths[pools], axis=1, kind="stable")
            pools = np.take_along_axis(pools, order, axis=1)
        for rows in pools:  # in random order, so that a pool does not end with its longest
            yield from rng.permutation(rows.reshape(pool, batch))
