"""Early stopping: a run ends once its validation metric has not improved for some evaluations."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer.inference.text_metrics import VALIDATION_METRICS
from transformer.parallel import hosts
from transformer.training.metrics import read_metrics

if TYPE_CHECKING:
    from transformer.config import RunConfig


class EarlyStopping:
    """Says when each replica ends, by the history of `best_metric`.

    `rows` are those of `metrics.jsonl`, so that a resumed run ends where it would have ended
    without the interruption. Evaluations without the metric do not count; NaN is the worst value.
    """

    def __init__(self, config: "RunConfig", rows: Iterable[Mapping[str, Any]]):
        self.config, self.name = config, f"validation/{config.best_metric}"
        self.metric = VALIDATION_METRICS[config.best_metric]
        self.values: list[dict[int, float]] = [{} for _ in range(config.replicas)]  # step → value
        for row in rows:
            self.add(row.get("replica", 0), row["step"], row)

    @classmethod
    def resumed(cls, config: "RunConfig", metrics: Path) -> "EarlyStopping":
        rows = hosts.once(partial(read_metrics, metrics)) if config.patience else []
        return cls(config, rows)

    def add(self, replica: int, step: int, metrics: Mapping[str, float | int]) -> None:
        """Adds an evaluation of a replica; one of the same step replaces it."""
        if self.name in metrics:
            self.values[replica][step] = metrics[self.name]

    def reason(self, replica: int) -> str | None:
        """Why the replica ends after the evaluations so far; None: it does not."""
        values, patience = self.values[replica], self.config.patience
        if len(values) <= patience:
            return None
        merits = np.nan_to_num([self.metric.better * x for x in values.values()], nan=-np.inf)
        best = int(np.argmax(merits))  # the first of equal ones
        if len(merits) - best <= patience:
            return None
        step, value = list(values.items())[best]
        count = f"{patience} evaluations" if patience > 1 else "an evaluation"
        found = f"best {self.metric.format(value)} at step {step:,}"
        return f"{self.name} has not improved for {count}; {found}"
