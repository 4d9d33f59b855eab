"""Toy string-to-string tasks as the TFDS dataset `toy_strings/{task}_{size}`.

A seeded generator draws the strings, so every machine prepares the same bytes without a download
and without TensorFlow.

The hash of a source decides its split (8 in 10 belong to `train`, 1 to `validation`, 1 to `test`),
so no string is in two. The strings of a split are distinct. Lengths are uniform as far as there
are enough strings: a length with fewer than its share (there are 26 strings of one letter)
contributes all of them, and the longer lengths share the rest. `test_longer` has lengths beyond
training's.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

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


def add(source: str) -> str | None:
    """12+34 → 46"""
    left, plus, right = source.partition("+")
    return str(int(left) + int(right)) if plus and left.isdigit() and right.isdigit() else None


class Task(NamedTuple):
    """A function from source to target, and the characters of both.

    function: returns None for a string that is not a valid source; its docstring is an example.
    alphabet: the characters that sources are drawn from.
    target_only: further characters of targets.
    """

    function: Callable[[str], str | None]
    alphabet: str = ALPHABET
    target_only: str = ""


TASKS = {
    "copy": Task(copy),
    "reverse": Task(reverse),
    "sort": Task(sort),
    "add": Task(add, alphabet="0123456789+"),
}


@dataclass(frozen=True)
class Size:
    """The number of strings in each split, and the lengths of the strings."""

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
    """The split to which `source` belongs."""
    bucket = hashlib.sha256(source.encode()).digest()[0] * 10 // 256
    return {0: "validation", 1: "test"}.get(bucket, "train")


def draw(task: Task, split: str, count: int, lengths: range) -> list[str]:
    """Draws `count` distinct sources of `split`, the same on every machine."""
    rng = random.Random(f"{split} {count} {lengths}")
    chosen: list[str] = []
    for position, length in enumerate(lengths):
        quota = (count - len(chosen)) // (len(lengths) - position)
        chosen += draw_length(task, split, quota, length, rng)
    assert len(chosen) == count, f"{split}: fewer than {count} sources have the lengths {lengths}"
    return chosen


def draw_length(task: Task, split: str, quota: int, length: int, rng: random.Random) -> list[str]:
    """Up to `quota` distinct sources of one length that belong to `split`."""

    def belongs(source: str) -> bool:
        is_here = split == "test_longer" or split_of(source) == split
        return is_here and task.function(source) is not None

    if len(task.alphabet) ** length <= 20 * quota:  # few enough to enumerate
        every = map("".join, itertools.product(task.alphabet, repeat=length))
        supply = [source for source in every if belongs(source)]
        return rng.sample(supply, min(quota, len(supply)))
    found: dict[str, None] = {}
    for _ in range(1_000 * quota):  # tries
        if len(found) == quota:
            break
        source = "".join(rng.choices(task.alphabet, k=length))
        if belongs(source):
            found[source] = None
    return list(found)


class ToyStrings(tfds.core.GeneratorBasedBuilder):
    """Pairs of a source string and the target that the task computes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}
    BUILDER_CONFIGS: ClassVar = [
        ToyConfig(name=f"{task}_{size}", description=f"{task}, {size}", task=task, size=size)
        for task, size in itertools.product(TASKS, SIZES)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"source": text, "target": text}),
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
        for source in draw(task, split, count, lengths):
            yield source, {"source": source, "target": task.function(source)}
