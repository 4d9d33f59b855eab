"""Reports of the NaN and Inf that `step.skip_nonfinite` skips, and of loss spikes."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from transformer.console import console
from transformer.data.batches import Batch, Dataset
from transformer.data.streaming import StreamedDataset
from transformer.modules.model import Model
from transformer.parallel import hosts
from transformer.parallel.replicas import is_stopped, split_replicas
from transformer.training.step import TrainState, make_train_step, stream

if TYPE_CHECKING:
    from transformer.config import RunConfig
    from transformer.run import Run

Sums = Sequence[Mapping[str, Any]]  # of each replica, as are metrics


class NonfiniteError(Exception):
    """More updates had a NaN or Inf in the loss or a gradient than may be skipped."""

    def __init__(self, state: TrainState):
        super().__init__(f"step {int(state.failed)}")
        self.state = state  # of one replica, before the first step that exceeded the limit


class HealthMonitor:
    """Prints skipped updates, stopped replicas and loss spikes; raises once all have stopped."""

    def __init__(self, state: TrainState, max_skipped: int):
        self.max_skipped = max_skipped
        self.stopped = is_stopped(state.skipped, max_skipped)  # [R]
        self.losses: deque[float] = deque(maxlen=20)  # of the last intervals, means of replicas
        self.replicas = 0  # in these means
        self._raise_if_all_stopped(state)

    def check(self, step: int, sums: Sums, metrics: Sums, state: TrainState) -> None:
        """Checks the interval that ended at `step`, by the sums and metrics of each replica."""
        self.check_stopped(sums, state)
        for k, one in enumerate(sums):
            who, skipped = f"replica {k}: " if len(sums) > 1 else "", int(one["skipped"])
            if skipped and not self.stopped[k]:
                what = f"of the updates up to step {step:,} skipped for a NaN or Inf"
                console.print(f"{who}{skipped} {what} (at most {self.max_skipped} may be)")
        if losses := [x for one in metrics if np.isfinite(x := one["train/loss"])]:
            if len(losses) != self.replicas:  # one has ended, and its loss leaves the mean
                self.replicas = len(losses)
                self.losses.clear()
            loss, count = np.mean(losses), len(self.losses)
            if count > 10 and loss > 2 * (usual := np.median(self.losses)):
                found = f"{loss:.4g} up to step {step:,}, {loss / usual:.1f} times the median"
                console.print(f"loss spike: {found} of the last {count} intervals")
            self.losses.append(float(loss))

    def check_stopped(self, sums: Sums, state: TrainState) -> None:
        """Prints replicas that have stopped since the last check."""
        for k, one in enumerate(sums):
            if int(one["stopped"]) and not self.stopped[k]:
                self.stopped[k] = True
                self._raise_if_all_stopped(state)
                message = f"stopped at step {hosts.fetch(state.failed)[k]:,} for a NaN or Inf"
                console.print(f"replica {k}: {message}; others continue")

    def _raise_if_all_stopped(self, state: TrainState) -> None:
        if self.stopped.all():
            replicas = split_replicas(hosts.fetch(state), len(self.stopped))
            raise NonfiniteError(max(replicas, key=lambda one: int(one.failed)))


def batch_of(state: TrainState, data: Dataset | StreamedDataset, step: int) -> Batch:
    """The batch of a step of a run."""
    return data.batch(stream(jnp.asarray(state.seed), "data"), jnp.int32(step))


def find_operation(model: Model, config: "RunConfig", state: TrainState, batch: Batch) -> str:
    """The first operation of a step that makes a NaN or divides by zero, with its source line."""
    replay = checkify.checkify(make_train_step(model, config), errors=checkify.float_checks)
    error, _ = jax.jit(replay)(state, batch)
    if (found := error.get()) is None:
        return "an overflow to Inf, and no single operation"
    return found.strip().splitlines()[0].rstrip(".")  # what follows is a traceback


def explain_failure(run: "Run", state: TrainState) -> str:
    """One line on the NaN or Inf that stopped a run: the step, its batch, and the remedy."""
    step = int(state.failed)
    batch = hosts.fetch(batch_of(state, run.feed, step))
    file = run.workdir.path / f"batch_of_step_{step}.npz"
    if hosts.first():
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        np.savez(file, **arrays)
    remedy = "--config.debug_nans=true says which operation made it"
    if run.config.debug_nans:
        state = state._replace(step=np.int32(step), skipped=np.int32(0))
        remedy = f"it comes from {find_operation(run.model, run.config, state, batch)}"
    return (
        f"the loss or a gradient of step {step:,} is NaN or Inf; its batch is in {file}; {remedy}; "
        "lower optimizer.learning_rate, or skip such updates with --config.max_skipped_steps=N"
    )
