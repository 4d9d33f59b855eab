"""Scores of text against their definitions, and against sacrebleu's own functions."""

import itertools
from functools import cache

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from transformer.inference import text_metrics
from transformer.inference.text_metrics import TEXT_METRICS, Texts, bleu

approx = pytest.approx
OUTPUTS = ["the cat sat on the mat", "there is no place like home .", ""]
OUTPUTS += ["a dog barks at night in the yard", "ein Wort"]
ONE = [["the cat sat on a mat"], ["there is no place like home."], ["nothing at all"]]
ONE += [["at night a dog barks in the yard"], ["kein Wort"]]
SEVERAL = [[*own, f"{own[0]} indeed", "so be it then"] for own in ONE]
UNEQUAL = [own[: 1 + k % 3] for k, own in enumerate(SEVERAL)]
SACREBLEU = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}
SACREBLEU["joined_bleu"] = sacrebleu.BLEU  # of texts without pieces
WORST = {name: 100.0 * name.endswith("error_rate") for name in TEXT_METRICS}
PROPORTIONS = ("exact_match", "sequence_error_rate")
each_metric = pytest.mark.parametrize("name", TEXT_METRICS)


@cache
def by_definition(one, other):
    """The edits between two tuples: of the three ways to treat their last units the best."""
    if not one or not other:
        return len(one) + len(other)
    apart = by_definition(one[:-1], other), by_definition(one, other[:-1])
    return min(1 + min(apart), by_definition(one[:-1], other[:-1]) + (one[-1] != other[-1]))


UNITS = st.lists(st.sampled_from(["AH", "B", "K", "T"]), max_size=7).map(tuple)


@given(UNITS, UNITS)
def test_edit_distance_is_that_of_its_definition(one, other):
    assert text_metrics.edit_distance(one, other) == by_definition(one, other)


def score(name, outputs, references):
    return TEXT_METRICS[name].score(Texts(outputs, references))


def value(*case):
    return score(*case).value


def test_rates_by_hand():
    case = ["K AE T", "D AO G Z", "B ER D"], [["K AE T"], ["D AO G"], ["B IY D Z"]]
    assert value("exact_match", *case) == approx(100 / 3)
    assert value("sequence_error_rate", *case) == approx(200 / 3)
    # 0, 1 and 2 edits; 3, 3 and 4 phonemes.
    assert value("unit_error_rate", *case) == approx(30)
    # 0, 2 (" Z") and 4 (ER → IY, " Z"); 6, 6 and 8 characters.
    assert value("character_error_rate", *case) == approx(100 * 6 / 20)
    # Space between units is none.
    assert value("unit_error_rate", [" K  AE T "], [["K AE T"]]) == 0

    references = [["K AE T S", "K AA T"], ["B ER D"]]  # of which the nearest counts
    assert value("exact_match", ["K AA T", "B ER D"], references) == 100
    # Two edits of four phonemes, or one of three.
    assert value("unit_error_rate", ["K EH T", "B ER D"], references) == approx(100 / 6)
    # Of one edit each the longer reference is the nearer.
    assert value("unit_error_rate", ["A B C D"], [["A B C", "A B C D E"]]) == approx(20)


@pytest.mark.parametrize("name", [name for name in TEXT_METRICS if name not in SACREBLEU])
def test_no_order_changes_a_value(name):
    """Of the examples, and of the references of one: two may be equally near."""
    found = value(name, OUTPUTS[::-1], [own[::-1] for own in UNEQUAL[::-1]])
    assert found == approx(value(name, OUTPUTS, UNEQUAL))


def test_the_interval_of_a_rate_is_that_of_a_ratio_of_sums():
    """Where long examples have more errors, by the delta method."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 20, 500)
    edits = rng.binomial(lengths, lengths / 40)
    outputs = [" ".join(["x"] * e + ["a"] * (n - e)) for e, n in zip(edits, lengths, strict=True)]
    found = score("unit_error_rate", outputs, [[" ".join(["a"] * n)] for n in lengths])
    rate = edits.sum() / lengths.sum()
    assert found.value == approx(100 * rate)
    half = 1.96 * 100 * (edits - rate * lengths).std() / lengths.mean() / 500**0.5
    assert found.interval() == approx((found.value - half, found.value + half), abs=0.15 * half)
    case = outputs[:30], [["a"]] * 30
    wrong, right = score("sequence_error_rate", *case), score("exact_match", *case)
    assert 100 - wrong.value == approx(right.value)
    assert [100 - x for x in wrong.interval()] == approx(right.interval()[::-1])


@pytest.mark.parametrize("name", SACREBLEU)
@pytest.mark.parametrize("references", [ONE, SEVERAL, UNEQUAL], ids=["one", "several", "unequal"])
def test_values_are_sacrebleus(name, references):
    found = score(name, OUTPUTS, references)
    streams = [list(each) for each in itertools.zip_longest(*references)]
    theirs = SACREBLEU[name]().corpus_score(OUTPUTS, streams, n_bootstrap=1_000)
    half = float(theirs.format(width=9, score_only=True).split("±")[1].rstrip(")"))
    assert found.value == theirs.score
    low, high = found.interval()
    assert 0 < low <= found.value <= high < 100
    assert (high - low) / 2 == approx(half, rel=0.1)
    count = {len(own) for own in references}
    assert found.signature.startswith(f"nrefs:{count.pop() if len(count) == 1 else 'var'}|")
    assert found.signature.endswith(f"|version:{sacrebleu.__version__}")
    twice = [own * (1 + k % 2) for k, own in enumerate(references)]
    assert value(name, OUTPUTS, twice) == found.value


@each_metric
def test_empty_outputs_are_as_wrong_as_can_be_and_right_ones_are_right(name):
    empty = score(name, [""] * 5, UNEQUAL)
    right = score(name, [own[-1] for own in SEVERAL], SEVERAL)
    assert (empty.value, right.value) == approx((WORST[name], 100 - WORST[name]))
    for found in (empty, right):  # Wilson: z² / (n + z²), of 5 all or none
        width = 100 * 1.96**2 / (5 + 1.96**2) if name in PROPORTIONS else 0
        low, high = found.interval()
        assert high - low == approx(width, rel=1e-4)
    assert bool(right.signature) == (name in SACREBLEU)


@each_metric
def test_one_good_output_among_bad_ones_has_an_interval(name):
    """Then some of what is drawn scores nothing at all."""
    found = score(name, ["", "", "", "so be it then"], [["so be it then"]] * 4)
    low, high = found.interval()
    worst = [low, high][WORST[name] > 0]
    assert (worst == WORST[name]) == (name not in PROPORTIONS)
    assert low < found.value < high


def test_bleu_has_the_tokenizer_of_its_signature_and_warns_where_it_says_nothing():
    assert set(text_metrics.BLEU_TOKENIZERS) == set(sacrebleu.BLEU.TOKENIZERS)
    references = [["他們在公園裡吃了一個很大的蘋果"]] * 3
    outputs = ["他們在公園裡吃了一個很大的梨子"] * 3
    plain, zh = (bleu(Texts(outputs, references, tokenizer)) for tokenizer in ("13a", "zh"))
    assert plain.value == 0.0
    assert zh.value > 70
    assert "|tok:zh|" in zh.signature
    assert "set it to zh" in plain.warning
    assert "no reference has 4 tokens" in bleu(Texts(["a b c"], [["a b c", "a"]])).warning
    assert not any((zh.warning, bleu(Texts(["a"], [["a b c d", "a"]])).warning))


def test_joined_bleu_is_of_the_words_that_pieces_make():
    pieces = ["the pul@@ ley sys@@ t@@ em is old", "a@@ t the end @@ we see mo@@"]
    words = ["the pulley system is old", "at the end we see mo"]
    references = [["the pul@@ ley sys@@ tem was old"], ["at the end we s@@ ee more"]]
    joined = [["the pulley system was old"], ["at the end we see more"]]
    assert value("joined_bleu", pieces, references) == value("bleu", words, joined)
    assert value("joined_bleu", pieces, references) != value("bleu", pieces, references)
