"""How near decoded text is to its references: BLEU, chrF, exact match, and rates of edits."""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy

from transformer.errors import UserError, needs

LEVEL = 0.95
RESAMPLES = 1_000
References = Sequence[Sequence[str]]  # of each output, one or more
BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200")
BLEU_TOKENIZERS += ("spm", "spBLEU-1K", "none")  # all of sacrebleu's
# Letters of scripts without spaces between words: Thai to Burmese, Khmer, kana, Chinese.
UNSPACED = re.compile(
    r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]{5}"
)


class Score(NamedTuple):
    """A percentage with a 95% interval over the examples.

    low, high: Wilson's interval of a proportion, else the bootstrap's (percentiles).
    signature: of sacrebleu's metrics, so that others can compute the same value; else empty.
    warning: why the value may mislead; else empty.
    """

    value: float
    low: float
    high: float
    signature: str = ""
    warning: str = ""


def bleu(outputs: Sequence[str], references: References, tokenizer: str = "13a") -> Score:
    """Papineni et al. 2002, as sacrebleu computes it (Post 2018).

    Args:
      outputs: of the model.
      references: one or more of each.
      tokenizer: one of `BLEU_TOKENIZERS`; it is part of the signature.

    Raises:
      UserError: the tokenizer lacks a package, or a model that it downloads.
    """
    with needs("text"):
        from sacrebleu.metrics import BLEU
    try:
        metric = BLEU(tokenize=tokenizer)
    except Exception as error:  # each tokenizer has its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"bleu_tokenizer={tokenizer}: {reason}; or choose another") from error

    warning, order = "", metric.max_ngram_order
    texts = [text for own in references for text in own]
    unspaced = sum(bool(UNSPACED.search(text)) for text in texts)
    if tokenizer in ("13a", "intl", "none") and 2 * unspaced > len(texts):
        warning = (
            f"the references have no spaces between words, which bleu_tokenizer={tokenizer} "
            "needs; set it to zh, ja-mecab or char"
        )
    elif all(len(metric.tokenizer(text).split()) < order for text in texts):
        warning = (
            f"no reference has {order} tokens, so that BLEU is 0 whatever the outputs are; "
            "exact_match and chrf tell more"
        )
    return by_sacrebleu(metric, outputs, references)._replace(warning=warning)


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
    test = scipy.stats.binomtest(sum(right), len(right))
    low, high = test.proportion_ci(LEVEL, method="wilson")
    return Score(100 * test.statistic, 100 * float(low), 100 * float(high))


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


TEXT_METRICS: dict[str, Callable[[Sequence[str], References], Score]] = {
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    # Where a target is the phonemes of a word, with spaces between them, the literature calls
    # these two the word error rate and the phoneme error rate.
    "sequence_error_rate": sequence_error_rate,
    "unit_error_rate": partial(error_rate, str.split),
    "character_error_rate": partial(error_rate, list),
}
