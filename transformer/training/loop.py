"""The training loop: dispatches of many steps, and what is due between them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from transformer.config import RunConfig
from transformer.console import TrainingBar, facts, status
from transformer.data.batches import BatchWindow, Dataset
from transformer.data.streaming import StreamedDataset
from transformer.inference import evaluation
from transformer.metrics import finalize, mean_over
from transformer.parallel import hosts
from transformer.parallel.mesh import place, replicated
from transformer.training.checkpoint import Checkpoints
from transformer.training.health import Watchman
from transformer.training.interruption import Interrupted, StopRequests
from transformer.training.metrics import MetricsWriter, by_replica, train_metrics
from transformer.training.step import Sums, TrainState, zero_sums


def write_profile(
    train_steps: Callable, state: TrainState, feed: Any, replicas: int, steps: int, folder: Path
) -> None:
    """Writes a trace of `steps` steps for TensorBoard or xprof; they train nothing."""
    data = feed.empty_window()  # of a stream rows of padding, which take as long as any
    copy = jax.tree.map(jnp.copy, state)  # the steps take their argument's place
    sums = zero_sums(replicas)
    copy, sums = jax.block_until_ready(train_steps(copy, sums, data, jnp.int32(0)))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(train_steps(copy, sums, data, jnp.int32(steps)))
    facts({"profile": f"{steps} steps in {folder}"})


class Loop:
    """A run from one of its steps to the last.

    Validation at step i describes the parameters after i updates; train metrics are those
    of the interval that ends there. A save comes with an evaluation, so that the best
    checkpoint can be told.

    Args:
      cfg: the run's.
      state: that it goes on from; donated.
      begun: what an interrupted run had of the interval in which it stopped; see
        `Checkpoints.interval`.
      train_steps: `Run.train_steps`.
      score: `Run.score`.
      feed: says what the steps of training read.
      validation: its rows, on the host.
      checkpoints: take the state.
      writer: takes the metrics.
      requests: say when to stop before the end.
      flop_share: what a step a second is of the devices' peak; None: nobody knows.
    """

    def __init__(
        self,
        cfg: RunConfig,
        state: TrainState,
        begun: Mapping[str, Any],
        *,
        train_steps: Callable,
        score: Callable,
        feed: Dataset | StreamedDataset,
        validation: Dataset,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        requests: StopRequests,
        flop_share: float | None,
    ):
        self.cfg, self.state = cfg, state
        self.train_steps, self.score = train_steps, score
        self.feed, self.validation = feed, validation
        self.checkpoints, self.writer, self.requests = checkpoints, writer, requests
        self.flop_share = flop_share
        self.step = self.saved = state.taken()
        self.unvalidated = begun.get("unvalidated", False)
        self.nothing = jax.device_get(zero_sums(cfg.replicas))
        sums = begun.get("sums", self.nothing)
        # What an older version had not summed is not known in this interval.
        unknown = {name: np.full_like(zero, np.nan) for name, zero in self.nothing.items()}
        self.sums = self.place({k: np.float32(sums.get(k, unknown[k])) for k in self.nothing})
        # An interval that has ended: its last step, its sums, and how often it waited for data.
        self.unread: tuple[int, Sums, float | None] | None = None
        self.watch = Stopwatch(begun.get("seconds", 0.0))
        self.pace = Pace()
        self.watchman = Watchman(state, cfg.max_skipped_steps)

    def run(self) -> TrainState:
        """Takes steps until `cfg.steps`; evaluates, saves and logs where they are due.

        Raises:
          Interrupted: somebody asked for it; the state is saved.
          NonfiniteError: more steps than may be left out had a NaN or Inf.
        """
        with status("compiling", "compiled"):  # it takes no step
            self.dispatch(self.feed.empty_window(), self.place(np.array(0, np.int32)))
        with contextlib.closing(self.feed), TrainingBar(self.step, self.cfg.steps) as self.bar:
            self.requests.something_to_save = True
            self.watch.start()
            if self.unvalidated:  # when it stopped, validation was due
                self.evaluate()
            while self.step < self.cfg.steps:
                if self.requests.stop():
                    self.leave()
                self.advance()
        return self.state

    def advance(self) -> None:
        """Takes the steps of one dispatch, and does what is due after it."""
        before, (data, most) = self.sums, self.feed.window(self.step)
        stop = next_stop(self.cfg, self.step, min(most, self.pace.steps))
        steps = self.place(np.array(stop - self.step, np.int32))
        with jax.transfer_guard("disallow"):  # nothing else goes to the device or back
            self.dispatch(data, steps)
        # No more than one dispatch waits for another; and none where a step takes long.
        jax.block_until_ready(self.sums if self.pace.is_slow() else before)
        self.pace.dispatched(stop - self.step)
        self.step = stop
        self.bar.stepped(self.step)
        self.read()  # only now: the device is at work on the next interval
        # At saves too: a resumed run then logs the very intervals of one left alone.
        if self.is_due(self.cfg.log_every) or self.saves():
            self.unread = self.step, self.sums, self.feed.wait_share()
            self.sums = self.place(self.nothing)
            self.pace.interrupted()  # `before` is then that of no dispatch
        if self.is_due(self.cfg.eval_every) or self.saves():
            self.read()
            self.evaluate()

    def saves(self) -> bool:
        """Whether a checkpoint is due at this step."""
        return self.is_due(self.cfg.save_every) or self.step == self.cfg.steps

    def evaluate(self) -> None:
        """Validates, which is no part of what an interval takes."""
        self.unvalidated = True
        with self.watch.paused(self.sums):
            self.validate(self.saves())
        self.unvalidated = False
        self.pace.interrupted()

    def dispatch(self, data: Dataset | BatchWindow, steps: Int[Array, ""]) -> None:
        """Gives the devices so many steps to take, and does not wait for them."""
        self.state, self.sums = self.train_steps(self.state, self.sums, data, steps)

    def read(self) -> None:
        """Waits for the end of the interval that is not read yet, if any, and logs it."""
        if self.unread is None:
            return
        (step, sums, waited), self.unread = self.unread, None
        each = by_replica(jax.block_until_ready(sums), self.cfg.replicas)
        seconds = self.watch.lap()
        self.pace.measured(int(each[0]["steps"]), seconds)
        metrics = [train_metrics(one, seconds, self.flop_share, waited) for one in each]
        self.bar.update(step, metrics)
        self.writer.write(step, metrics)
        self.watchman.look(step, each, metrics, self.state)

    def validate(self, saves: bool) -> None:
        """Scores the validation split, and saves the state if that is due too."""
        score, variables = self.score, self.state.variables()
        # Several processes must stop at one dispatch of training, and none stops here.
        stop = (lambda: None) if hosts.several() else self.leave_if_asked
        scores = evaluation.score_in_batches(score, variables, self.validation, self.place, stop)
        metrics = [
            finalize(one, "validation", smoothing)
            for one, smoothing in zip(
                by_replica(scores, self.cfg.replicas), self.cfg.smoothings(), strict=True
            )
        ]
        metrics = self.watchman.without_stopped(metrics)
        self.bar.validated(self.step, metrics)
        self.writer.write(self.step, metrics)
        if saves:
            sound = [one for k, one in enumerate(metrics) if k not in self.watchman.stopped]
            self.checkpoints.save(self.state, mean_over(sound))
            self.saved = self.step

    def leave_if_asked(self) -> None:
        """Leaves if somebody has asked for it."""
        if self.requests.asked:
            self.leave()

    def leave(self) -> None:
        """Saves the state, in the middle of an interval too, and raises Interrupted."""
        self.read()
        if self.step > self.saved:
            stopped = self.unvalidated  # the watch is, while the run is validated
            with contextlib.nullcontext() if stopped else self.watch.paused(self.sums):
                totals = hosts.fetch(self.sums)
                self.watchman.look_for_stopped(by_replica(totals, self.cfg.replicas), self.state)
                totals = jax.tree.map(np.ndarray.tolist, totals)
                interval = {"seconds": self.watch.seconds, "sums": totals}
                interval["unvalidated"] = self.unvalidated
                self.checkpoints.save(self.state, {}, interval)
        if not self.step:
            raise Interrupted("stopped before the first step, nothing to save")
        raise Interrupted(
            f"stopped at step {self.step:,} of {self.cfg.steps:,}, and saved; "
            "the same command goes on from there"
        )

    def is_due(self, every: int) -> bool:
        """Whether this step is one of those that come `every` so often."""
        return self.step % every == 0

    def place(self, tree: Any) -> Any:
        """Arrays on every device."""
        return place(tree, replicated(jax.sharding.get_mesh()))


class Pace:
    """How many steps a dispatch takes: as many as take a second, by what the last ones took.

    No result depends on it. Several processes must dispatch alike: the first of them decides, when
    an interval is read.
    """

    seconds = 1.0  # that a dispatch should take

    def __init__(self):
        self.steps = self.wanted = 1
        self.running = 0  # steps of the dispatch that began at `last`; 0: nobody knows
        self.last = time.perf_counter()

    def is_slow(self) -> bool:
        """Whether a dispatch of one step takes so long that none should wait for it."""
        return self.steps == 1

    def dispatched(self, steps: int) -> None:
        """Notes that a dispatch of so many has begun, when that before it has ended."""
        now = time.perf_counter()
        slow = self.is_slow()
        if done := steps if slow else self.running:
            self.want(done, now - self.last)
        self.running, self.last = 0 if slow else steps, now
        if not hosts.several():
            self.steps = self.wanted

    def interrupted(self) -> None:
        """Notes that the next dispatch does not begin when the one before it ends."""
        self.running, self.last = 0, time.perf_counter()

    def measured(self, steps: int, seconds: float) -> None:
        """Notes what an interval took. All processes then take as many steps as the first would."""
        self.last = time.perf_counter()
        self.want(steps, seconds)
        self.steps = hosts.once(lambda: self.wanted)

    def want(self, steps: int, seconds: float) -> None:
        """Sets how many steps are wanted by what so many took."""
        self.wanted = max(1, int(self.seconds * steps / max(seconds, 1e-9)))


class Stopwatch:
    """Seconds of training alone, after those that an interval already has."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """Begins to count, or again after a pause."""
        self.started = time.perf_counter()

    def lap(self) -> float:
        """The seconds since the last lap."""
        seconds = self.seconds + time.perf_counter() - self.started
        self.seconds = 0.0
        self.start()
        return seconds

    @contextlib.contextmanager
    def paused(self, sums: Sums) -> Iterator[None]:
        """Leaves out what is done inside; what leads to `sums` belongs to what came before."""
        jax.block_until_ready(sums)
        self.seconds += time.perf_counter() - self.started
        yield
        self.start()


def next_stop(cfg: RunConfig, step: int, most: int) -> int:
    """The step at which the next dispatch ends: no later than the next thing that is due.

    Args:
      cfg: the run's.
      step: where it begins.
      most: steps in a dispatch.
    """
    due = ((step // every + 1) * every for every in (cfg.log_every, cfg.eval_every, cfg.save_every))
    return min(cfg.steps, step + most, *due)
