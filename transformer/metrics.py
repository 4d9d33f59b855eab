"""Metrics on the host: ratios of sums, and the files that they are written to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer import hosts
from transformer.errors import UserError


def train_metrics(
    sums: Mapping[str, Any], seconds: float, flop_share: float | None = None
) -> dict[str, float]:
    """The ratios of an interval's sums (`training.make_train_step`) and its speed.

    With `flop_share`, what one step a second is of the devices' peak, `train/mfu` is among
    them: the model's FLOPs, none counted twice, as a fraction of the peak (Chowdhery et al. 2022,
    section 4.1).
    """
    totals = {name: float(np.asarray(value)) for name, value in sums.items()}
    # Of an interval all of whose steps were left out nothing is known.
    tokens, good = totals["tokens"] or np.nan, totals["steps"] - totals["skipped"] or np.nan
    speed = totals["steps"] / seconds
    utilisation = {} if flop_share is None else {"train/mfu": speed * flop_share}
    return utilisation | {
        "train/loss": totals["loss"] / tokens,
        "train/accuracy": totals["correct"] / tokens,
        "train/gradient_norm": totals["gradient_norm"] / good,
        "train/steps_per_second": speed,
        "train/target_tokens_per_second": totals["tokens"] / seconds,
    }


def by_replica(tree: Any, replicas: int) -> list[Any]:
    """Each replica's part of a population's arrays; of a single run, the one there is."""
    if replicas == 1:
        return [tree]
    tree = hosts.fetch(tree)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(replicas)]


def mean_over(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the replicas."""
    return {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}


class MetricsWriter:
    """Writes metrics to `metrics.jsonl`, an object a line, and to TensorBoard events.

    The JSON lines are the record; the events are for looking at. In a population each
    replica has lines of its own, with its number under `replica`, and events in a folder of
    its own. Of several hosts the first writes.

    Args:
      workdir: where the files go.
      resume_from: the step that training goes on from; what the file says of later
        steps, which will be taken again, is dropped.
      replicas: how many there are.
    """

    def __init__(self, workdir: Path, resume_from: int, replicas: int = 1):
        self.writes = hosts.first()
        if not self.writes:
            return
        from tensorboardX import SummaryWriter  # a second of import, not needed before

        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_from]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(self.path)
        self.file = self.path.open("a")
        folders = (
            [workdir] if replicas == 1 else [workdir / f"replica_{k}" for k in range(replicas)]
        )
        self.events = [SummaryWriter(str(each), purge_step=resume_from + 1) for each in folders]

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if not self.writes:
            return
        self.file.close()
        for events in self.events:
            events.close()

    def write(self, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Adds a line for `step` and each replica."""
        if not self.writes:
            return
        rows = [{"step": step, "replica": k, **each} for k, each in enumerate(metrics)]
        if len(rows) == 1:
            del rows[0]["replica"]
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()
        for events, each in zip(self.events, metrics, strict=True):
            for name, value in each.items():
                events.add_scalar(name, value, step)


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
