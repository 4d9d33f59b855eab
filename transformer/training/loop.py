"""The training loop: dispatches of many steps, with logging, validation and saving between them.

Its progress bar becomes plain lines if standard output is not a terminal.
"""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich import progress
from rich.table import Column

from transformer import renamed
from transformer.console import console, status
from transformer.inference.text_metrics import TEXT_METRICS
from transformer.metrics import PRINTED
from transformer.parallel import hosts
from transformer.parallel.mesh import place
from transformer.parallel.replicas import format_replicas, mean_over_replicas, split_replicas
from transformer.training.checkpoint import Checkpoints
from transformer.training.costs import peak_flops
from transformer.training.early_stopping import EarlyStopping
from transformer.training.health import HealthMonitor
from transformer.training.interruption import Interrupted, StopRequests
from transformer.training.metrics import TRAIN_METRICS, Interval, MetricsWriter, finalize
from transformer.training.step import TrainState

if TYPE_CHECKING:
    from transformer.run import Run

SILENCE = 30.0  # seconds after which a line is printed if there is no progress bar


def next_stop(config: Any, step: int, most: int) -> int:
    """The end of a dispatch of up to `most` steps from `step`, at most the next due step."""
    intervals = config.log_every, config.eval_every, config.save_every
    return min(config.steps, step + most, *((step // every + 1) * every for every in intervals))


@dataclass
class TrainingLoop:
    """Trains from one step of a run to the last.

    Validation at step i describes the parameters after i updates; training metrics are those of
    the interval that ends there. Each save comes with an evaluation, which ranks the checkpoints.
    """

    run: "Run"
    state: TrainState  # the initial one is donated
    interval: Mapping[str, Any]  # in which the run was interrupted; see `Checkpoints.interval`
    checkpoints: Checkpoints
    writer: MetricsWriter
    requests: StopRequests

    def __post_init__(self):
        self.config, interval = self.run.config, self.interval
        self.monitor = HealthMonitor(self.state, self.config.max_skipped_steps)
        self.ended = np.array(hosts.fetch(self.state.ended), ndmin=1)  # [R]
        # Decided at evaluations alone, so that the size of dispatches does not matter.
        self.is_over = not interval and self.all_ended()
        self.early_stopping = EarlyStopping.resumed(self.config, self.run.workdir.metrics)
        self.peak_share = None
        if peak := peak_flops(self.run.mesh):
            self.peak_share = self.run.step_flops * self.config.replicas / peak
        self.step = self.saved = self.state.taken()
        self.unvalidated = interval.get("unvalidated", False)
        self.seconds = interval.get("seconds", 0.0)  # of the interval, up to the last pause
        self.zeros = self.run.zero_sums()
        saved = {renamed.SUMS.get(k, k): v for k, v in interval.get("sums", self.zeros).items()}
        # NaN: the older version that saved the interval did not sum this metric.
        sums = {k: np.float32(saved.get(k, zero + np.nan)) for k, zero in self.zeros.items()}
        self.sums = self.run.place(sums)
        # The interval that has ended but is not logged yet: last step, sums and wait share.
        self.pending: tuple[int, Any, float | None] | None = None
        self.size = DispatchSize()

    def train(self) -> TrainState:
        """Trains to the last step or early stopping, or until Interrupted or a NonfiniteError."""
        no_steps = self.run.feed.empty_window(), self.run.place(np.array(0, np.int32))
        with status("compiling", "compiled"):  # by a dispatch of 0 steps
            self.state, self.sums = self.run.train_steps(self.state, self.sums, *no_steps)
        self.bar = ProgressBar(self.step, self.config.steps)
        with contextlib.closing(self.run.feed), self.bar:
            self.requests.something_to_save = True
            self.resumed = time.perf_counter()
            if self.unvalidated:  # interrupted when validation was due
                self.evaluate()
            while self.step < self.config.steps and not self.is_over:
                if self.requests.stop():
                    self.save_and_interrupt()
                self.advance()
        return self.state

    def advance(self) -> None:
        """Dispatches some steps, then logs, validates and saves if due."""
        before, (data, most) = self.sums, self.run.feed.window(self.step)
        stop = next_stop(self.config, self.step, min(most, self.size.steps))
        steps = self.run.place(np.array(stop - self.step, np.int32))
        with jax.transfer_guard("disallow"):  # no other transfer to or from the devices
            self.state, self.sums = self.run.train_steps(self.state, self.sums, data, steps)
        # At most one dispatch is queued behind the running one; none if a step is slow.
        jax.block_until_ready(self.sums if self.size.steps == 1 else before)
        self.size.dispatched(stop - self.step)
        self.step = stop
        self.bar.show_step(self.step)
        self.log_pending()  # only now, while the devices already run the next interval
        # Saves end an interval too, so that a resumed run logs those of an uninterrupted one.
        if self.step % self.config.log_every == 0 or self.save_is_due():
            self.pending = self.step, self.sums, self.run.feed.wait_share()
            self.sums = self.run.place(self.zeros)
            self.size.interrupted()  # `before` no longer belongs to a dispatch
        if self.step % self.config.eval_every == 0 or self.save_is_due():
            self.log_pending()
            self.evaluate()

    def save_is_due(self) -> bool:
        due = any(self.step % every == 0 for every in self.config.save_intervals())
        return due or self.step == self.config.steps

    def decoding_is_due(self) -> bool:
        config, every = self.config, self.config.decode_every * self.config.eval_every
        ranks = config.best_metric in TEXT_METRICS and self.save_is_due()
        return bool(every) and (ranks or self.step % every == 0 or self.step == config.steps)

    def all_ended(self) -> bool:
        """Whether every replica has ended early or has stopped for a NaN or Inf."""
        return bool(((self.ended > 0) | self.monitor.stopped).all())

    def pause(self) -> None:
        """Waits for the devices; from here to `resumed`, time is not the interval's."""
        jax.block_until_ready(self.sums)
        self.seconds += time.perf_counter() - self.resumed

    def log_pending(self) -> None:
        """Waits for the end of the pending interval, if any, and logs its metrics."""
        if self.pending is None:
            return
        (step, sums, wait_share), self.pending = self.pending, None
        replicas = split_replicas(jax.block_until_ready(sums), self.config.replicas)
        now = time.perf_counter()
        seconds = self.seconds + now - self.resumed
        self.seconds, self.resumed = 0.0, now
        self.size.measured(int(replicas[0]["steps"]), seconds)
        metrics = [finalize(Interval(r, seconds, self.peak_share, wait_share)) for r in replicas]
        rows = self.write(step, metrics)
        self.bar.log_interval(step, [row for row in rows if row is not None])
        self.monitor.check(step, replicas, metrics, self.state)

    def evaluate(self) -> None:
        """Validates, and saves if due; the interval's time includes neither."""
        self.unvalidated = True
        self.pause()
        metrics = self.run.evaluate_replicas("validation", self.state, self.interrupt_if_requested)
        if self.decoding_is_due():
            decoded = self.run.text_validation.metrics(self.state)
            metrics = [own | texts for own, texts in zip(metrics, decoded, strict=True)]
        self.bar.log_validation(self.step, metrics)
        self.write(self.step, metrics)
        if self.config.patience and self.step < self.config.steps:
            self.end_early(metrics)
        if self.save_is_due():
            stopped = self.monitor.stopped
            running = [each for each, old in zip(metrics, stopped, strict=True) if not old]
            self.checkpoints.save(self.state, mean_over_replicas(running))
            self.saved = self.step
        self.unvalidated, self.resumed = False, time.perf_counter()
        self.size.interrupted()

    def write(self, step: int, metrics: Sequence[dict]) -> list[dict | None]:
        """Writes the metrics of the replicas that have not ended; returns None for the others."""
        rows = [None if end else own for own, end in zip(metrics, self.ended, strict=True)]
        self.writer.write(step, rows)
        return rows

    def end_early(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Ends the replicas whose patience is exhausted; the next checkpoint records it."""
        for k in np.flatnonzero((self.ended == 0) & ~self.monitor.stopped).tolist():
            self.early_stopping.add(k, self.step, metrics[k])
            if reason := self.early_stopping.reason(k):
                self.ended[k] = self.step
                who = f"replica {k} " if len(metrics) > 1 else ""
                at = f"at step {self.step:,} of {self.config.steps:,}"
                console.print(f"{who}stopped early {at}: {reason}")
        # A copy: on a CPU the array of JAX may share the memory of one of NumPy.
        ended = self.ended.copy().reshape(self.state.ended.shape)
        self.state = self.state._replace(ended=place(ended, self.state.ended.sharding))
        self.is_over = self.all_ended()

    def interrupt_if_requested(self) -> None:
        # Several processes must stop after the same training dispatch, not during validation.
        if self.requests.asked and not hosts.several():
            self.save_and_interrupt()

    def save_and_interrupt(self) -> None:
        """Saves the state, even in the middle of an interval, and raises Interrupted."""
        self.log_pending()
        if self.step > self.saved:
            if not self.unvalidated:  # else paused already
                self.pause()
            sums = hosts.fetch(self.sums)
            self.monitor.check_stopped(split_replicas(sums, self.config.replicas), self.state)
            interval = {"seconds": self.seconds, "sums": jax.tree.map(np.ndarray.tolist, sums)}
            self.checkpoints.save(self.state, {}, interval | {"unvalidated": self.unvalidated})
        if not self.step:
            raise Interrupted("stopped before the first step, nothing to save")
        done = f"{self.step:,} of {self.config.steps:,}"
        raise Interrupted(f"stopped at step {done}, and saved; the same command resumes the run")


class DispatchSize:
    """The number of steps per dispatch, which takes about a second; it affects no result.

    Several processes must agree on it: process 0 decides, when an interval is logged.
    """

    seconds = 1.0  # the target time of a dispatch

    def __init__(self):
        self.steps = 1  # also of slow steps, behind which none should be queued
        self.interrupted()

    def dispatched(self, steps: int) -> None:
        """Call this when a dispatch has begun, and the previous or, of slow steps, it has ended."""
        now, slow = time.perf_counter(), self.steps == 1
        ended = steps if slow else self.running
        if ended and not hosts.several():
            self.measured(ended, now - self.last)
        self.running, self.last = 0 if slow else steps, now

    def interrupted(self) -> None:
        """Call this when the next dispatch will not begin as soon as the previous one ends."""
        # Steps of the dispatch that began at `last`; 0: unknown.
        self.running, self.last = 0, time.perf_counter()

    def measured(self, steps: int, seconds: float) -> None:
        """Call this with the time that `steps` steps took; all processes follow process 0."""
        wanted = max(1, int(self.seconds * steps / max(seconds, 1e-9)))
        self.steps = hosts.once(lambda: wanted)
        self.last = time.perf_counter()  # when a dispatch behind these steps begins


class ProgressBar(progress.Progress):
    """Shows the step of `steps`, the metrics that declare a text for it, and the time left."""

    def __init__(self, start: int, steps: int):
        self.steps, self.printed = steps, time.monotonic()
        super().__init__(
            progress.TextColumn("[bold]train"),
            progress.BarColumn(bar_width=28),
            # Never truncated, as the bar may be.
            progress.MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=console,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.add_task("train", total=steps, completed=start, figures="")

    def show_step(self, step: int) -> None:
        """Shows the step; without a bar, prints a line if the last one is `SILENCE` old."""
        self.update(self.task, completed=step)
        if self.disable and time.monotonic() - self.printed > SILENCE:
            self.print_line(step)

    def print_line(self, step: int, *figures: str) -> None:
        """Prints a line, above the bar if there is one."""
        self.printed = time.monotonic()
        self.console.print("  ".join((f"step {step}/{self.steps}", *figures)))

    def log_interval(self, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """Shows the training metrics of the interval that ends at `step`."""
        figures = []
        for name, metric in TRAIN_METRICS.items():
            values = [each[f"train/{name}"] for each in metrics if f"train/{name}" in each]
            if metric.bar and any(values):
                shown = sum(values) / (len(values) if metric.per_replica else 1)
                figures.append(metric.bar.format(shown))
        self.update(self.task, completed=step, figures="  ".join(figures))
        if self.disable:
            left = (self.steps - step) / metrics[0]["train/steps_per_second"]
            self.print_line(step, *figures, f"{left:.0f} s left")

    def log_validation(self, step: int, metrics: Sequence[Mapping[str, float]]) -> None:
        figures = []
        for name, metric in (PRINTED | TEXT_METRICS).items():
            values = [each[x] for each in metrics if (x := f"validation/{name}") in each]
            if values:
                figures.append(f"{name.replace('_', ' ')} {format_replicas(values, metric.format)}")
        self.print_line(step, f"validation {'  '.join(figures)}")
