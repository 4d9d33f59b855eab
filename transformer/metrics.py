"""Metrics of teacher-forced predictions, each declared once in `METRICS`.

A metric declares what it sums over target tokens, how the sums become a value, how the value is
printed and whether more is better. The device accumulates the sums, of an interval in training and
of each example in evaluation; the host computes the values. Files, tables and plots iterate over
`METRICS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.loss import TokenLosses


class Predictions(NamedTuple):
    """A batch's predictions under teacher forcing, which metrics are computed from."""

    logits: Float[Array, "B T V"]
    targets: Int[Array, "B T"]
    losses: TokenLosses


def figure(value: float) -> str:
    """Four significant digits; large whole numbers with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def near_one(value: float) -> str:
    """Enough digits to tell a perplexity from 1."""
    return f"{value:.4f}" if value < 10 else figure(value)


def percent(value: float) -> str:
    """0.9990 → 99.90%"""
    return f"{value:.2%}"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is accumulated, finalised and printed.

    sums: name → what is summed over target tokens, [B, T]. Metrics may share sums.
    value: totals → value. Totals are scalars or, in evaluation, arrays [examples]; `tokens` and
      `label_smoothing` are among them.
    format: value → text.
    better: 1 if more is better, -1 if less is.
    printed: whether tables have it, under its name.
    """

    sums: Mapping[str, Callable[[Predictions], Array]]
    value: Callable[[Mapping[str, Any]], float]
    format: Callable[[float], str] = figure
    better: int = 1
    printed: bool = True


def per_token(totals: Mapping[str, Any], name: str) -> float:
    """The mean of what `name` sums over the target tokens."""
    return float(np.sum(totals[name])) / float(np.sum(totals["tokens"]))


def objective(totals: Mapping[str, Any]) -> float:
    """The cross-entropy with label smoothing per target token."""
    smoothing = totals["label_smoothing"]
    return (1.0 - smoothing) * per_token(totals, "nll") + smoothing * per_token(totals, "uniform")


NLL = {"nll": lambda predictions: predictions.losses.nll}  # nats
UNIFORM = {"uniform": lambda predictions: predictions.losses.uniform}
CORRECT = {
    "correct": lambda predictions: jnp.where(
        predictions.logits.argmax(-1) == predictions.targets, 1.0, 0.0
    )
}

METRICS: dict[str, Metric] = {
    # Nats per target token, without label smoothing.
    "loss": Metric(sums=NLL, value=lambda totals: per_token(totals, "nll"), better=-1),
    # With label smoothing: what training minimises.
    "objective": Metric(sums=NLL | UNIFORM, value=objective, better=-1, printed=False),
    "perplexity": Metric(
        sums=NLL,
        value=lambda totals: float(np.exp(per_token(totals, "nll"))),
        format=near_one,
        better=-1,
    ),
    "token_accuracy": Metric(
        sums=CORRECT, value=lambda totals: per_token(totals, "correct"), format=percent
    ),
    # Of examples whose tokens are all predicted. Equal to the exact match of greedy decoding:
    # while the output agrees with the target, the decoder has read the target.
    "sequence_accuracy": Metric(
        sums=CORRECT,
        value=lambda totals: float((totals["correct"] == totals["tokens"]).mean()),
        format=percent,
    ),
}


PRINTED = {name: metric for name, metric in METRICS.items() if metric.printed}


def token_sums(predictions: Predictions) -> dict[str, Float[Array, "B T"]]:
    """Returns what the metrics sum, for each target token, before weighting."""
    sums = {name: of for metric in METRICS.values() for name, of in metric.sums.items()}
    return {name: of(predictions) for name, of in sums.items()}


def finalize(
    totals: Mapping[str, Any], prefix: str = "", label_smoothing: float = 0.0
) -> dict[str, float]:
    """`prefix/name` → value of each metric; `name` without a prefix.

    Args:
      totals: `token_sums` of each example over its tokens, and their number `tokens`; [examples].
      prefix: of the names, such as `validation`.
      label_smoothing: ε of the objective.
    """
    totals = {**totals, "label_smoothing": label_smoothing}
    before = f"{prefix}/" if prefix else ""
    return {f"{before}{name}": metric.value(totals) for name, metric in METRICS.items()}
