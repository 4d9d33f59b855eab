"""Numbers gone wrong: NaN and Inf, where they come from, and losses that jump.

The step itself leaves out what is not finite (`training.guarded`); here is what the host makes of
it when it reads an interval's sums.
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
from transformer.training.step import StepConfig, TrainState, make_train_step, stream

REMEMBERED = 20  # intervals whose losses a spike is told from
SPIKE = 2.0  # times their median


class NonfiniteError(Exception):
    """More steps than may be left out had a NaN or Inf in their loss or gradients.

    step: the first that was one too many.
    state: of one replica, as it was before that step.
    """

    def __init__(self, step: int, state: TrainState):
        super().__init__(f"step {step}")
        self.step, self.state = step, state


class Watchman:
    """Looks at the sums of every interval, and says what is wrong.

    Args:
      state: that training goes on from.
      most: steps that a run may leave out.

    Raises:
      NonfiniteError: the state is one that has stopped.
    """

    def __init__(self, state: TrainState, most: int):
        self.most = most
        skipped = np.atleast_1d(hosts.fetch(state.skipped))
        self.replicas = len(skipped)
        self.stopped = set(np.flatnonzero(skipped > most).tolist())
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.check(state)

    def look(
        self,
        step: int,
        sums: Sequence[Mapping[str, Any]],
        metrics: Sequence[Mapping[str, float]],
        state: TrainState,
    ) -> None:
        """Looks at the interval that ended at `step`.

        A replica of a population that stopped is announced once, and the others go on.

        Args:
          step: where the interval ended.
          sums: of each replica.
          metrics: of each replica.
          state: the newest; what has stopped is the same in all that follow.

        Raises:
          NonfiniteError: all replicas have stopped.
        """
        self.look_for_stopped(sums, state)
        for k, one in enumerate(sums):
            left_out = int(one["skipped"])
            if left_out and k not in self.stopped:
                who = f"replica {k}: " if self.replicas > 1 else ""
                console.print(
                    f"{who}{left_out} of the steps up to {step:,} left out for a NaN or Inf "
                    f"(at most {self.most} may be)"
                )
        losses = np.array([one["train/loss"] for one in metrics])
        losses = losses[np.isfinite(losses)]
        if not losses.size:
            return
        loss = float(losses.mean())
        usual = float(np.median(self.losses)) if len(self.losses) > REMEMBERED // 2 else np.inf
        if loss > SPIKE * usual:
            console.print(
                f"loss {loss:.4g} up to step {step:,}, {loss / usual:.1f} times the median of the "
                f"last {len(self.losses)} intervals"
            )
        self.losses.append(loss)

    def look_for_stopped(self, sums: Sequence[Mapping[str, Any]], state: TrainState) -> None:
        """Looks for replicas that have stopped since the last look; see `look`."""
        for k, one in enumerate(sums):
            if int(one["stopped"]) and k not in self.stopped:
                self.stopped.add(k)
                self.check(state)
                failed = np.atleast_1d(hosts.fetch(state.failed))[k]
                console.print(
                    f"replica {k}: stopped at step {failed:,}, a NaN or Inf; others go on"
                )

    def check(self, state: TrainState) -> None:
        """Raises a NonfiniteError if all replicas have stopped, for the last of them that did."""
        if len(self.stopped) < self.replicas:
            return
        state = hosts.fetch(state)
        k = int(np.argmax(state.failed))
        state = state if self.replicas == 1 else jax.tree.map(lambda leaf: leaf[k], state)
        raise NonfiniteError(int(state.failed), state)

    def without_stopped(self, metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
        """The metrics of each replica, NaN of one that has stopped: its parameters are old."""
        return [
            dict.fromkeys(one, float("nan")) if k in self.stopped else one
            for k, one in enumerate(metrics)
        ]


def batch_of(state: TrainState, data: Dataset | StreamedDataset, step: int) -> Batch:
    """What a run has in its step `step`."""
    return data.batch(stream(jnp.asarray(state.seed), "data"), jnp.int32(step))


def dump_batch(path: Path, state: TrainState, data: Dataset | StreamedDataset, step: int) -> Path:
    """Writes the batch of a step as NumPy's arrays; of several hosts the first does."""
    batch = hosts.fetch(batch_of(state, data, step))
    if hosts.first():
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in batch._asdict().items() if v is not None})
    return path


def find_operation(
    model: Model, config: StepConfig, state: TrainState, data: Dataset | StreamedDataset, step: int
) -> str:
    """The first operation of a step that makes a NaN, or divides by zero, and where it is written.

    The step is taken again from the state before it, with every operation checked.
    """
    take = checkify.checkify(make_train_step(model, config), errors=checkify.float_checks)
    state = state._replace(step=np.int32(step), skipped=np.int32(0))
    error, _ = jax.jit(take)(state, batch_of(state, data, step))
    said = error.get()
    return "an overflow to Inf, and no operation on its own" if said is None else first_line(said)


def first_line(text: str) -> str:
    """What comes before a traceback."""
    return text.strip().splitlines()[0].rstrip(".")


def explain_failure(
    failure: NonfiniteError,
    data: Dataset | StreamedDataset,
    folder: Path,
    model: Model,
    config: StepConfig | None,
) -> str:
    """One line on a run that stopped for a NaN or Inf: where, what was in the batch, what to do.

    Args:
      failure: it.
      data: what the failed step reads.
      folder: takes the batch of that step.
      model: the run's.
      config: to find the operation with; None: it is not looked for.
    """
    step, state = failure.step, failure.state
    file = dump_batch(folder / f"batch_of_step_{step}.npz", state, data, step)
    remedy = "--config.debug_nans=true says which operation made it"
    if config is not None:
        remedy = f"it comes from {find_operation(model, config, state, data, step)}"
    return (
        f"the loss or a gradient of step {step:,} is NaN or Inf; its batch is in {file}; {remedy}; "
        "lower optimizer.learning_rate, or let --config.max_skipped_steps=N leave such steps out"
    )
