"""Metrics on the host: ratios of sums, and the files that they are written to."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer import renamed
from transformer.errors import UserError
from transformer.files import nan_for_null, to_json
from transformer.parallel import hosts


def train_metrics(
    sums: Mapping[str, Any],
    seconds: float,
    flop_share: float | None = None,
    waited: float | None = None,
) -> dict[str, float]:
    """The ratios of an interval's sums (`training.make_train_step`) and its speed.

    `train/loss` is the cross-entropy, as `validation/loss` is; `train/objective` what is minimised,
    with label smoothing.

    With `flop_share`, what one step a second is of the devices' peak, `train/mfu` is among
    them: the model's FLOPs, none counted twice, as a fraction of the peak (Chowdhery et al. 2022,
    section 4.1). With `waited`, `train/data_waits` is: the share of the windows of data that were
    not there yet.
    """
    totals = {name: float(np.asarray(value)) for name, value in sums.items()}
    # Of an interval all of whose steps were left out nothing is known.
    tokens, good = totals["tokens"] or np.nan, totals["steps"] - totals["skipped"] or np.nan
    speed = totals["steps"] / seconds
    utilisation = {} if flop_share is None else {"train/mfu": speed * flop_share}
    waits = {} if waited is None else {"train/data_waits": waited}
    return (
        utilisation
        | waits
        | {
            "train/loss": totals["nll"] / tokens,
            "train/objective": totals["loss"] / tokens,
            "train/accuracy": totals["correct"] / tokens,
            "train/gradient_norm": totals["gradient_norm"] / good,
            "train/learning_rate": totals["learning_rate"] / good,
            "train/steps_per_second": speed,
            "train/target_tokens_per_second": totals["tokens"] / seconds,
        }
    )


def by_replica(tree: Any, replicas: int) -> list[Any]:
    """Each replica's part of a population's arrays; of a single run, the one there is."""
    if replicas == 1:
        return [tree]
    tree = hosts.fetch(tree)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(replicas)]


class MetricsWriter:
    """Writes metrics to `metrics.jsonl`, an object a line, and to TensorBoard events.

    The JSON lines are the record, null for NaN; the events are for looking at. In a population each
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
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_from]
        fresh = self.path.with_suffix(".tmp")
        folders = (
            [workdir] if replicas == 1 else [workdir / f"replica_{k}" for k in range(replicas)]
        )
        with self.explained():
            fresh.write_text("".join(to_json(row) + "\n" for row in kept), encoding="utf-8")
            fresh.replace(self.path)
            self.file = self.path.open("a", encoding="utf-8")
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
        """Turns what the disk refuses into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}, or the events beside it, could not be written: "
                f"{error.strerror or error}; free space, or choose another --workdir"
            ) from error


class Events:
    """Scalars as TensorBoard's events, in a file of their own.

    Written by whoever calls. tensorboardX's SummaryWriter has a thread for it, which a full disk
    ends, and whose callers then wait for it forever.

    Args:
      folder: where the file goes.
      resume_from: what older files say of later steps is not shown any more.
    """

    FLUSH = 10.0  # seconds: what is written is not seen before, for seeing it costs an fsync

    def __init__(self, folder: Path, resume_from: int):
        # It imports PyTorch, where that is installed, for what is not used here: seconds.
        hidden = sys.modules.setdefault("torch", None)  # type: ignore
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2

        if hidden is None:
            del sys.modules["torch"]

        self.proto: Any = event_pb2  # whose classes a type checker does not see
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
    """The objects of a `metrics.jsonl`, without a last line that was cut off in writing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # the last part is empty, or cut off
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(renamed.metrics(nan_for_null(json.loads(line))))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged; delete or mend the line") from error
    return rows
