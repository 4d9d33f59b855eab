"""Metrics on the host: ratios of sums, and the files that they are written to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transformer.errors import UserError


def train_metrics(sums: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """The ratios of an interval's sums (`training.make_train_step`) and its speed."""
    totals = {name: float(np.asarray(value)) for name, value in sums.items()}
    return {
        "train/loss": totals["loss"] / totals["tokens"],
        "train/accuracy": totals["correct"] / totals["tokens"],
        "train/gradient_norm": totals["gradient_norm"] / totals["steps"],
        "train/steps_per_second": totals["steps"] / seconds,
        "train/target_tokens_per_second": totals["tokens"] / seconds,
    }


class MetricsWriter:
    """Writes metrics to `metrics.jsonl`, an object a line, and to TensorBoard events.

    The JSON lines are the record; the events are for looking at.

    Args:
      workdir: where the files go.
      resume_from: the step that training goes on from; what the file says of later
        steps, which will be taken again, is dropped.
    """

    def __init__(self, workdir: Path, resume_from: int):
        from tensorboardX import SummaryWriter  # a second of import, not needed before

        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_from]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(self.path)
        self.file = self.path.open("a")
        self.events = SummaryWriter(str(workdir), purge_step=resume_from + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.events.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line for `step`."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, without a last line that was cut off in writing."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")  # the last part is empty, or cut off
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged; delete or mend the line") from error
    return rows
