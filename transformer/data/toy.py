"""Toy string-to-string tasks as the TFDS dataset `toy_strings/{task}_{size}`.

A seeded generator draws the strings, so every machine prepares the same bytes. The hash of a source
decides its split, so no string is in two; the strings of a split are distinct. Lengths are uniform,
but a length with fewer strings than its share (there are 26 of one letter) contributes all of them,
and the longer lengths share the rest. `test_longer` has lengths beyond training's.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, cast

import tensorflow_datasets as tfds

from transformer.data.text import dataset_info

SPLITS = ("train", "validation", "test", "test_longer")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Task(NamedTuple):
    """A function from source to target, an example of it, and the characters of both."""

    function: Callable[[str], str | None]  # None: the string is not a valid source
    example: str  # source → target
    alphabet: str = ALPHABET  # sources are drawn from these characters
    target_only: str = ""  # further characters of targets


def _add(source: str) -> str | None:
    left, _, right = source.partition("+")
    return str(int(left) + int(right)) if left.isdigit() and right.isdigit() else None


TASKS = {
    "copy": Task(lambda source: source, "hello → hello"),
    "reverse": Task(lambda source: source[::-1], "hello → olleh"),
    "sort": Task(lambda source: "".join(sorted(source)), "hello → ehllo"),
    "add": Task(_add, "12+34 → 46", alphabet="0123456789+"),
}


class Size(NamedTuple):
    """The number of strings in each split, and the lengths of the strings."""

    train: int
    held_out: int  # validation, test and test_longer each
    lengths: range
    longer: range  # of test_longer


SIZES = {
    "tiny": Size(train=2_000, held_out=100, lengths=range(1, 6), longer=range(6, 9)),
    "small": Size(train=50_000, held_out=1_000, lengths=range(1, 17), longer=range(17, 25)),
}


def split_of(source: str) -> str:
    """The split to which `source` belongs: 8 in 10 are in train."""
    bucket = hashlib.sha256(source.encode()).digest()[0] * 10 // 256
    return {0: "validation", 1: "test"}.get(bucket, "train")


def draw(task: Task, size: Size, split: str) -> list[str]:
    """Draws the distinct sources of `split`, the same on every machine."""
    count = size.train if split == "train" else size.held_out
    lengths = size.longer if split == "test_longer" else size.lengths
    rng = random.Random(f"{split} {count} {lengths}")
    chosen: list[str] = []
    for position, length in enumerate(lengths):
        quota = (count - len(chosen)) // (len(lengths) - position)
        chosen += _draw_length(task, split, quota, length, rng)
    assert len(chosen) == count, f"{split}: fewer than {count} sources have the lengths {lengths}"
    return chosen


def _draw_length(task: Task, split: str, quota: int, length: int, rng: random.Random) -> list[str]:
    """Up to `quota` distinct sources of one length that belong to `split`."""

    def belongs(source: str) -> bool:
        is_here = split == "test_longer" or split_of(source) == split
        return is_here and task.function(source) is not None

    if len(task.alphabet) ** length <= 20 * quota:  # few enough to enumerate
        every = map("".join, itertools.product(task.alphabet, repeat=length))
        supply = list(filter(belongs, every))
        return rng.sample(supply, min(quota, len(supply)))
    tries = ("".join(rng.choices(task.alphabet, k=length)) for _ in range(1_000 * quota))
    found: dict[str, None] = {}
    for source in filter(belongs, tries):
        found[source] = None
        if len(found) == quota:
            break
    return list(found)


class ToyStrings(tfds.core.GeneratorBasedBuilder):
    """Pairs of a source string and the target that the task computes."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=f"{task}_{size}") for task in TASKS for size in SIZES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator:
        name = cast(tfds.core.BuilderConfig, self.builder_config).name
        task, _, size = name.rpartition("_")
        for source in draw(TASKS[task], SIZES[size], split):
            yield source, {"source": source, "target": TASKS[task].function(source)}
