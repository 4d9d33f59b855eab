"""Toy string-to-string tasks as a TFDS dataset: `toy_strings/reverse_small` and its siblings.

    >>> import tensorflow_datasets as tfds
    >>> import transformer.data.toy
    >>> tfds.data_source("toy_strings/reverse_small", split="test")

Nothing is downloaded: the strings are drawn by a seeded generator, so every machine
prepares the same bytes, without TensorFlow.

Splits. The split of a source string follows from its hash alone (8 in 10 strings
may only be in `train`, 1 in `validation`, 1 in `test`), so no string is in two. All
strings of a split are distinct. Lengths are drawn uniformly, as far as there are
strings: a length with fewer than its share (there are 26 strings of 1 letter, 676 of
2) gives all that the split has, and the longer lengths share what is missing.
`test_longer` holds lengths beyond those of training, uniformly.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import tensorflow_datasets as tfds

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def copy(source: str) -> str:
    """hello → hello"""
    return source


def reverse(source: str) -> str:
    """hello → olleh"""
    return source[::-1]


def sort(source: str) -> str:
    """hello → ehllo"""
    return "".join(sorted(source))


TASKS: dict[str, Callable[[str], str]] = {"copy": copy, "reverse": reverse, "sort": sort}


@dataclass(frozen=True)
class Size:
    """How many strings each split holds, and the lengths of its strings."""

    train: int
    held_out: int  # validation, test and test_longer each
    lengths: range
    longer: range


SIZES = {
    "tiny": Size(train=2_000, held_out=100, lengths=range(1, 6), longer=range(6, 9)),
    "small": Size(train=50_000, held_out=1_000, lengths=range(1, 17), longer=range(17, 25)),
}


@dataclass(kw_only=True)
class ToyConfig(tfds.core.BuilderConfig):
    """One task at one size."""

    task: str
    size: str


def split_of(source: str) -> str:
    """The one split that may hold `source`."""
    bucket = hashlib.sha256(source.encode()).digest()[0] * 10 // 256
    return {0: "validation", 1: "test"}.get(bucket, "train")


def draw(split: str, count: int, lengths: range) -> list[str]:
    """`count` distinct strings of `split`, lengths as uniform as the supply allows.

    The same call gives the same strings on every machine.
    """
    rng = random.Random(f"{split} {count} {lengths}")
    chosen: list[str] = []
    for position, length in enumerate(lengths):
        quota = (count - len(chosen)) // (len(lengths) - position)
        chosen += draw_length(split, quota, length, rng)
    assert len(chosen) == count, f"{split}: the lengths {lengths} hold fewer than {count} strings"
    return chosen


def draw_length(split: str, quota: int, length: int, rng: random.Random) -> list[str]:
    """Up to `quota` distinct strings of one length that belong to `split`."""

    def belongs(source: str) -> bool:
        return split == "test_longer" or split_of(source) == split

    if len(ALPHABET) ** length <= 20 * quota:  # few enough to look at each
        every = ("".join(letters) for letters in itertools.product(ALPHABET, repeat=length))
        supply = [source for source in every if belongs(source)]
        return rng.sample(supply, min(quota, len(supply)))
    found: dict[str, None] = {}
    while len(found) < quota:
        source = "".join(rng.choices(ALPHABET, k=length))
        if belongs(source):
            found[source] = None
    return list(found)


class ToyStrings(tfds.core.GeneratorBasedBuilder):
    """Pairs of strings over a-z: the target is the source copied, reversed or sorted."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}
    BUILDER_CONFIGS: ClassVar = [
        ToyConfig(name=f"{task}_{size}", description=f"{task}, {size}", task=task, size=size)
        for task, size in itertools.product(TASKS, SIZES)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"source": tfds.features.Text(), "target": tfds.features.Text()}
            ),
            supervised_keys=("source", "target"),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        size = SIZES[cast(ToyConfig, self.builder_config).size]
        return {
            "train": self._generate_examples("train", size.train, size.lengths),
            "validation": self._generate_examples("validation", size.held_out, size.lengths),
            "test": self._generate_examples("test", size.held_out, size.lengths),
            "test_longer": self._generate_examples("test_longer", size.held_out, size.longer),
        }

    def _generate_examples(self, split: str, count: int, lengths: range) -> Iterator:
        task = TASKS[cast(ToyConfig, self.builder_config).task]
        for source in draw(split, count, lengths):
            yield source, {"source": source, "target": task(source)}
