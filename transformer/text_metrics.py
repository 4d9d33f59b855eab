"""How near decoded text is to its references: BLEU, chrF, exact match, and rates of edits."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from transformer.errors import needs

LEVEL = 0.95
RESAMPLES = 1_000
References = Sequence[Sequence[str]]  # of each output, one or more


class Score(NamedTuple):
    """A percentage, with an interval from resampling the examples.

    low, high: the bootstrap's 95% interval (percentiles).
    signature: of sacrebleu's metrics, so that others can compute the same value; else empty.
    """

    value: float
    low: float
    high: float
    signature: str = ""


def bleu(outputs: Sequence[str], references: References) -> Score:
    """Papineni et al. 2002, as sacrebleu computes it (Post 2018)."""
    with needs("text"):
        from sacrebleu.metrics import BLEU

    return by_sacrebleu(BLEU(), outputs, references)


def chrf(outputs: Sequence[str], references: References) -> Score:
    """chrF2 of Popović 2015, as sacrebleu computes it."""
    with needs("text"):
        from sacrebleu.metrics import CHRF

    return by_sacrebleu(CHRF(), outputs, references)


def by_sacrebleu(metric: Any, outputs: Sequence[str], references: References) -> Score:
    """Of a metric of sacrebleu."""
    # It wants the first reference of each output, the second of each, and so on; None: no more.
    streams = list(map(list, itertools.zip_longest(*references)))
    value = metric.corpus_score(list(outputs), streams).score
    # Not its own bootstrap: sacrebleu 2.6 cannot take the mean of chrF where some drawn are 0.
    counts = np.array(metric._extract_corpus_statistics(list(outputs), streams), float)

    def of_drawn(index: np.ndarray) -> float:
        return metric._compute_score_from_stats(counts[index].sum(0)).score

    return Score(float(value), *interval(of_drawn, len(counts)), str(metric.get_signature()))


def exact_match(outputs: Sequence[str], references: References) -> Score:
    """Outputs that are one of their references."""
    right = [output in own for output, own in zip(outputs, references, strict=True)]
    return ratio(np.array(right, float), np.ones(len(right)))


def sequence_error_rate(outputs: Sequence[str], references: References) -> Score:
    """Outputs that are none of their references."""
    right = exact_match(outputs, references)
    return Score(100 - right.value, 100 - right.high, 100 - right.low)


def error_rate(
    split: Callable[[str], Sequence[str]], outputs: Sequence[str], references: References
) -> Score:
    """Edits that lead to the reference, for each of its units; of several, to the nearest.

    Args:
      split: a text's units.
      outputs: of the model.
      references: one or more of each.
    """
    edits, lengths = [], []
    for output, own in zip(outputs, references, strict=True):
        pairs = [(edit_distance(split(output), split(one)), len(split(one))) for one in own]
        nearest = min(pairs, key=lambda pair: (pair[0] / max(pair[1], 1), pair))
        edits.append(nearest[0])
        lengths.append(nearest[1])
    return ratio(np.array(edits, float), np.array(lengths, float))


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions (Levenshtein 1966)."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys([*one, *other]))}
    first, second = (np.array([numbers[unit] for unit in units], int) for units in (one, other))
    place = np.arange(len(second) + 1)
    row = place
    for k, unit in enumerate(first, 1):
        kept = np.append(k, np.minimum(row[1:] + 1, row[:-1] + (second != unit)))
        # An insertion costs 1 for each place to the right of where it begins.
        row = np.minimum.accumulate(kept - place) + place
    return int(row[-1])


def ratio(over: np.ndarray, under: np.ndarray) -> Score:
    """Σ over / Σ under in percent."""

    def of_drawn(index: np.ndarray) -> float:
        return float(100 * over[index].sum() / max(under[index].sum(), 1))

    return Score(of_drawn(np.arange(len(over))), *interval(of_drawn, len(over)))


def interval(value: Callable[[np.ndarray], float], examples: int) -> tuple[float, float]:
    """The percentile interval of the bootstrap; the same examples are drawn for every metric.

    Args:
      value: the metric of the examples with these numbers.
      examples: how many there are.
    """
    rng = np.random.default_rng(0)
    drawn = [value(rng.integers(examples, size=examples)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


METRICS: dict[str, Callable[[Sequence[str], References], Score]] = {
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    # Where a target is the phonemes of a word, with spaces between them, the literature calls
    # these two the word error rate and the phoneme error rate.
    "sequence_error_rate": sequence_error_rate,
    "unit_error_rate": partial(error_rate, str.split),
    "character_error_rate": partial(error_rate, list),
}
