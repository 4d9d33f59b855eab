"""Scores of text against their definitions, and against sacrebleu's own functions."""

import itertools
from functools import cache

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from transformer.text_metrics import METRICS, edit_distance, interval

OUTPUTS = [
    "the cat sat on the mat",
    "there is no place like home .",
    "",
    "a dog barks at night in the yard",
    "ein Wort",
]
ONE = [
    ["the cat sat on a mat"],
    ["there is no place like home."],
    ["nothing at all"],
    ["at night a dog barks in the yard"],
    ["kein Wort"],
]
SEVERAL = [[*own, f"{own[0]} indeed", "so be it then"] for own in ONE]
UNEQUAL = [own[: 1 + k % 3] for k, own in enumerate(SEVERAL)]
SACREBLEU = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}


@cache
def by_definition(one, other):
    """The edits between two tuples: of the three ways to treat their last units the best."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        by_definition(one[:-1], other) + 1,
        by_definition(one, other[:-1]) + 1,
        by_definition(one[:-1], other[:-1]) + (one[-1] != other[-1]),
    )


UNITS = st.lists(st.sampled_from(["AH", "B", "K", "T"]), max_size=7).map(tuple)


@given(UNITS, UNITS)
def test_edit_distance_is_that_of_its_definition(one, other):
    assert edit_distance(one, other) == by_definition(one, other)


def value(name, outputs, references):
    return METRICS[name](outputs, references).value


def test_rates_by_hand():
    outputs = ["K AE T", "D AO G Z", "B ER D"]
    references = [["K AE T"], ["D AO G"], ["B IY D Z"]]
    assert value("exact_match", outputs, references) == pytest.approx(100 / 3)
    assert value("sequence_error_rate", outputs, references) == pytest.approx(200 / 3)
    # 0, 1 and 2 edits; 3, 3 and 4 phonemes.
    assert value("unit_error_rate", outputs, references) == pytest.approx(30)
    # 0, 2 (" Z") and 4 (ER → IY, " Z"); 6, 6 and 8 characters.
    assert value("character_error_rate", outputs, references) == pytest.approx(100 * 6 / 20)
    # Space between units is none.
    assert value("unit_error_rate", [" K  AE T "], [["K AE T"]]) == 0


def test_of_several_references_the_nearest_counts():
    references = [["K AE T S", "K AA T"], ["B ER D"]]
    assert value("exact_match", ["K AA T", "B ER D"], references) == 100
    # Two edits of four phonemes, or one of three.
    assert value("unit_error_rate", ["K EH T", "B ER D"], references) == pytest.approx(100 / 6)
    # Of one edit each the longer reference is the nearer.
    assert value("unit_error_rate", ["A B C D"], [["A B C", "A B C D E"]]) == pytest.approx(20)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in SACREBLEU])
def test_no_order_changes_a_value(name):
    """Of the examples, and of the references of one: two may be equally near."""
    found = value(name, OUTPUTS[::-1], [own[::-1] for own in UNEQUAL[::-1]])
    assert found == pytest.approx(value(name, OUTPUTS, UNEQUAL))


def test_the_interval_of_a_share_is_that_of_the_normal_distribution():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        right = rng.random(900) < share
        score = METRICS["exact_match"](["a" if k else "b" for k in right], [["a"]] * 900)
        assert score.value == pytest.approx(100 * right.mean())
        half = 1.96 * 100 * (right.mean() * (1 - right.mean()) / 900) ** 0.5
        assert score.high - score.value == pytest.approx(half, rel=0.15)
        assert score.value - score.low == pytest.approx(half, rel=0.15)
        wrong = METRICS["sequence_error_rate"](["a" if k else "b" for k in right], [["a"]] * 900)
        assert (100 - wrong.value, 100 - wrong.high, 100 - wrong.low) == pytest.approx(score[:3])


def test_the_interval_of_a_rate_is_that_of_a_ratio_of_sums():
    """Where long examples have more errors, by the delta method."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 20, 500)
    edits = rng.binomial(lengths, lengths / 40)
    outputs = [" ".join(["x"] * e + ["a"] * (n - e)) for e, n in zip(edits, lengths, strict=True)]
    score = METRICS["unit_error_rate"](outputs, [[" ".join(["a"] * n)] for n in lengths])
    rate = edits.sum() / lengths.sum()
    assert score.value == pytest.approx(100 * rate)
    half = 1.96 * 100 * (edits - rate * lengths).std() / lengths.mean() / 500**0.5
    assert (score.high - score.low) / 2 == pytest.approx(half, rel=0.15)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        sample = rng.exponential(size=100)
        low, high = interval(lambda index, sample=sample: float(sample[index].mean()), 100)
        held += low <= 1.0 <= high
    assert 86 <= held <= 99  # 95, with some spread, and the skew of so few


@pytest.mark.parametrize("name", SACREBLEU)
@pytest.mark.parametrize("references", [ONE, SEVERAL, UNEQUAL], ids=["one", "several", "unequal"])
def test_values_are_sacrebleus(name, references):
    score = METRICS[name](OUTPUTS, references)
    streams = [list(each) for each in itertools.zip_longest(*references)]
    theirs = SACREBLEU[name]().corpus_score(OUTPUTS, streams, n_bootstrap=1_000)
    assert score.value == theirs.score
    assert 0 < score.low <= score.value <= score.high < 100
    assert (score.high - score.low) / 2 == pytest.approx(theirs._ci, rel=0.1)
    count = {len(own) for own in references}
    assert score.signature.startswith(f"nrefs:{count.pop() if len(count) == 1 else 'var'}|")
    assert score.signature.endswith(f"|version:{sacrebleu.__version__}")


@pytest.mark.parametrize("name", SACREBLEU)
def test_a_reference_that_is_there_twice_changes_nothing(name):
    twice = [own * (1 + k % 2) for k, own in enumerate(SEVERAL)]
    assert value(name, OUTPUTS, twice) == value(name, OUTPUTS, SEVERAL)


WORST = {
    "bleu": 0.0,
    "chrf": 0.0,
    "exact_match": 0.0,
    "sequence_error_rate": 100.0,
    "unit_error_rate": 100.0,
    "character_error_rate": 100.0,
}


@pytest.mark.parametrize("name", METRICS)
def test_empty_outputs_are_as_wrong_as_can_be_and_right_ones_are_right(name):
    empty = METRICS[name]([""] * 5, UNEQUAL)
    assert empty[:3] == (WORST[name],) * 3
    right = METRICS[name]([own[-1] for own in SEVERAL], SEVERAL)
    assert right[:3] == pytest.approx((100 - WORST[name],) * 3)
    assert bool(right.signature) == (name in SACREBLEU)


@pytest.mark.parametrize("name", METRICS)
def test_one_good_output_among_bad_ones_has_an_interval(name):
    """Then some of what is drawn scores nothing at all."""
    score = METRICS[name](["", "", "", "so be it then"], [["so be it then"]] * 4)
    worst = [score.low, score.high][WORST[name] > 0]
    assert worst == WORST[name]
    assert score.low < score.value < score.high
