"""The task that all contenders have: reverse strings of random lengths, at a few sizes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from transformer.data.tokenizer import EOS, PAD, SPECIALS


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the strings that it reverses.

    width, heads, ff_width, layers: D, N, F, and L of the encoder and of the decoder.
    vocabulary: V, of which the first few are padding, beginning and end.
    longest: letters in the longest source; lengths are uniform from 1 on.
    examples: training strings.
    batch: strings a step.
    pack: tokens in a packed row.
    round: steps that a contender takes when its turn comes.
    steps: in which it is trained to its end; 0: it is not.
    learning_rate, warmup_steps: of that training, where no search has found better.
    """

    width: int
    heads: int
    ff_width: int
    layers: int
    vocabulary: int = 64
    longest: int
    examples: int
    batch: int
    pack: int
    round: int
    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 100

    def letters(self) -> int:
        """How many symbols strings are made of."""
        return self.vocabulary - len(SPECIALS)

    def tokens(self) -> int:
        """In the longest source or target, its end included."""
        return self.longest + 1

    def room(self) -> int:
        """Tokens that an output may have: a few more than the longest target."""
        return self.tokens() + 7


# device → name → size. On a GPU a batch is to fill it, and all contenders to fit in together.
SIZES: dict[str, dict[str, Size]] = {
    "cpu": {
        "trial": Size(
            width=32,
            heads=2,
            ff_width=64,
            layers=1,
            longest=4,
            examples=4_000,
            batch=32,
            pack=16,
            round=10,
            steps=1_000,
            learning_rate=4e-3,
            warmup_steps=20,
        ),
        "tiny": Size(
            width=128,
            heads=4,
            ff_width=512,
            layers=2,
            longest=32,
            examples=65_536,
            batch=128,
            pack=64,
            round=20,
            steps=1_500,
        ),
        "base": Size(
            width=512,
            heads=8,
            ff_width=2048,
            layers=6,
            longest=64,
            examples=8_192,
            batch=16,
            pack=128,
            round=10,
            steps=0,
        ),
    },
}
SIZES["gpu"] = {
    "trial": SIZES["cpu"]["trial"],
    "tiny": SIZES["cpu"]["tiny"],
    "base": dataclasses.replace(
        SIZES["cpu"]["base"],
        examples=131_072,
        batch=256,
        pack=256,
        round=20,
        steps=2_000,
        learning_rate=5e-4,
        warmup_steps=400,
    ),
    "big": Size(
        width=1024,
        heads=16,
        ff_width=4096,
        layers=6,
        longest=127,
        examples=65_536,
        batch=128,
        pack=256,
        round=10,
        steps=0,
    ),
}

HELD_OUT = 1_000  # strings that no contender is trained on


@dataclass(frozen=True)
class Strings:
    """Tokens with an EOS at each end, then padding.

    source: [n, S] int32.
    target: [n, S] int32, its letters in the other order.
    """

    source: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def head(self, n: int) -> "Strings":
        """The first `n`."""
        return Strings(self.source[:n], self.target[:n])

    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each source, and of its target, EOS included."""
        return (self.source != PAD).sum(1)


def draw(size: Size, count: int, *, held_out: bool, seed: int = 0) -> Strings:
    """Strings of uniform lengths and letters, the same for the same arguments.

    A hash of its letters says of each string whether it is held out: one in ten is.
    """
    rng = np.random.default_rng((seed, held_out))
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        lengths = rng.integers(1, size.longest, count, endpoint=True)
        letters = rng.integers(len(SPECIALS), size.vocabulary, (count, size.longest))
        letters[np.arange(size.longest) >= lengths[:, None]] = PAD
        kept.append(letters[is_held_out(letters) == held_out])
    letters = np.concatenate(kept)[:count]
    lengths, rows = (letters != PAD).sum(1), np.arange(count)
    source, target = np.full((2, count, size.tokens()), PAD, np.int32)
    source[:, :-1] = letters
    source[rows, lengths] = EOS
    place = lengths[:, None] - 1 - np.arange(size.longest)  # negative beyond the string's end
    target[:, :-1] = np.where(place >= 0, np.take_along_axis(letters, place, 1), PAD)
    target[rows, lengths] = EOS
    return Strings(source, target)


def is_held_out(letters: Int[np.ndarray, "n length"]) -> Bool[np.ndarray, "n"]:
    """Whether the hash of each row (FNV's, of 64 bits) puts it among the one in ten."""
    state = np.full(len(letters), 0xCBF29CE484222325, np.uint64)
    for column in letters.T.astype(np.uint64):
        state = np.where(column == PAD, state, (state ^ column) * np.uint64(0x100000001B3))
    return (state >> np.uint64(32)) % np.uint64(10) == 0


def save(size: Size, path: Path) -> None:
    """Writes the strings of a size to one file, which all contenders read."""
    train = draw(size, size.examples, held_out=False)
    held_out = draw(size, HELD_OUT, held_out=True)
    parts = {"train": train, "held_out": held_out}
    arrays: Any = {
        f"{part}_{side}": getattr(strings, side)
        for part, strings in parts.items()
        for side in ("source", "target")
    }
    np.savez(path, **arrays)


def load(path: Path, part: str) -> Strings:
    """The strings for training (`train`) or for checks (`held_out`)."""
    with np.load(path) as arrays:
        return Strings(arrays[f"{part}_source"], arrays[f"{part}_target"])


def useful_flops(size: Size, source: np.ndarray, target: np.ndarray) -> float:
    """Of the matrix products that a training step needs for strings of these lengths.

    No padding: every layer over an example's own tokens, and attention, causal or not,
    between all pairs of them. A multiply-add is 2, the backward pass twice the forward.

    Args:
      size: of the model.
      source: tokens of each source.
      target: tokens of each target.
    """
    d, s, t = size.width, source.astype(float), target.astype(float)
    layer = 4 * d * d + 2 * d * size.ff_width  # projections and feed-forward, a token
    encoder = s * layer + 2 * s * s * d
    cross = 2 * d * d * (s + t) + 2 * s * t * d
    decoder = t * layer + 2 * t * t * d + cross
    forward = 2 * (size.layers * (encoder + decoder) + t * d * size.vocabulary)
    return float(3 * forward.sum())
