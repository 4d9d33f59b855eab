"""SCAN: its pairs and splits against the published ones."""

import hashlib
from collections import Counter
from functools import cache

import pytest

from tests.helpers import data_config, refused
from transformer.data import scan
from transformer.data.corpus import open_corpus

PAIRS = cache(scan.pairs)
NAMES = [config.name for config in scan.ScanGrammar.BUILDER_CONFIGS]
LEFT, RIGHT, WALK, JUMP = "I_TURN_LEFT", "I_TURN_RIGHT", "I_WALK", "I_JUMP"
# Examples of Lake and Baroni 2018 (Figure 1 and Section 2), with the actions of their files.
EXAMPLES = {
    "jump left": [LEFT, JUMP],
    "jump around right": [RIGHT, JUMP] * 4,
    "turn left twice": [LEFT] * 2,
    "turn opposite left": [LEFT] * 2,
    "turn around right": [RIGHT] * 4,
    "jump thrice": [JUMP] * 3,
    "jump opposite left and walk thrice": [LEFT, LEFT, JUMP, WALK, WALK, WALK],
    "jump opposite left after walk around left": [LEFT, WALK] * 4 + [LEFT, LEFT, JUMP],
    "walk after run": ["I_RUN", WALK],
}
# SHA-256 of the sorted lines of tasks.txt in github.com/brendenlake/SCAN at commit c4b756c.
PUBLISHED = "345bff3c25864652f326ba1960aa515d156b63f45067ea57268f71d7362a2440"
COUNTS = {  # the lines of the files of that repository
    "simple": {"train": 16_728, "test": 4_182},
    "length": {"train": 16_990, "test": 3_920},
    "jump": {"train": 14_670, "test": 7_706},
}


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def splits(name):
    return scan.divide(name, PAIRS())


def test_the_grammar_generates_the_published_pairs():
    assert {command: PAIRS()[command].split() for command in EXAMPLES} == EXAMPLES
    lines = sorted(f"IN: {command} OUT: {actions}" for command, actions in PAIRS().items())
    assert (len(lines), digest(lines)) == (20_910, PUBLISHED)


def test_splits_have_the_published_sizes():
    for name, sizes in COUNTS.items():
        assert {split: len(own) for split, own in splits(name).items()} == sizes


@pytest.mark.parametrize("name", NAMES)
def test_no_command_is_in_two_splits_and_only_add_jump_repeats_one(name):
    counted = Counter(command for own in splits(name).values() for command in own)
    repeated = {command: count for command, count in counted.items() if count > 1}
    assert counted.keys() == PAIRS().keys()
    assert repeated == ({"jump": 1_467} if name == "jump" else {})


def test_add_jump_trains_on_jump_alone():
    assert {each for each in splits("jump")["train"] if "jump" in each} == {"jump"}
    assert all("jump" in command for command in splits("jump")["test"])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("length")])
def test_length_splits_are_cut_by_the_number_of_actions(name):
    cutoff, found = int(name.partition("_")[2] or 22), splits(name)
    lengths = {split: [len(PAIRS()[each].split()) for each in own] for split, own in found.items()}
    assert min(lengths.pop("test")) > cutoff >= max(map(max, lengths.values()))
    if name != "length":
        assert len(found["validation"]) == sum(map(len, lengths.values())) // 10


def test_draws_are_those_of_every_process():
    """Results of a split that is drawn anew would not be comparable."""
    drawn = splits("simple")["test"], splits("length_26")["validation"]
    assert [digest(sorted(own))[:8] for own in drawn] == ["29c479cb", "0a6dd6f3"]


def test_the_dataset_has_the_pairs_and_no_validation_of_its_own(tmp_path):
    config = data_config(dataset="scan_grammar/jump", tokenizer="words")
    corpus = open_corpus(config, str(tmp_path))
    for split, own in splits("jump").items():
        pairs = Counter(zip(*corpus.texts(split), strict=True))
        assert pairs == Counter((command, PAIRS()[command]) for command in own)
    message = "choose one, or a slice such as .*: train .14670., test .7706.$"
    refused(f"^'validation' is not a split of .*; {message}", corpus.texts, "validation")
