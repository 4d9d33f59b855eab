"""The mean of a run's last checkpoints, as a run of its own.

Vaswani et al. 2017, section 6.1: the base model is the mean of its last 5 checkpoints, the big one
of its last 20.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from transformer.errors import UserError, within
from transformer.modules.model import Params
from transformer.parallel.mesh import one_device_mesh, place
from transformer.training.checkpoint import Checkpoints
from transformer.training.step import TrainState
from transformer.training.trained import outline
from transformer.workdir import Workdir, write_json


def average(workdir: Workdir, into: Workdir, last: int) -> list[int]:
    """Writes the mean of a run's last checkpoints; returns their steps.

    The new folder holds the run's config and tokenizers, and one checkpoint, at the newest step.
    That has no metrics, for nobody has measured any; being alone, it is the latest and the best.
    The run's folder is only read.

    Args:
      workdir: the run's folder.
      into: the new one.
      last: how many checkpoints.

    Raises:
      UserError: there are not so many in a row, one is damaged, the folder holds no run, or
        the new one is there already.
    """
    within("last", last, 1, 2**31 - 1)
    check_place(workdir, into)
    cfg, tokenizers, _, like = outline(workdir, one_device_mesh())
    with Checkpoints(workdir.checkpoints, None, cfg.best_metric) as checkpoints:
        checkpoints.find("latest")  # says so, if there is none
        saved = checkpoints.steps()
        steps = in_a_row(saved, cfg.save_every)[-last:]
        if len(steps) < last:
            raise UserError(
                f"last={last}: {workdir.path} has {len(steps)} checkpoints in a row (at "
                f"{', '.join(map(str, saved))}; save_every={cfg.save_every}); lower it, or train "
                f"with --config.keep_checkpoints={last}, which keeps more"
            )
        state = mean(checkpoints.restore(step, like) for step in steps)
    into.plots.mkdir(parents=True)
    with Checkpoints(into.checkpoints, 1, cfg.best_metric) as checkpoints:
        checkpoints.save(state, {})
    tokenizers.save(into.tokenizers)
    # At the end: without it the folder holds no run.
    made_of = {"averaged": {"workdir": str(workdir.path), "steps": steps}}
    write_json(into.config, workdir.read_record() | made_of)
    return steps


def check_place(workdir: Workdir, into: Workdir) -> None:
    """Raises a UserError unless the new folder is nowhere yet, and not in the run's own."""
    if into.path.exists():
        raise UserError(f"{into.path} is there already; choose another --into, or delete it")
    if workdir.path.resolve() in into.path.resolve().parents:
        raise UserError(
            f"{into.path} would be inside of {workdir.path}, which is only read; "
            "choose another --into"
        )


def in_a_row(steps: Sequence[int], every: int) -> list[int]:
    """The last of `steps` between which none is missing, if one was saved `every` so often.

    The best checkpoint stays when those around it go, and is none of the last ones then.
    """
    first = len(steps) - 1
    while first > 0 and steps[first] <= (steps[first - 1] // every + 1) * every:
        first -= 1
    return list(steps[first:])


def mean(states: Iterable[TrainState]) -> TrainState:
    """The last of some states of one run, with the mean of all in what a model is evaluated with.

        m = (x₁ + … + x_N) / N

    in float64, rounded to float32 at its end: of equal arrays it is that array, bit for bit. Of a
    population each replica has its own mean. What is taken the mean of:

    params: the parameters.
    ema_params: their moving averages, which are evaluated in their place where a run has them.
    batch_stats: the means and variances that batch norm has seen. Those that the mean of the
      parameters would see are others, as variances are not linear in it; to measure them takes a
      pass over the training data (Izmailov et al. 2018, section 3.2), which is not made.

    The rest, such as the optimizer state, and which replica had stopped, is the last state's.
    """
    states = iter(states)
    state, count = next(states), 1
    totals = wide(state)  # not 0.0 to begin with, which would make 0.0 of -0.0
    for state in states:
        totals = jax.tree.map(np.add, totals, wide(state))
        count += 1

    def rounded(total: np.ndarray, leaf: jax.Array) -> jax.Array:
        return place((total / count).astype(leaf.dtype), leaf.sharding)

    return state._replace(**jax.tree.map(rounded, totals, evaluated(state)))


def evaluated(state: TrainState) -> dict[str, Params]:
    """What `TrainState.variables` is made of."""
    return {
        "params": state.params,
        "ema_params": state.ema_params,
        "batch_stats": state.batch_stats,
    }


def wide(state: TrainState) -> Any:
    """The same as NumPy's float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), evaluated(state))
