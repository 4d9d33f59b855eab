"""The results of decoding a split: metrics, also by source length, and samples of the outputs."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import EOS, PAD
from transformer.inference.decoding import Hypotheses
from transformer.inference.evaluation import Totals, exact_match
from transformer.metrics import PRINTED, finalize

SAMPLES = 50  # examples in the samples file
BUCKETS = 24  # the maximum number of rows by source length
GROUPS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]  # lengths in a row


def summarize(split: str, data: Dataset, totals: Totals, found: Hypotheses) -> dict[str, Any]:
    """The metrics of a split, of each source length, and the number of truncated outputs.

    `sequence_accuracy` is the exact match of the best hypotheses; all other metrics are those of
    teacher forcing.
    """
    outputs = np.asarray(found.tokens)[:, 0]
    exact = exact_match(outputs, np.asarray(data.target))
    return {
        "outputs_cut": int((outputs != EOS).all(1).sum()),
        "metrics": {f"{split}/{name}": value for name, value in metrics_of(totals, exact).items()},
        "by_source_length": by_source_length(np.asarray(data.source), totals, exact),
    }


def metrics_of(totals: Totals, exact: Bool[np.ndarray, "examples"]) -> dict[str, float]:
    """The metrics of some examples; see `summarize`."""
    values = finalize(totals) | {"sequence_accuracy": float(exact.mean())}
    return {name: values[name] for name in PRINTED}


def by_source_length(
    source: Int[np.ndarray, "examples S"], totals: Totals, exact: Bool[np.ndarray, "examples"]
) -> list[dict[str, Any]]:
    """The metrics for each source length (without EOS), and how many sequences have it.

    If there are more than `BUCKETS` lengths, adjacent ones share a row, labelled by the longest.
    """
    lengths = (source != PAD).sum(1) - 1
    group = next(group for group in GROUPS if lengths.max() <= BUCKETS * group)
    lengths = -(-lengths // group) * group
    rows = []
    for length in np.unique(lengths):
        chosen = lengths == length
        part = {name: each[chosen] for name, each in totals.items()}
        row = {"length": int(length), "sequences": int(chosen.sum())}
        rows.append(row | metrics_of(part, exact[chosen]))
    return rows


def targets_beyond(data: Dataset, margin: int) -> tuple[int, int]:
    """The number of targets longer than outputs may be, and the margin that would suffice."""
    source, target = ((np.asarray(side) != PAD).sum(1) for side in (data.source, data.target))
    return int((target - source > margin).sum()), int((target - source).max())


def write_samples(path: Path, tokenizers: Tokenizers, data: Dataset, found: Hypotheses) -> None:
    r"""Writes source, target and outputs of the first examples as tab-separated values.

    Each hypothesis of beam search has a line with its score. Tabs, line ends and backslashes in a
    text are escaped as \t, \n, \r and \\.
    """
    source_text, text = tokenizers.source.decode, tokenizers.target.decode
    columns = ["source", "target", "output"] + ["score"] * (found.tokens.shape[1] > 1)
    rows = [columns]
    examples = (data.source, data.target, found.tokens, found.scores)
    for source, target, outputs, scores in zip(
        *(np.asarray(side)[:SAMPLES].tolist() for side in examples), strict=True
    ):
        for output, score in zip(outputs, scores, strict=True):
            row = [source_text(source), text(target), text(output), f"{score:.4f}"]
            rows.append([escaped(field) for field in row[: len(columns)]])
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def escaped(text: str) -> str:
    """`text` as a field of tab-separated values."""
    return text.translate({92: r"\\", 9: r"\t", 10: r"\n", 13: r"\r"})
