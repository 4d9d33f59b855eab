"""The tasks: reversed strings, and pairs like text. Imports NumPy alone: a peer loads no JAX."""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAD, BOS, EOS, FIRST = 0, 1, 2, 3  # as `transformer.data.tokenizer` numbers them; the first symbol
ORIGIN = 0x4E00  # the first symbol as a character; the next 20,991 are letters too
HELD_OUT = 1_000  # strings that are not in the training set
POOL = 10  # batches whose strings are sorted together by length
# Means and covariances of the logarithms of the lengths of source and target in the training set of
# Multi30k, English to German: 29,000 pairs of 9,708 kinds of subword pieces.
LOG_LENGTHS = (2.571, 2.567), ((0.0948, 0.0897), (0.0897, 0.1159))


@dataclass(frozen=True)
class Size:
    """A model, the pairs of strings that it is trained on, and how."""

    d_model: int
    num_heads: int
    d_ff: int
    num_layers: int  # of the encoder and of the decoder
    longest: int  # symbols in the longest string
    examples: int  # training pairs
    batch: int  # pairs per step
    pack: int  # tokens in a packed row
    round: int  # steps that a contender takes in its turn
    steps: int  # of training to the target; 0: too large for that
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    symbols: int = 60  # kinds
    text: bool = False  # the statistics of text; otherwise targets are reversed sources
    dropout: float = 0.0  # of sublayer outputs and embedded tokens
    label_smoothing: float = 0.0

    @property
    def vocabulary(self) -> int:
        """Token ids: special tokens, symbols and an unknown one, rounded up to a multiple of 8."""
        return -(-(FIRST + self.symbols + 1) // 8) * 8

    @property
    def room(self) -> int:
        """Tokens that an output may have: EOS, and a few more than the longest target."""
        return self.longest + 8


SMALL = {
    "trial": Size(32, 2, 64, 1, 4, 4_000, 32, 16, 10, 1_000, 4e-3, 20),
    "tiny": Size(128, 4, 512, 2, 32, 65_536, 128, 64, 20, 1_500),
}
# Of Multi30k and of a published Transformer for it. A batch is 64 packed rows, on a GPU 512.
TEXT = {"symbols": 9_708, "text": True, "dropout": 0.3, "label_smoothing": 0.1}
# device → name → size. On a GPU a batch fills the device, and all contenders fit at once.
SIZES = {
    "cpu": SMALL
    | {
        "base": Size(512, 8, 2048, 6, 64, 8_192, 16, 128, 10, 0),
        "text": Size(128, 4, 256, 4, 51, 29_000, 261, 64, 10, 0, **TEXT),
        # Of OPUS-MT's Transformers; one step leaves outputs that end at the length limit.
        "marian": Size(512, 8, 2048, 6, 51, 2_000, 16, 64, 10, 1, symbols=20_000, text=True),
    },
    "gpu": SMALL
    | {
        "base": Size(512, 8, 2048, 6, 64, 131_072, 256, 256, 20, 2_000, 5e-4, 400),
        "big": Size(1024, 16, 4096, 6, 127, 65_536, 128, 256, 10, 0),
        "text": Size(128, 4, 256, 4, 51, 29_000, 2_092, 64, 20, 0, **TEXT),
    },
}


def draw(size: Size, count: int, *, held_out: bool, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of strings of uniform lengths and symbols; a hash decides which tenth is held out."""
    rng, found = random.Random(f"{seed} {held_out}"), []
    alphabet = [chr(ORIGIN + number) for number in range(size.symbols)]
    while len(found) < count:
        string = "".join(rng.choices(alphabet, k=rng.randint(1, size.longest)))
        if (zlib.crc32(string.encode()) % 10 == 0) == held_out:
            found.append((string, string[::-1]))
    return found


def draw_text(size: Size, count: int, *, held_out: bool, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of unrelated strings of correlated lengths, with each symbol at least once."""
    rng = np.random.default_rng([seed, held_out])
    lengths = np.exp(rng.multivariate_normal(*LOG_LENGTHS, count)).round().clip(1, size.longest)
    weights = np.arange(3.0, size.symbols + 3) ** -1.1  # Zipf and Mandelbrot's law
    ends = lengths.astype(int).cumsum()
    drawn = rng.choice(size.symbols, ends[-1], p=weights / weights.sum())
    drawn[: size.symbols] = np.arange(size.symbols)[: len(drawn)]
    rng.shuffle(drawn)
    strings = ["".join(chr(ORIGIN + x) for x in each) for each in np.split(drawn, ends[:-1])]
    return list(zip(strings[::2], strings[1::2], strict=True))


def save(size: Size, folder: Path) -> None:
    """Writes the pairs of a size, which every contender reads."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": size.examples, "test": HELD_OUT, "validation": HELD_OUT}
    for seed, (name, count) in enumerate(counts.items()):
        pairs = (draw_text if size.text else draw)(size, count, held_out=seed > 0, seed=seed)
        lines = "".join(f"{source}\t{target}\n" for source, target in pairs)
        (folder / f"{name}.tsv").write_text(lines, encoding="utf-8")


class Strings(NamedTuple):
    """Sources and targets [n, longest + 1] int32: symbols, EOS, then padding."""

    source: np.ndarray
    target: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [n, 2] of each source and target, EOS included."""
        return np.stack([(side != PAD).sum(1) for side in self], axis=1)


def load(folder: Path, split: str) -> Strings:
    """The tokens of a split, train or test."""
    lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    longest = max(len(text) for pair in pairs for text in pair)
    found = np.full((2, len(pairs), longest + 1), PAD, np.int32)
    for row, pair in enumerate(pairs):
        for side, text in enumerate(pair):
            found[side, row, : len(text) + 1] = [*(FIRST + ord(x) - ORIGIN for x in text), EOS]
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
