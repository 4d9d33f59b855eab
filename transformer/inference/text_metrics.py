"""Metrics of decoded text against its references, each declared once in `TEXT_METRICS`."""

import itertools
import re
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy

from transformer.console import facts, table
from transformer.errors import explained, needs
from transformer.metrics import METRICS

LEVEL = 0.95
RESAMPLES = 1_000
BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200")
BLEU_TOKENIZERS += ("spm", "spBLEU-1K", "none")  # all of sacrebleu's
# Letters of scripts without spaces between words: Thai to Burmese, Khmer, kana, Chinese.
UNSPACED = "[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]{5}"


class Texts(NamedTuple):
    """The outputs of a model and their references."""

    outputs: Sequence[str]
    references: Sequence[Sequence[str]]  # one or more for each output
    bleu_tokenizer: str = "13a"  # one of `BLEU_TOKENIZERS`; part of BLEU's signature

    def pairs(self) -> list[tuple[str, Sequence[str]]]:
        """Each output with its references."""
        return list(zip(*self[:2], strict=True))

    def by_position(self) -> list[Any]:
        """The references for sacrebleu: the first of each output, the second, …, or None."""
        return [*map(list, itertools.zip_longest(*self.references))]


@dataclass(frozen=True)
class Score:
    """A percentage with a 95% interval: Wilson's for proportions, else the bootstrap's."""

    value: float
    interval: Callable[[], tuple[float, float]]  # a function, as it takes longer than the value
    signature: str = ""  # sacrebleu's, if the metric has one
    warning: str = ""  # why the value may be misleading, if it may

    def record(self) -> dict[str, Any]:
        """The score with its interval, for a file of results."""
        low, high = self.interval()
        said = {"signature": self.signature, "warning": self.warning}
        return {"value": self.value, "low": low, "high": high} | said


@dataclass(frozen=True)
class TextMetric:
    """How a metric of decoded text is computed and printed."""

    score: Callable[[Texts], Score]
    better: int = 1  # 1 if more is better, -1 if less is
    format: Callable[[float], str] = "{:.2f}".format


def bleu(texts: Texts) -> Score:
    """BLEU (Papineni et al. 2002) by sacrebleu; a UserError if its tokenizer is not available."""
    with needs("text"):
        from sacrebleu.metrics import BLEU
    tokenizer = texts.bleu_tokenizer
    with explained(f"bleu_tokenizer={tokenizer}: {{reason}}; or choose another"):
        metric = BLEU(tokenize=tokenizer)
    order = metric.max_ngram_order
    score = metric.corpus_score([*texts.outputs], texts.by_position())
    signature = str(metric.get_signature())  # it changes with each score

    def interval() -> tuple[float, float]:
        single = [metric.corpus_score([out], [[x] for x in own]) for out, own in texts.pairs()]
        counts = [[x.sys_len, x.ref_len, *x.counts, *x.totals] for x in single]
        return bootstrap(value, np.array(counts, float))

    def value(total: np.ndarray) -> float:
        lengths, correct, ngrams = np.split(total, [2, 2 + order])
        sizes = map(int, lengths)
        return BLEU.compute_bleu([*correct], [*ngrams], *sizes, smooth_method="exp").score

    warning, references = "", [text for own in texts.references for text in own]
    unspaced = sum(bool(re.search(UNSPACED, text)) for text in references)
    if tokenizer in ("13a", "intl", "none") and 2 * unspaced > len(references):
        warning = "the references have no spaces between words, which "
        warning += f"bleu_tokenizer={tokenizer} needs; set it to zh, ja-mecab or char"
    elif all(len(metric.tokenizer(x).split()) < order for x in references):
        warning = f"no reference has {order} tokens, so BLEU is always 0; use exact_match or chrf"
    return Score(float(score.score), interval, signature, warning)


def joined_bleu(texts: Texts) -> Score:
    """BLEU of words that are written as BPE pieces: `pul@@ ley` is one (Sennrich et al. 2016)."""

    def join(text: str) -> str:
        return re.sub("@@( |$)", "", text)

    references = [[*map(join, own)] for own in texts.references]
    return bleu(texts._replace(outputs=[*map(join, texts.outputs)], references=references))


def chrf(texts: Texts) -> Score:
    """chrF2 of Popović 2015, by sacrebleu."""
    with needs("text"):
        from sacrebleu.metrics import CHRF
        from sacrebleu.metrics.helpers import extract_all_char_ngrams
    metric = CHRF()
    score = metric.corpus_score([*texts.outputs], texts.by_position())

    # Not sacrebleu's bootstrap: version 2.6 fails where a resample scores 0.
    def count(output: str, reference: str) -> np.ndarray:
        """[order, 3]: the n-grams of the output, of the reference, and of their overlap."""
        sides = (extract_all_char_ngrams(text, metric.char_order) for text in (output, reference))
        # As in sacrebleu, the output's n-grams count if the reference has any of that order.
        rows = [
            (own.total() if ref else 0, ref.total(), (own & ref).total())
            for own, ref in zip(*sides, strict=True)
        ]
        return np.array(rows, float)

    def value(counts: np.ndarray) -> float:
        output, reference, both = counts[(counts[:, :2] > 0).all(1)].T
        if not both.any():
            return 0.0
        precision, recall = (both / output).mean(), (both / reference).mean()
        weight = metric.beta**2
        return float(100 * ((1 + weight) * precision * recall / (weight * precision + recall)))

    def interval() -> tuple[float, float]:
        counts = [max((count(output, x) for x in own), key=value) for output, own in texts.pairs()]
        return bootstrap(value, np.array(counts))

    return Score(float(score.score), interval, str(metric.get_signature()))


def exact_match(texts: Texts) -> Score:
    """The percentage of outputs that equal one of their references."""
    hits = [output in own for output, own in texts.pairs()]

    def interval() -> tuple[float, float]:
        test = scipy.stats.binomtest(sum(hits), len(hits))
        low, high = test.proportion_ci(LEVEL, method="wilson")
        return 100 * float(low), 100 * float(high)

    return Score(100 * sum(hits) / len(hits), interval)


def sequence_error_rate(texts: Texts) -> Score:
    """The percentage of outputs that equal none of their references."""
    match = exact_match(texts)

    def interval() -> tuple[float, float]:
        low, high = match.interval()
        return 100 - high, 100 - low

    return Score(100 - match.value, interval)


def error_rate(split: Callable[[str], Sequence[str]], texts: Texts) -> Score:
    """Edits per unit of the nearest reference; `split` returns the units of a text."""

    def nearest(output: str, references: Sequence[str]) -> tuple[int, int]:
        pairs = [(edit_distance(split(output), split(x)), len(split(x))) for x in references]
        return min(pairs, key=lambda pair: (pair[0] / max(pair[1], 1), pair))

    counts = np.array([nearest(*pair) for pair in texts.pairs()], float)

    def value(total: np.ndarray) -> float:
        return float(100 * total[0] / max(total[1], 1))

    return Score(value(counts.sum(0)), partial(bootstrap, value, counts))


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The minimum number of insertions, deletions and substitutions (Levenshtein 1966)."""
    units, place = np.array(other, object), np.arange(len(other) + 1)
    row = place
    for k, unit in enumerate(one, 1):
        kept = np.append(k, np.minimum(row[1:] + 1, row[:-1] + (units != unit)))
        row = np.minimum.accumulate(kept - place) + place  # k insertions in a row cost k
    return int(row[-1])


def bootstrap(value: Callable[[np.ndarray], float], counts: np.ndarray) -> tuple[float, float]:
    """The percentile interval of `value(sum of counts)` over resampled examples; one seed."""
    rng, size = np.random.default_rng(0), len(counts)
    drawn = [value(counts[rng.integers(size, size=size)].sum(0)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


TEXT_METRICS: dict[str, TextMetric] = {
    "bleu": TextMetric(bleu),
    "joined_bleu": TextMetric(joined_bleu),
    "chrf": TextMetric(chrf),
    "exact_match": TextMetric(exact_match),
    # Of pronunciations, the next two are the word and the phoneme error rate of the literature.
    "sequence_error_rate": TextMetric(sequence_error_rate, better=-1),
    "unit_error_rate": TextMetric(partial(error_rate, str.split), better=-1),
    "character_error_rate": TextMetric(partial(error_rate, list), better=-1),
}
# What training may log as `validation/name` and rank checkpoints by: a view of both tables.
VALIDATION_METRICS: ChainMap[str, Any] = ChainMap(TEXT_METRICS, METRICS)


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


def show_scores(texts: Sequence[dict[str, Any]]) -> None:
    """Prints the text metrics with their intervals; for a population, their mean and range."""
    rows = []
    for name, first in texts[0].items():
        values = [one[name]["value"] for one in texts]
        low, high = (first["low"], first["high"]) if len(texts) == 1 else (min(values), max(values))
        rows.append((name.replace("_", " "), f"{np.mean(values):.2f}", f"{low:.2f} to {high:.2f}"))
    if rows:
        spread = "95% interval" if len(texts) == 1 else f"range of {len(texts)} replicas"
        table("decoded text, in percent", ("metric", "value", spread), rows)
    for key in ("signature", "warning"):
        facts({name: score[key] for name, score in texts[0].items()})
