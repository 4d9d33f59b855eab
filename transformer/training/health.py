"""Reports of NaN and Inf, and of loss spikes; the search for the operation that produced a NaN.

The step itself skips non-finite updates (`step.skip_nonfinite`); the host reads the sums of each
interval here.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from transformer.training.step import StepConfig, TrainState, make_train_step, stream

REMEMBERED = 20  # number of intervals over which the median loss is taken
SPIKE = 2.0  # a loss above this multiple of the median is a spike


class NonfiniteError(Exception):
    """More updates had a NaN or Inf in the loss or a gradient than may be skipped.

    step: the first step that exceeded the limit.
    state: the state of one replica before that step.
    """

    def __init__(self, step: int, state: TrainState):
        super().__init__(f"step {step}")
        self.step, self.state = step, state


class HealthMonitor:
    """Prints skipped updates, stopped replicas and loss spikes of each interval.

    stopped: for each replica, whether it has stopped.

    Args:
      state: the initial state.
      max_skipped: the number of updates that may be skipped.

    Raises:
      NonfiniteError: the run has already stopped in this state.
    """

    def __init__(self, state: TrainState, max_skipped: int):
        self.max_skipped = max_skipped
        self.stopped = is_stopped(state.skipped, max_skipped)
        self.replicas = len(self.stopped)
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.raise_if_all_stopped(state)

    def check(
        self,
        step: int,
        sums: Sequence[Mapping[str, Any]],
        metrics: Sequence[Mapping[str, float]],
        state: TrainState,
    ) -> None:
        """Checks the interval that ended at `step`.

        Args:
          step: the last step of the interval.
          sums: the sums of each replica.
          metrics: the metrics of each replica.
          state: the newest; a stopped replica no longer changes in it.

        Raises:
          NonfiniteError: all replicas have stopped.
        """
        self.check_stopped(sums, state)
        for k, one in enumerate(sums):
            if (skipped := int(one["skipped"])) and not self.stopped[k]:
                who = f"replica {k}: " if self.replicas > 1 else ""
                console.print(
                    f"{who}{skipped} of the updates up to step {step:,} skipped for a NaN or Inf "
                    f"(at most {self.max_skipped} may be)"
                )
        losses = np.array([one["train/loss"] for one in metrics])
        losses = losses[np.isfinite(losses)]
        if not losses.size:
            return
        loss = float(losses.mean())
        usual = float(np.median(self.losses)) if len(self.losses) > REMEMBERED // 2 else np.inf
        if loss > SPIKE * usual:
            console.print(
                f"loss spike: {loss:.4g} up to step {step:,}, {loss / usual:.1f} times the median "
                f"of the last {len(self.losses)} intervals"
            )
        self.losses.append(loss)

    def check_stopped(self, sums: Sequence[Mapping[str, Any]], state: TrainState) -> None:
        """Reports replicas that have stopped since the last check; see `check`."""
        for k, one in enumerate(sums):
            if int(one["stopped"]) and not self.stopped[k]:
                self.stopped[k] = True
                self.raise_if_all_stopped(state)
                failed = np.atleast_1d(hosts.fetch(state.failed))[k]
                console.print(
                    f"replica {k}: stopped at step {failed:,} for a NaN or Inf; others continue"
                )

    def raise_if_all_stopped(self, state: TrainState) -> None:
        """Raises a NonfiniteError for the last replica that stopped, if none is left."""
        if not self.stopped.all():
            return
        replicas = split_replicas(hosts.fetch(state), self.replicas)
        last = max(replicas, key=lambda one: int(one.failed))
        raise NonfiniteError(int(last.failed), last)


def batch_of(state: TrainState, data: Dataset | StreamedDataset, step: int) -> Batch:
    """The batch of a step of a run."""
    return data.batch(stream(jnp.asarray(state.seed), "data"), jnp.int32(step))


def dump_batch(path: Path, state: TrainState, data: Dataset | StreamedDataset, step: int) -> Path:
    """Writes the batch of a step as NumPy arrays, on the first host only."""
    batch = hosts.fetch(batch_of(state, data, step))
    if hosts.first():
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in batch._asdict().items() if v is not None})
    return path


def find_operation(
    model: Model, config: StepConfig, state: TrainState, data: Dataset | StreamedDataset, step: int
) -> str:
    """The first operation of a step that produces a NaN or divides by zero, with its source line.

    The step is replayed from the state before it, with every operation checked.
    """
    replay = checkify.checkify(make_train_step(model, config), errors=checkify.float_checks)
    state = state._replace(step=np.int32(step), skipped=np.int32(0))
    error, _ = jax.jit(replay)(state, batch_of(state, data, step))
    if (found := error.get()) is None:
        return "an overflow to Inf, and no single operation"
    return found.strip().splitlines()[0].rstrip(".")  # what follows is a traceback


def explain_failure(
    failure: NonfiniteError,
    data: Dataset | StreamedDataset,
    folder: Path,
    model: Model,
    config: StepConfig | None,
) -> str:
    """One line on a run that stopped for a NaN or Inf: the step, its batch, and the remedy.

    Args:
      failure: the error.
      data: what the failed step reads.
      folder: where to write the batch of that step.
      model: the run's model.
      config: the config to replay the step with; None: the operation is not searched for.
    """
    step, state = failure.step, failure.state
    file = dump_batch(folder / f"batch_of_step_{step}.npz", state, data, step)
    remedy = "--config.debug_nans=true says which operation made it"
    if config is not None:
        remedy = f"it comes from {find_operation(model, config, state, data, step)}"
    return (
        f"the loss or a gradient of step {step:,} is NaN or Inf; its batch is in {file}; {remedy}; "
        "lower optimizer.learning_rate, or skip such updates with --config.max_skipped_steps=N"
    )
