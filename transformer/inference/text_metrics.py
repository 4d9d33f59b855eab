"""Metrics of decoded text against its references, each declared once in `TEXT_METRICS`."""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from transformer.errors import UserError, needs

LEVEL = 0.95
RESAMPLES = 1_000
CHRF_ORDER, CHRF_BETA = 6, 2  # chrF2
BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200")
BLEU_TOKENIZERS += ("spm", "spBLEU-1K", "none")  # all of sacrebleu's
# Letters of scripts without spaces between words: Thai to Burmese, Khmer, kana, Chinese.
UNSPACED = re.compile(
    r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]{5}"
)


class Texts(NamedTuple):
    """The outputs of a model and their references.

    outputs: the outputs of the model.
    references: one or more references for each output.
    bleu_tokenizer: one of `BLEU_TOKENIZERS`; part of BLEU's signature.
    """

    outputs: Sequence[str]
    references: Sequence[Sequence[str]]
    bleu_tokenizer: str = "13a"


class Score(NamedTuple):
    """A percentage with a 95% interval: Wilson's for proportions, else the bootstrap's.

    signature: sacrebleu's signature, if the metric has one.
    warning: why the value may be misleading, if it may.
    """

    value: float
    low: float
    high: float
    signature: str = ""
    warning: str = ""


class TextMetric(NamedTuple):
    """A metric of decoded text; `better` is 1 if higher is better, -1 if lower is."""

    score: Callable[[Texts], Score]
    better: int = 1


def bleu(texts: Texts) -> Score:
    """BLEU (Papineni et al. 2002) by sacrebleu; a UserError if its tokenizer is not available."""
    with needs("text"):
        from sacrebleu.metrics import BLEU
    tokenizer = texts.bleu_tokenizer
    try:
        metric = BLEU(tokenize=tokenizer)
    except Exception as error:  # each tokenizer raises its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"bleu_tokenizer={tokenizer}: {reason}; or choose another") from error

    score = metric.corpus_score([*texts.outputs], by_position(texts.references))
    signature = str(metric.get_signature())
    pairs = zip(texts.outputs, texts.references, strict=True)
    single = [metric.corpus_score([output], [[x] for x in own]) for output, own in pairs]
    counts = np.array([[x.sys_len, x.ref_len, *x.counts, *x.totals] for x in single], float)

    def resampled(index: np.ndarray) -> float:
        total = counts[index].sum(0)
        correct, ngrams = np.split(total[2:], 2)
        lengths = int(total[0]), int(total[1])
        return BLEU.compute_bleu([*correct], [*ngrams], *lengths, smooth_method="exp").score

    warning = bleu_warning(texts, metric)
    return Score(float(score.score), *bootstrap(resampled, len(counts)), signature, warning)


def bleu_warning(texts: Texts, metric: Any) -> str:
    """Says why BLEU with this tokenizer is not meaningful for these references, if so."""
    references, tokenizer = [text for own in texts.references for text in own], texts.bleu_tokenizer
    unspaced = sum(bool(UNSPACED.search(text)) for text in references)
    order = metric.max_ngram_order
    if tokenizer in ("13a", "intl", "none") and 2 * unspaced > len(references):
        cause = (
            f"the references have no spaces between words, which bleu_tokenizer={tokenizer} needs"
        )
        return f"{cause}; set it to zh, ja-mecab or char"
    if all(len(metric.tokenizer(text).split()) < order for text in references):
        return f"no reference has {order} tokens, so BLEU is always 0; use exact_match or chrf"
    return ""


def chrf(texts: Texts) -> Score:
    """chrF2 of Popović 2015, by sacrebleu."""
    with needs("text"):
        from sacrebleu.metrics import CHRF
        from sacrebleu.metrics.helpers import extract_all_char_ngrams

    metric = CHRF(char_order=CHRF_ORDER, beta=CHRF_BETA)
    score = metric.corpus_score([*texts.outputs], by_position(texts.references))

    # Not sacrebleu's bootstrap: version 2.6 fails where a resample scores 0.
    def count(output: str, reference: str) -> Float[np.ndarray, "order 3"]:
        sides = (extract_all_char_ngrams(text, CHRF_ORDER) for text in (output, reference))
        # As in sacrebleu, the output's n-grams count if the reference has any of that order.
        rows = [
            (own.total() if ref else 0, ref.total(), (own & ref).total())
            for own, ref in zip(*sides, strict=True)
        ]
        return np.array(rows, float)

    pairs = zip(texts.outputs, texts.references, strict=True)
    counts = np.array(
        [max((count(output, reference) for reference in own), key=chrf_of) for output, own in pairs]
    )
    interval = bootstrap(lambda index: chrf_of(counts[index].sum(0)), len(counts))
    return Score(float(score.score), *interval, str(metric.get_signature()))


def chrf_of(counts: Float[np.ndarray, "order 3"]) -> float:
    """chrF from n-gram counts: those of the output, of the reference, and of their overlap."""
    output, reference, both = counts[(counts[:, :2] > 0).all(1)].T
    if not both.any():
        return 0.0
    precision, recall = (both / output).mean(), (both / reference).mean()
    weight = CHRF_BETA**2
    return float(100 * ((1 + weight) * precision * recall / (weight * precision + recall)))


def by_position(references: Sequence[Sequence[str]]) -> list[Any]:
    """The references in sacrebleu's format: the first of each output, the second, …, or None."""
    return [*map(list, itertools.zip_longest(*references))]


def exact_match(texts: Texts) -> Score:
    """The percentage of outputs that equal one of their references."""
    hits = [output in own for output, own in zip(texts.outputs, texts.references, strict=True)]
    test = scipy.stats.binomtest(sum(hits), len(hits))
    low, high = test.proportion_ci(LEVEL, method="wilson")
    return Score(100 * test.statistic, 100 * float(low), 100 * float(high))


def sequence_error_rate(texts: Texts) -> Score:
    """The percentage of outputs that equal none of their references."""
    match = exact_match(texts)
    return Score(100 - match.value, 100 - match.high, 100 - match.low)


def error_rate(split: Callable[[str], Sequence[str]], texts: Texts) -> Score:
    """Edits per unit of the nearest reference; `split` returns the units of a text."""
    edits, lengths = [], []
    for output, own in zip(texts.outputs, texts.references, strict=True):
        pairs = [(edit_distance(split(output), split(one)), len(split(one))) for one in own]
        nearest = min(pairs, key=lambda pair: (pair[0] / max(pair[1], 1), pair))
        edits.append(nearest[0])
        lengths.append(nearest[1])
    counts = np.array([edits, lengths], float)

    def resampled(index: np.ndarray) -> float:
        total, length = counts[:, index].sum(1)
        return float(100 * total / max(length, 1))

    return Score(resampled(np.arange(len(edits))), *bootstrap(resampled, len(edits)))


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The minimum number of insertions, deletions and substitutions (Levenshtein 1966)."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys([*one, *other]))}
    first, second = (np.array([numbers[unit] for unit in units], int) for units in (one, other))
    place = np.arange(len(second) + 1)
    row = place
    for k, unit in enumerate(first, 1):
        kept = np.append(k, np.minimum(row[1:] + 1, row[:-1] + (second != unit)))
        # k insertions in a row cost k.
        row = np.minimum.accumulate(kept - place) + place
    return int(row[-1])


def bootstrap(value: Callable[[np.ndarray], float], examples: int) -> tuple[float, float]:
    """The percentile interval of `value(indices)` over resampled examples; one seed for all."""
    rng = np.random.default_rng(0)
    drawn = [value(rng.integers(examples, size=examples)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


TEXT_METRICS: dict[str, TextMetric] = {
    "bleu": TextMetric(bleu),
    "chrf": TextMetric(chrf),
    "exact_match": TextMetric(exact_match),
    # The word and the phoneme error rate of the literature on pronunciations, whose targets are
    # the phonemes of a word with spaces between them.
    "sequence_error_rate": TextMetric(sequence_error_rate, better=-1),
    "unit_error_rate": TextMetric(partial(error_rate, str.split), better=-1),
    "character_error_rate": TextMetric(partial(error_rate, list), better=-1),
}


def score_texts(names: Sequence[str], texts: Texts) -> dict[str, Score]:
    """The scores named by `names`; with several references, also against the first alone."""
    against = {"": texts}
    if any(len(own) > 1 for own in texts.references):
        first = texts._replace(references=[own[:1] for own in texts.references])
        against = {", any reference": texts, ", first reference": first}
    return {
        f"{name}{which}": TEXT_METRICS[name].score(own)
        for name in names
        for which, own in against.items()
    }
