"""SCAN (Lake and Baroni 2018) as the TFDS dataset `scan/{split}`: commands to actions.

Its grammar generates all 20,910 pairs, so nothing is downloaded:

    C → S and S | S after S | S;   S → V twice | V thrice | V
    V → D opposite-or-around | D | U;   D → U left | U right | turn left | turn right
    U → walk | look | run | jump

Splits of Lake and Baroni: `simple` is random; in `length`, training has up to 22 actions; in `jump`,
training has "jump" only alone, 1,467 times, and every command with another word and "jump" is in
`test`. `length_N` (Newman et al. 2020; Csordás et al. 2021) trains on nine tenths of the commands
with up to N actions; the last tenth is `validation`. The other splits have no validation of their
own: it is a tenth of the training commands, which stay in training.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import ClassVar, cast

import tensorflow_datasets as tfds

from transformer.data.text import dataset_info

ACTIONS = {word: f"I_{word.upper()}" for word in ("walk", "look", "run", "jump")}
TURNS = {side: f"I_TURN_{side.upper()}" for side in ("left", "right")}
REPEATS = {"twice": 2, "thrice": 3}
CUTOFFS = (22, 24, 25, 26, 27, 28, 30, 32, 33, 36, 40)
JUMPS = 1_467  # training examples of "jump" alone: a tenth of all in training
SIMPLE = 16_728  # training pairs of the random split


def pairs() -> dict[str, str]:
    """Command → its actions, separated by spaces."""
    verbs = dict(_verbs())
    sentences = dict(verbs)
    for (verb, actions), (word, count) in itertools.product(verbs.items(), REPEATS.items()):
        sentences[f"{verb} {word}"] = actions * count
    both = itertools.product(sentences.items(), repeat=2)
    found = dict(sentences)
    for (first, one), (second, other) in both:
        found[f"{first} and {second}"] = one + other
        found[f"{first} after {second}"] = other + one
    return {command: " ".join(actions) for command, actions in found.items()}


def _verbs() -> Iterator[tuple[str, list[str]]]:
    """The phrases V and their actions."""
    for word, action in ACTIONS.items():
        yield word, [action]
    for (word, action), (side, turn) in itertools.product(
        [*ACTIONS.items(), ("turn", "")], TURNS.items()
    ):
        own = [action] if action else []
        yield f"{word} {side}", [turn, *own]
        yield f"{word} opposite {side}", [turn, turn, *own]
        yield f"{word} around {side}", [turn, *own] * 4


def divide(name: str) -> Mapping[str, list[str]]:
    """The commands of train, validation and test in a split."""
    commands, rng = pairs(), random.Random(name)
    shuffled = rng.sample(sorted(commands), len(commands))
    kind, _, cutoff = name.partition("_")
    lengths = {command: len(actions.split()) for command, actions in commands.items()}
    if kind == "simple":
        train, test = shuffled[:SIMPLE], shuffled[SIMPLE:]
    elif kind == "length":
        longest = int(cutoff or 22)
        train = [command for command in shuffled if lengths[command] <= longest]
        test = [command for command in shuffled if lengths[command] > longest]
    else:
        test = [each for each in shuffled if "jump" in each.split() and each != "jump"]
        train = [each for each in shuffled if "jump" not in each.split()] + ["jump"] * JUMPS
    tenth = len(train) // 10
    held_out = train[:tenth] if cutoff else rng.sample(sorted({*train}), tenth)
    return {"train": train[tenth:] if cutoff else train, "validation": held_out, "test": test}


class Scan(tfds.core.GeneratorBasedBuilder):
    """Commands and their actions."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name)
        for name in ("simple", "length", "jump", *(f"length_{cutoff}" for cutoff in CUTOFFS))
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        name = cast(tfds.core.BuilderConfig, self.builder_config).name
        return {split: self._generate_examples(own) for split, own in divide(name).items()}

    def _generate_examples(self, commands: list[str]) -> Iterator:
        actions = pairs()
        for number, command in enumerate(commands):
            yield number, {"source": command, "target": actions[command]}
