"""Training metrics, each declared once in `TRAIN_METRICS`, and the files they are written to.

The step accumulates sums on the device; the host divides them once per interval (`finalize`).
"""

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from transformer.errors import explained
from transformer.files import nan_for_null, to_json, write_atomically
from transformer.metrics import CORRECT, NLL, Predictions
from transformer.parallel import hosts

# Name of a metric or a count → its total over steps.
Sums = dict[str, Float[Array, "*R"]]

COUNTS = ("tokens", "steps", "skipped", "stopped")  # `steps` includes the other two


class Update(NamedTuple):
    """An update of the trained parameters, from which metrics are computed."""

    gradients: Any  # before clipping
    updates: Any
    params: Any
    learning_rate: Float[Array, ""]


class Interval(NamedTuple):
    """The steps since the last line of metrics, as the host sees them."""

    sums: Mapping[str, Any]  # name → total
    seconds: float  # of training, without validation
    peak_share: float | None = None  # of the peak FLOPs, at a step per second; None: unknown
    wait_share: float | None = None  # data windows not ready in time; None: data are on the devices

    def rate(self, count: str) -> float:
        return self.sums[count] / self.seconds


@dataclass(frozen=True, kw_only=True)
class TrainMetric:
    """A training metric over an interval; exactly one of `token`, `update` and `host` is set."""

    # Predictions → a number for each of their tokens; averaged over target tokens.
    token: Callable[[Predictions], Array] | None = None
    # Update → scalar; averaged over the updates that were not skipped.
    update: Callable[[Update], Array] | None = None
    # Interval → the metric; None: it is omitted.
    host: Callable[[Interval], float | None] | None = None
    bar: str | None = None  # its format string in the progress bar; None: it is not shown
    per_replica: bool = True  # whether the bar shows the mean over replicas, not their sum


TRAIN_METRICS: dict[str, TrainMetric] = {
    # Nats per target token, without label smoothing: comparable with validation/loss.
    "loss": TrainMetric(token=NLL["nll"], bar="loss {:.4f}"),
    # The minimised objective, with label smoothing.
    "objective": TrainMetric(token=lambda predictions: predictions.objective),
    "accuracy": TrainMetric(token=CORRECT["correct"]),
    "gradient_norm": TrainMetric(update=lambda update: optax.tree.norm(update.gradients)),
    "learning_rate": TrainMetric(update=lambda update: update.learning_rate),
    "steps_per_second": TrainMetric(host=lambda span: span.rate("steps"), bar="{:.1f} steps/s"),
    "target_tokens_per_second": TrainMetric(
        host=lambda span: span.rate("tokens"), bar="{:,.0f} target tokens/s", per_replica=False
    ),
    # Model FLOPs utilisation (Chowdhery et al. 2022, section 4.1): no FLOP is counted twice.
    "mfu": TrainMetric(host=lambda span: span.peak_share and span.rate("steps") * span.peak_share),
    "data_waits": TrainMetric(host=lambda span: span.wait_share, bar="waited for data {:.0%}"),
}


def token_metrics(predictions: Predictions) -> dict[str, Array]:
    """The per-token metrics of each token."""
    metrics = TRAIN_METRICS.items()
    return {f"train/{name}": metric.token(predictions) for name, metric in metrics if metric.token}


def sum_over_updates(update: Update) -> Sums:
    """The per-update metrics of one update."""
    metrics = TRAIN_METRICS.items()
    return {f"train/{name}": metric.update(update) for name, metric in metrics if metric.update}


def zero_sums(replicas: int = 1) -> Sums:
    """The sums before the first step of an interval: zeros."""
    names = [f"train/{name}" for name, metric in TRAIN_METRICS.items() if not metric.host]
    return {name: jnp.zeros(() if replicas == 1 else replicas) for name in (*names, *COUNTS)}


def finalize(interval: Interval) -> dict[str, float]:
    """Returns `train/name` → value of each metric; NaN if the interval has no finite update."""
    sums = {name: float(np.asarray(total)) for name, total in interval.sums.items()}
    interval = interval._replace(sums=sums)
    tokens, updates = sums["tokens"] or np.nan, sums["steps"] - sums["skipped"] or np.nan
    metrics = {}
    for name, metric in TRAIN_METRICS.items():
        if not metric.host:
            metrics[f"train/{name}"] = sums[f"train/{name}"] / (tokens if metric.token else updates)
        elif (value := metric.host(interval)) is not None:
            metrics[f"train/{name}"] = value
    return metrics


UNWRITTEN = "metrics.jsonl, or the events beside it, could not be written: {reason}"
_explained = explained(f"{UNWRITTEN}; free space, or choose another --workdir", OSError)


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Writes metrics to `metrics.jsonl`, one object per line, and to TensorBoard events.

    In a population each replica has its own lines, with its index in `replica`, and its own folder
    of events. Only the first of several hosts writes. Steps after `resume_from` are dropped.
    tensorboardX's SummaryWriter is not used: its callers block forever when the disk is full.
    """

    FLUSH = 10.0  # seconds between flushes of the events, each of which is an fsync

    @_explained
    def __init__(self, workdir: Path, resume_from: int, replicas: int = 1):
        self.writes = hosts.first()
        if not self.writes:
            return
        # Imports PyTorch if that is installed, in 2 s.
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2

        path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= resume_from]
        write_atomically(path, "".join(to_json(row) + "\n" for row in kept).encode())
        self.file = path.open("a", encoding="utf-8")
        folders = [workdir / f"replica_{k}" for k in range(replicas)] if replicas > 1 else [workdir]
        self.proto: Any = event_pb2  # its classes are invisible to a type checker
        start = self.proto.SessionLog(status=self.proto.SessionLog.START)
        self.events, self.flushed = [], time.monotonic()
        for folder in folders:
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
            self.events.append(RecordWriter(str(folder / name)))
            self._add_event(self.events[-1], resume_from + 1, file_version="brain.Event:2")
            self._add_event(self.events[-1], resume_from + 1, session_log=start)

    @_explained
    def __exit__(self, *_) -> None:
        if self.writes:
            self.file.close()
            for events in self.events:
                events.close()

    @_explained
    def write(self, step: int, metrics: Sequence[Mapping[str, float] | None]) -> None:
        """Writes the metrics of each replica; None for one without."""
        for k, each in enumerate(metrics if self.writes else ()):
            if each is None:
                continue
            replica = {"replica": k} if len(metrics) > 1 else {}
            self.file.write(to_json({"step": step, **replica, **each}) + "\n")
            self.file.flush()
            values = [{"tag": name, "simple_value": value} for name, value in each.items()]
            self._add_event(self.events[k], step, summary={"value": values})
        if self.writes and time.monotonic() - self.flushed > self.FLUSH:
            for events in self.events:
                events.flush()
            self.flushed = time.monotonic()

    def _add_event(self, events: Any, step: int, **content: Any) -> None:
        event = self.proto.Event(wall_time=time.time(), step=step, **content)
        events.write(event.SerializeToString())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, without an incomplete last line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # the last part is empty, or cut off
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        with explained(f"{path}, line {number} is damaged; delete or fix the line", ValueError):
            rows.append(nan_for_null(json.loads(line)))
    return rows
