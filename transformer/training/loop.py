"""The training loop: dispatches of many steps, with logging, validation and saving between them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from transformer import renamed
from transformer.console import facts, status
from transformer.data.batches import BatchWindow, Dataset
from transformer.data.streaming import StreamedDataset
from transformer.parallel import hosts
from transformer.parallel.mesh import place, replicated
from transformer.parallel.replicas import mean_over_replicas, split_replicas
from transformer.training.checkpoint import Checkpoints
from transformer.training.health import HealthMonitor
from transformer.training.interruption import Interrupted, StopRequests
from transformer.training.metrics import Interval, MetricsWriter, Sums, finalize
from transformer.training.progress import ProgressBar
from transformer.training.step import TrainState


class Intervals(NamedTuple):
    """The number of steps of a run, and the intervals between logs, validations and saves."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int

    def next_stop(self, step: int, most: int) -> int:
        """The end of a dispatch of up to `most` steps from `step`, at most the next due step."""
        due = ((step // every + 1) * every for every in self[1:])
        return min(self.steps, step + most, *due)


class TrainingLoop:
    """Trains from one step of a run to the last.

    Validation at step i describes the parameters after i updates; training metrics are those of
    the interval that ends there. Each save comes with an evaluation, which ranks the checkpoints.

    Args:
      intervals: the run's intervals.
      state: the initial state; donated.
      interval: sums of the interval in which the run was interrupted; see `Checkpoints.interval`.
      train_steps: `Run.train_steps`.
      zero_sums: `Run.zero_sums`.
      validate: (state, callback between dispatches) → metrics of each replica.
      data: the source of batches.
      monitor: checks each interval.
      checkpoints: where the state is saved.
      writer: where metrics are written.
      requests: requests to stop.
      peak_share: see `metrics.Interval`.
    """

    def __init__(
        self,
        intervals: Intervals,
        state: TrainState,
        interval: Mapping[str, Any],
        *,
        train_steps: Callable,
        zero_sums: Mapping[str, Any],
        validate: Callable[[TrainState, Callable[[], None]], Sequence[dict[str, float]]],
        data: Dataset | StreamedDataset,
        monitor: HealthMonitor,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        requests: StopRequests,
        peak_share: float | None,
    ):
        self.intervals, self.state, self.data = intervals, state, data
        self.train_steps, self.validate = train_steps, validate
        self.monitor, self.checkpoints, self.writer = monitor, checkpoints, writer
        self.requests, self.peak_share = requests, peak_share
        self.step = self.saved = state.taken()
        self.unvalidated = interval.get("unvalidated", False)
        self.zero_sums = zero_sums
        saved = {renamed.SUMS.get(k, k): v for k, v in interval.get("sums", zero_sums).items()}
        # NaN: the older version that saved the interval did not sum this metric.
        unknown = {name: np.full_like(zero, np.nan) for name, zero in zero_sums.items()}
        self.sums = self.place({k: np.float32(saved.get(k, unknown[k])) for k in zero_sums})
        # The interval that has ended but is not logged yet: last step, sums and wait share.
        self.pending: tuple[int, Sums, float | None] | None = None
        self.timer = IntervalTimer(interval.get("seconds", 0.0))
        self.dispatch_size = DispatchSize()

    def run(self) -> TrainState:
        """Trains to the last step; logs, validates and saves when due.

        Raises:
          Interrupted: on request; the state is saved.
          NonfiniteError: more updates had a NaN or Inf than may be skipped.
        """
        with status("compiling", "compiled"):  # by a dispatch of 0 steps
            self.dispatch(self.data.empty_window(), self.place(np.array(0, np.int32)))
        with (
            contextlib.closing(self.data),
            ProgressBar(self.step, self.intervals.steps) as self.bar,
        ):
            self.requests.something_to_save = True
            self.timer.start()
            if self.unvalidated:  # interrupted when validation was due
                self.evaluate()
            while self.step < self.intervals.steps:
                if self.requests.stop():
                    self.save_and_interrupt()
                self.advance()
        return self.state

    def advance(self) -> None:
        """Dispatches some steps, then logs, validates and saves if due."""
        before, (data, most) = self.sums, self.data.window(self.step)
        stop = self.intervals.next_stop(self.step, min(most, self.dispatch_size.steps))
        steps = self.place(np.array(stop - self.step, np.int32))
        with jax.transfer_guard("disallow"):  # no other transfer to or from the devices
            self.dispatch(data, steps)
        # At most one dispatch is queued behind the running one; none if a step is slow.
        jax.block_until_ready(self.sums if self.dispatch_size.is_slow() else before)
        self.dispatch_size.dispatched(stop - self.step)
        self.step = stop
        self.bar.advance(self.step)
        self.log_pending()  # only now, while the devices already run the next interval
        # Saves end an interval too, so that a resumed run logs those of an uninterrupted one.
        if self.is_due(self.intervals.log_every) or self.save_is_due():
            self.pending = self.step, self.sums, self.data.wait_share()
            self.sums = self.place(self.zero_sums)
            self.dispatch_size.interrupted()  # `before` no longer belongs to a dispatch
        if self.is_due(self.intervals.eval_every) or self.save_is_due():
            self.log_pending()
            self.evaluate()

    def dispatch(self, data: Dataset | BatchWindow, steps: Int[Array, ""]) -> None:
        """Enqueues steps on the devices without waiting for them."""
        self.state, self.sums = self.train_steps(self.state, self.sums, data, steps)

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`."""
        return self.step % every == 0

    def save_is_due(self) -> bool:
        """Whether a checkpoint is due at this step."""
        return self.is_due(self.intervals.save_every) or self.step == self.intervals.steps

    def log_pending(self) -> None:
        """Waits for the end of the pending interval, if any, and logs its metrics."""
        if self.pending is None:
            return
        (step, sums, wait_share), self.pending = self.pending, None
        replicas = split_replicas(jax.block_until_ready(sums), self.monitor.replicas)
        seconds = self.timer.lap()
        self.dispatch_size.measured(int(replicas[0]["steps"]), seconds)
        metrics = [
            finalize(Interval(one, seconds, self.peak_share, wait_share)) for one in replicas
        ]
        self.bar.log_interval(step, metrics)
        self.writer.write(step, metrics)
        self.monitor.check(step, replicas, metrics, self.state)

    def evaluate(self) -> None:
        """Validates, and saves if due; the interval's time includes neither."""
        self.unvalidated = True
        with self.timer.paused(self.sums):
            # Several processes must stop after the same training dispatch, not during validation.
            stop = (lambda: None) if hosts.several() else self.interrupt_if_requested
            metrics = self.validate(self.state, stop)
            self.bar.log_validation(self.step, metrics)
            self.writer.write(self.step, metrics)
            if self.save_is_due():
                running = [
                    m for m, old in zip(metrics, self.monitor.stopped, strict=True) if not old
                ]
                self.checkpoints.save(self.state, mean_over_replicas(running))
                self.saved = self.step
        self.unvalidated = False
        self.dispatch_size.interrupted()

    def interrupt_if_requested(self) -> None:
        """Saves and raises Interrupted if there is a request to stop."""
        if self.requests.asked:
            self.save_and_interrupt()

    def save_and_interrupt(self) -> None:
        """Saves the state, even in the middle of an interval, and raises Interrupted."""
        self.log_pending()
        if self.step > self.saved:
            # During validation the timer is already paused.
            paused = contextlib.nullcontext() if self.unvalidated else self.timer.paused(self.sums)
            with paused:
                totals = hosts.fetch(self.sums)
                self.monitor.check_stopped(
                    split_replicas(totals, self.monitor.replicas), self.state
                )
                totals = jax.tree.map(np.ndarray.tolist, totals)
                interval = {"seconds": self.timer.seconds, "sums": totals}
                interval["unvalidated"] = self.unvalidated
                self.checkpoints.save(self.state, {}, interval)
        if not self.step:
            raise Interrupted("stopped before the first step, nothing to save")
        raise Interrupted(
            f"stopped at step {self.step:,} of {self.intervals.steps:,}, and saved; "
            "the same command resumes the run"
        )

    def place(self, tree: Any) -> Any:
        """Replicates arrays over the devices."""
        return place(tree, replicated(jax.sharding.get_mesh()))


class DispatchSize:
    """The number of steps per dispatch, chosen so that a dispatch takes about a second.

    It does not affect the results. Several processes must agree on it: process 0 decides, when an
    interval is logged.
    """

    seconds = 1.0  # the target time of a dispatch

    def __init__(self):
        self.steps = self.wanted = 1
        self.running = 0  # steps of the dispatch that began at `last`; 0: unknown
        self.last = time.perf_counter()

    def is_slow(self) -> bool:
        """Whether a dispatch of one step takes so long that none should be queued behind it."""
        return self.steps == 1

    def dispatched(self, steps: int) -> None:
        """Call this when a dispatch has begun and the previous one has ended."""
        now = time.perf_counter()
        slow = self.is_slow()
        if done := steps if slow else self.running:
            self.want(done, now - self.last)
        self.running, self.last = 0 if slow else steps, now
        if not hosts.several():
            self.steps = self.wanted

    def interrupted(self) -> None:
        """Call this when the next dispatch will not begin as soon as the previous one ends."""
        self.running, self.last = 0, time.perf_counter()

    def measured(self, steps: int, seconds: float) -> None:
        """Call this with the time of an interval; all processes then follow process 0."""
        self.last = time.perf_counter()
        self.want(steps, seconds)
        self.steps = hosts.once(lambda: self.wanted)

    def want(self, steps: int, seconds: float) -> None:
        """Sets the wanted number of steps, given the time that `steps` steps took."""
        self.wanted = max(1, int(self.seconds * steps / max(seconds, 1e-9)))


class IntervalTimer:
    """Measures the training time of the current interval.

    Args:
      seconds: the time before an interruption.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """Starts the timer, or resumes it after a pause."""
        self.started = time.perf_counter()

    def lap(self) -> float:
        """Ends the interval and returns its seconds."""
        seconds = self.seconds + time.perf_counter() - self.started
        self.seconds = 0.0
        self.start()
        return seconds

    @contextlib.contextmanager
    def paused(self, sums: Sums) -> Iterator[None]:
        """Waits for `sums`, then excludes the `with` body from the time."""
        jax.block_until_ready(sums)
        self.seconds += time.perf_counter() - self.started
        yield
        self.start()


def write_profile(
    train_steps: Callable, state: TrainState, sums: Any, data: Any, steps: int, folder: Path
) -> None:
    """Writes a trace of `steps` steps for TensorBoard or xprof; `state` stays as it is."""
    window = data.empty_window()  # if streamed, rows of padding, which take as long
    copy = jax.tree.map(jnp.copy, state)  # `train_steps` donates its argument
    copy, sums = jax.block_until_ready(train_steps(copy, sums, window, jnp.int32(0)))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(train_steps(copy, sums, window, jnp.int32(steps)))
    facts({"profile": f"{steps} steps in {folder}"})
