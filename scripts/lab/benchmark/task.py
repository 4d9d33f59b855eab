"""The task of every contender: reverse strings of random length, at a few sizes.

Imports NumPy alone, so that the process of a peer loads neither JAX nor this library.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAD, BOS, EOS, FIRST = 0, 1, 2, 3  # as `transformer.data.tokenizer` numbers them; the first symbol
SYMBOLS = sorted(string.ascii_letters + string.digits)[:60]  # what strings are made of
VOCABULARY = 64  # with one more for unknown symbols, which `SymbolTokenizer` has
HELD_OUT = 1_000  # strings that are not in the training set
POOL = 10  # batches whose strings are sorted together by length


@dataclass(frozen=True)
class Size:
    """A model, the strings that it reverses, and how it is trained.

    num_layers: of the encoder and of the decoder.
    longest: symbols in the longest source; lengths are uniform from 1.
    examples: training strings.
    batch: strings per step.
    pack: tokens in a packed row.
    round: steps that a contender takes in its turn.
    steps: of training to the target; 0: too large for that.
    """

    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int
    longest: int
    examples: int
    batch: int
    pack: int
    round: int
    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 100

    @property
    def room(self) -> int:
        """Tokens that an output may have: EOS, and a few more than the longest target."""
        return self.longest + 8


TRIAL = Size(32, 2, 64, 1, 4, 4_000, 32, 16, 10, 1_000, 4e-3, 20)
TINY = Size(128, 4, 512, 2, 32, 65_536, 128, 64, 20, 1_500)
# device → name → size. On a GPU a batch fills the device, and all contenders fit at once.
SIZES = {
    "cpu": {
        "trial": TRIAL,
        "tiny": TINY,
        "base": Size(512, 8, 2048, 6, 64, 8_192, 16, 128, 10, 0),
    },
    "gpu": {
        "trial": TRIAL,
        "tiny": TINY,
        "base": Size(512, 8, 2048, 6, 64, 131_072, 256, 256, 20, 2_000, 5e-4, 400),
        "big": Size(1024, 16, 4096, 6, 127, 65_536, 128, 256, 10, 0),
    },
}


@dataclass(frozen=True)
class Strings:
    """Sources and targets [n, longest + 1] int32: symbols, EOS, then padding."""

    source: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [n] of each source, and of its target, EOS included."""
        return (self.source != PAD).sum(1)


def draw(size: Size, count: int, *, held_out: bool, seed: int = 0) -> Strings:
    """Strings of uniform lengths and symbols, a function of the arguments.

    A hash of a string decides whether it is held out, as one in ten is.
    """
    rng = np.random.default_rng((seed, held_out))
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        lengths = rng.integers(1, size.longest, count, endpoint=True)
        symbols = rng.integers(FIRST, FIRST + len(SYMBOLS), (count, size.longest))
        symbols[np.arange(size.longest) >= lengths[:, None]] = PAD
        kept.append(symbols[is_held_out(symbols) == held_out])
    symbols = np.concatenate(kept)[:count].astype(np.int32)
    lengths, rows = (symbols != PAD).sum(1), np.arange(count)
    place = lengths[:, None] - 1 - np.arange(size.longest)  # negative after the end of a string
    backwards = np.where(place >= 0, np.take_along_axis(symbols, place, 1), PAD)
    source, target = (np.pad(side, ((0, 0), (0, 1))) for side in (symbols, backwards))
    source[rows, lengths] = target[rows, lengths] = EOS
    return Strings(source, target)


def is_held_out(symbols: np.ndarray) -> np.ndarray:
    """Whether the 64-bit FNV hash of each row is among the one in ten that are held out."""
    state = np.full(len(symbols), 0xCBF29CE484222325, np.uint64)
    for column in symbols.T.astype(np.uint64):
        state = np.where(column == PAD, state, (state ^ column) * np.uint64(0x100000001B3))
    return (state >> np.uint64(32)) % np.uint64(10) == 0


def save(size: Size, folder: Path) -> None:
    """Writes the strings of a size: strings.npz for the peers, and .tsv files for this library."""
    splits = {
        "train": draw(size, size.examples, held_out=False),
        "test": draw(size, HELD_OUT, held_out=True),
        "validation": draw(size, HELD_OUT, held_out=True, seed=1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, strings in splits.items():
        pairs = zip(strings.source.tolist(), strings.target.tolist(), strict=True)
        lines = ("\t".join(map(text, pair)) + "\n" for pair in pairs)
        (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    arrays: Any = {
        f"{name}_{side}": array
        for name, strings in splits.items()
        for side, array in vars(strings).items()
    }
    np.savez(folder / "strings.npz", **arrays)


def text(tokens: list[int]) -> str:
    """The symbols of a row of tokens."""
    return "".join(SYMBOLS[token - FIRST] for token in tokens if token >= FIRST)


def load(folder: Path, split: str) -> Strings:
    """The strings of a split, train or test."""
    with np.load(folder / "strings.npz") as arrays:
        return Strings(arrays[f"{split}_source"], arrays[f"{split}_target"])


def batches(lengths: np.ndarray, batch: int, seed: int, batching: str) -> Iterator[np.ndarray]:
    """The rows [batch] of each training step, each string at most once per epoch.

    Args:
      lengths: tokens of each string.
      batch: strings per step; those that do not fill a batch wait for the next epoch.
      seed: of the order.
      batching: `padded`: in random order; `bucketed`: strings of similar length together.
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


def by_length(lengths: np.ndarray, batch: int) -> list[np.ndarray]:
    """Rows to decode together: `batch` at a time of similar length, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + batch] for first in range(0, len(order), batch)]
