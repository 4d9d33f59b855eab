"""Metrics of teacher-forced predictions, each declared once in `METRICS`.

The device sums over target tokens, of an interval in training and of each example in evaluation;
the host computes the metrics from the sums. Files, tables and plots iterate over `METRICS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from transformer.loss import Predictions


def figure(value: float) -> str:
    """Four significant digits; large whole numbers with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float) -> str:
    """0.9990 → 99.90%"""
    return f"{value:.2%}"


Totals = Mapping[str, Any]  # scalars or, in evaluation, arrays [examples]


@dataclass(frozen=True)
class Metric:
    """How a metric is accumulated, finalised and printed."""

    sums: Mapping[str, Callable[[Predictions], Array]]  # of each token; metrics may share them
    value: Callable[[Totals], float]  # of sums, and of `tokens` and `label_smoothing`
    format: Callable[[float], str] = figure
    better: int = 1  # 1 if more is better, -1 if less is
    printed: bool = True  # in tables, under its name


def per_token(totals: Totals, name: str) -> float:
    """The mean of what `name` sums over the target tokens."""
    return float(np.sum(totals[name])) / float(np.sum(totals["tokens"]))


def objective(totals: Totals) -> float:
    """The cross-entropy with label smoothing per target token, which training minimises."""
    smoothing = totals["label_smoothing"]
    return (1.0 - smoothing) * per_token(totals, "nll") + smoothing * per_token(totals, "uniform")


def is_predicted(predictions: Predictions) -> Array:
    """1 where the target is the most likely token, the first of equal ones, as for greedy decoding.

    A comparison, since `argmax` takes 15 times as long on a CPU.
    """
    logits, targets = predictions.logits, predictions.targets[..., None]
    own = jnp.take_along_axis(logits, targets, axis=-1, mode="fill")
    is_earlier = jnp.arange(logits.shape[-1]) < targets
    is_beaten = ((logits > own) | ((logits == own) & is_earlier)).any(-1)
    return jnp.where(is_beaten | jnp.isnan(predictions.nll), 0.0, 1.0)


NLL = {"nll": lambda predictions: predictions.nll}  # nats
UNIFORM = {"uniform": lambda predictions: predictions.uniform}
CORRECT = {"correct": is_predicted}

METRICS: dict[str, Metric] = {
    "loss": Metric(NLL, lambda totals: per_token(totals, "nll"), better=-1),
    "objective": Metric(NLL | UNIFORM, objective, better=-1, printed=False),
    "perplexity": Metric(
        NLL,
        lambda totals: float(np.exp(per_token(totals, "nll"))),
        lambda value: f"{value:.4f}" if value < 10 else figure(value),  # to tell it from 1
        better=-1,
    ),
    "token_accuracy": Metric(CORRECT, lambda totals: per_token(totals, "correct"), percent),
    # Of examples whose tokens are all predicted. Equal to the exact match of greedy decoding:
    # while the output agrees with the target, the decoder has read the target.
    "sequence_accuracy": Metric(
        CORRECT, lambda totals: float((totals["correct"] == totals["tokens"]).mean()), percent
    ),
}
PRINTED = {name: metric for name, metric in METRICS.items() if metric.printed}


def token_sums(predictions: Predictions) -> dict[str, Float[Array, "*B"]]:
    """What the metrics sum, for each target token, before weighting."""
    sums = {name: of for metric in METRICS.values() for name, of in metric.sums.items()}
    return {name: of(predictions) for name, of in sums.items()}


def finalize(totals: Totals, prefix: str = "", label_smoothing: float = 0.0) -> dict[str, float]:
    """`prefix/name` → value of each metric, of the `token_sums` of examples and their `tokens`."""
    totals = {**totals, "label_smoothing": label_smoothing}
    before = f"{prefix}/" if prefix else ""
    return {f"{before}{name}": metric.value(totals) for name, metric in METRICS.items()}
