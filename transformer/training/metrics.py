"""Training metrics, each declared once in `TRAIN_METRICS`, and the files they are written to.

The step accumulates sums on the device; the host divides them once per interval (`finalize`).
metrics.jsonl, TensorBoard, the progress bar and reports follow from the declaration.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from transformer.errors import UserError
from transformer.files import nan_for_null, to_json
from transformer.metrics import CORRECT, NLL, Predictions
from transformer.parallel import hosts

# Name of a metric or a count → its total over steps.
Sums = dict[str, Float[Array, "*R"]]

COUNTS = ("tokens", "steps", "skipped", "stopped")  # `steps` includes the other two


class Update(NamedTuple):
    """A parameter update, from which metrics are computed."""

    gradients: Any  # before clipping
    updates: Any
    params: Any
    learning_rate: Float[Array, ""]


class Interval(NamedTuple):
    """The steps since the last line of metrics, as the host sees them.

    sums: name → total.
    seconds: the training time, without validation.
    peak_share: the fraction of the devices' peak FLOPs that one step per second takes; None: the
      peak is unknown.
    wait_share: the fraction of the data windows that were not ready; None: data are on the devices.
    """

    sums: Mapping[str, Any]
    seconds: float
    peak_share: float | None = None
    wait_share: float | None = None

    def rate(self, count: str) -> float:
        """A count per second."""
        return self.sums[count] / self.seconds


@dataclass(frozen=True, kw_only=True)
class TrainMetric:
    """A training metric over an interval; exactly one of `token`, `update` and `host` is set.

    token: (predictions, objective) → [B, T]; its mean over target tokens is the metric. The
      objective is the cross-entropy with label smoothing.
    update: update → scalar; its mean over the updates that were not skipped is the metric.
    host: interval → the metric; None: the metric is omitted.
    bar: its format string in the progress bar; None: it is not shown.
    per_replica: whether the bar shows the mean over replicas rather than their sum.
    """

    token: Callable[[Predictions, Array], Array] | None = None
    update: Callable[[Update], Array] | None = None
    host: Callable[[Interval], float | None] | None = None
    bar: str | None = None
    per_replica: bool = True


TRAIN_METRICS: dict[str, TrainMetric] = {
    # Nats per target token, without label smoothing: comparable with validation/loss.
    "loss": TrainMetric(token=lambda predictions, _: NLL["nll"](predictions), bar="loss {:.4f}"),
    # The minimised objective, with label smoothing.
    "objective": TrainMetric(token=lambda _, objective: objective),
    "accuracy": TrainMetric(token=lambda predictions, _: CORRECT["correct"](predictions)),
    "gradient_norm": TrainMetric(update=lambda update: optax.tree.norm(update.gradients)),
    "learning_rate": TrainMetric(update=lambda update: update.learning_rate),
    "steps_per_second": TrainMetric(
        host=lambda interval: interval.rate("steps"), bar="{:.1f} steps/s"
    ),
    "target_tokens_per_second": TrainMetric(
        host=lambda interval: interval.rate("tokens"),
        bar="{:,.0f} target tokens/s",
        per_replica=False,
    ),
    # Model FLOPs utilisation (Chowdhery et al. 2022, section 4.1): no FLOP is counted twice.
    "mfu": TrainMetric(
        host=lambda interval: interval.peak_share and interval.rate("steps") * interval.peak_share
    ),
    "data_waits": TrainMetric(
        host=lambda interval: interval.wait_share, bar="waited for data {:.0%}"
    ),
}


def sum_over_tokens(
    predictions: Predictions, objective: Float[Array, "B T"], weights: Float[Array, "B T"]
) -> Sums:
    """The sums of the per-token metrics, and the number of tokens."""
    sums = {
        f"train/{name}": (metric.token(predictions, objective) * weights).sum()
        for name, metric in TRAIN_METRICS.items()
        if metric.token
    }
    return sums | {"tokens": weights.sum()}


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
        if metric.host:
            value = metric.host(interval)
        else:
            value = sums[f"train/{name}"] / (tokens if metric.token else updates)
        if value is not None:
            metrics[f"train/{name}"] = value
    return metrics


class MetricsWriter:
    """Writes metrics to `metrics.jsonl`, one object per line, and to TensorBoard events.

    NaN is written as null. In a population each replica has its own lines, with its index in
    `replica`, and its own folder of events. Only the first of several hosts writes.

    Args:
      workdir: where the files go.
      resume_from: the step that training resumes at; lines of later steps are dropped.
      replicas: the number of replicas.
    """

    def __init__(self, workdir: Path, resume_from: int, replicas: int = 1):
        self.writes = hosts.first()
        if not self.writes:
            return
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_from]
        fresh = self.path.with_suffix(".tmp")
        folders = [workdir / f"replica_{k}" for k in range(replicas)]
        with self.explained():
            fresh.write_text("".join(to_json(row) + "\n" for row in kept), encoding="utf-8")
            fresh.replace(self.path)
            self.file = self.path.open("a", encoding="utf-8")
            folders = [workdir] if replicas == 1 else folders
            self.events = [Events(each, resume_from) for each in folders]

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if not self.writes:
            return
        with self.explained():
            self.file.close()
            for events in self.events:
                events.file.close()

    def write(self, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Adds a line for `step` and each replica."""
        if not self.writes:
            return
        rows = [{"step": step, "replica": k, **each} for k, each in enumerate(metrics)]
        if len(rows) == 1:
            del rows[0]["replica"]
        with self.explained():
            self.file.write("".join(to_json(row) + "\n" for row in rows))
            self.file.flush()
            for events, each in zip(self.events, metrics, strict=True):
                events.write(step, each)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns an OSError into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}, or the events beside it, could not be written: "
                f"{error.strerror or error}; free space, or choose another --workdir"
            ) from error


class Events:
    """A file of scalars for TensorBoard.

    Only the record writer of tensorboardX is used. Its SummaryWriter writes in a thread; a full
    disk ends the thread, and its callers then block forever. Importing tensorboardX also imports
    PyTorch if it is installed, which takes 2 s once per run.

    Args:
      folder: where the file goes.
      resume_from: TensorBoard hides the events of later steps in older files.
    """

    FLUSH = 10.0  # seconds between flushes, each of which is an fsync

    def __init__(self, folder: Path, resume_from: int):
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2

        self.proto: Any = event_pb2  # its classes are invisible to a type checker
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self.file, self.flushed = RecordWriter(str(folder / name)), time.monotonic()
        start = self.proto.SessionLog(status=self.proto.SessionLog.START)
        self.add(resume_from + 1, file_version="brain.Event:2")
        self.add(resume_from + 1, session_log=start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds an event for `step` with all of its metrics."""
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self.add(step, summary={"value": values})
        if time.monotonic() - self.flushed > self.FLUSH:
            self.file.flush()
            self.flushed = time.monotonic()

    def add(self, step: int, **content: Any) -> None:
        """Adds an event to the file."""
        event = self.proto.Event(wall_time=time.time(), step=step, **content)
        self.file.write(event.SerializeToString())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, without an incomplete last line."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # the last part is empty, or cut off
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(nan_for_null(json.loads(line)))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged; delete or fix the line") from error
    return rows
