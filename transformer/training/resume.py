"""Checks when training resumes from a checkpoint."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from transformer.console import console
from transformer.errors import UserError
from transformer.parallel import hosts
from transformer.training.step import StepConfig, TrainState


def check_same_run(state: TrainState, seeds: Any, steps: int, folder: Any) -> None:
    """Raises a UserError if the seeds differ, or the state is past the last step."""
    seed, step = hosts.fetch(state.seed).tolist(), state.taken()
    if seed != seeds.tolist() or step > steps:
        raise UserError(
            f"the checkpoint in {folder} has seed {seed} and step {step}, "
            f"the config seed={seeds.tolist()} and steps={steps}: another run; "
            "choose another --workdir"
        )


def check_stopped(state: TrainState, before: int, now: int) -> None:
    """Raises a UserError if a replica that stopped for a NaN or Inf would resume.

    Such a replica has missed the steps that the others have taken since.

    Args:
      state: the restored state.
      before: `max_skipped_steps` when the replica stopped.
      now: `max_skipped_steps` of the config.
    """
    skipped = np.atleast_1d(hosts.fetch(state.skipped))
    resumed = np.flatnonzero((skipped > before) & (skipped <= now))
    if resumed.size:
        raise UserError(
            f"max_skipped_steps={now}: replica {resumed[0]} stopped when it was {before}, and has "
            f"missed steps since; leave it at {before}, or choose another --workdir"
        )


def report_jump(state: TrainState, old: Sequence[StepConfig], new: Sequence[StepConfig]) -> None:
    """Prints a line if a changed config, such as another `steps`, makes the learning rate jump.

    Args:
      state: the restored state.
      old: the step config of each replica, from the saved config.
      new: the step config of each replica, from the new config.
    """
    updates = np.atleast_1d(hosts.fetch(state.step - state.skipped))
    for k, (done, *step_configs) in enumerate(zip(updates, old, new, strict=True)):
        before, now = (float(r.learning_rate(r.hparams, jnp.int32(done))) for r in step_configs)
        if abs(now - before) > 0.01 * max(now, before):
            console.print(
                f"the learning rate jumps after {done:,} updates, from {before:.3g} to {now:.3g}, "
                "since the config has changed; with optimizer.schedule=constant or inverse_sqrt it "
                "does not depend on steps" + (f" (replica {k})" if len(updates) > 1 else "")
            )
