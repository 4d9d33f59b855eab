"""SCAN (Lake and Baroni 2018) as the TFDS dataset `scan_grammar`: commands to actions.

Its grammar generates all 20,910 pairs, so nothing is downloaded (the `scan` of TFDS downloads):

    C → S and S | S after S | S;   S → V twice | V thrice | V
    V → D opposite or around inserted | D | U;   D → U left | U right | turn left | turn right
    U → walk | look | run | jump

The splits of Lake and Baroni are `simple`, a random one; `length`, which trains on the commands of
up to 22 actions; and `jump` (add-jump), which trains on the commands without "jump" and on "jump"
alone, 1,467 times. They have no validation: `data.validation` takes a slice of `train`. `length_N`
trains on nine tenths of the commands of up to N actions and validates on the others, as Csordás et
al. 2021 do at the cutoffs of Newman et al. 2020.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import ClassVar, cast

import tensorflow_datasets as tfds

from transformer.data.text import dataset_info

ACTIONS = {word: f"I_{word.upper()}" for word in ("walk", "look", "run", "jump")}
TURNS = {side: f"I_TURN_{side.upper()}" for side in ("left", "right")}
REPEATS = {"twice": 2, "thrice": 3}
CUTOFFS = (22, 24, 25, 26, 27, 28, 30, 32, 33, 36, 40)
NAMES = ("simple", "length", "jump", *(f"length_{cutoff}" for cutoff in CUTOFFS))
SIMPLE = 16_728  # training pairs of `simple`
LENGTH = 22  # most actions in training of `length`
JUMPS = 1_467  # training pairs "jump" of `jump`: a tenth of all


def pairs() -> dict[str, str]:
    """Command → its actions, separated by spaces."""
    verbs = dict(_verbs())
    sentences = dict(verbs)
    for (verb, actions), (word, count) in itertools.product(verbs.items(), REPEATS.items()):
        sentences[f"{verb} {word}"] = actions * count
    commands = dict(sentences)
    for (first, one), (second, other) in itertools.product(sentences.items(), repeat=2):
        commands[f"{first} and {second}"] = one + other
        commands[f"{first} after {second}"] = other + one
    return {command: " ".join(actions) for command, actions in commands.items()}


def _verbs() -> Iterator[tuple[str, list[str]]]:
    """The phrases V and their actions."""
    for word, action in ACTIONS.items():
        yield word, [action]
    primitives = {word: [action] for word, action in ACTIONS.items()} | {"turn": []}
    for (word, own), (side, turn) in itertools.product(primitives.items(), TURNS.items()):
        yield f"{word} {side}", [turn, *own]
        yield f"{word} opposite {side}", [turn, turn, *own]
        yield f"{word} around {side}", [turn, *own] * 4


def divide(name: str, actions: Mapping[str, str]) -> dict[str, list[str]]:
    """The commands of each split of the configuration `name`."""
    # A hash draws the same order in every process and version of Python.
    drawn = sorted(actions, key=lambda each: hashlib.sha256(f"{name} {each}".encode()).digest())
    if name == "simple":
        return {"train": drawn[:SIMPLE], "test": drawn[SIMPLE:]}
    if name == "jump":
        others = [command for command in drawn if "jump" not in command.split()]
        test = [command for command in drawn if "jump" in command.split() and command != "jump"]
        return {"train": others + ["jump"] * JUMPS, "test": test}
    cutoff = int(name.partition("_")[2] or LENGTH)
    lengths = {command: len(own.split()) for command, own in actions.items()}
    train = [command for command in drawn if lengths[command] <= cutoff]
    test = [command for command in drawn if lengths[command] > cutoff]
    if name == "length":
        return {"train": train, "test": test}
    tenth = len(train) // 10
    return {"train": train[tenth:], "validation": train[:tenth], "test": test}


class ScanGrammar(tfds.core.GeneratorBasedBuilder):
    """Commands and their actions."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in NAMES]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        actions, name = pairs(), cast(tfds.core.BuilderConfig, self.builder_config).name
        splits = divide(name, actions)
        return {split: self._generate_examples(own, actions) for split, own in splits.items()}

    def _generate_examples(self, commands: list[str], actions: Mapping[str, str]) -> Iterator:
        for number, command in enumerate(commands):
            yield number, {"source": command, "target": actions[command]}
