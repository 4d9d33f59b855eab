"""Averages the last checkpoints of a run: 5 or 20 in Vaswani et al. 2017, section 6.1."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from transformer.errors import UserError
from transformer.knobs import Range
from transformer.parallel.mesh import one_device_mesh, place
from transformer.run import Run
from transformer.training.checkpoint import Checkpoints
from transformer.training.step import TrainState
from transformer.workdir import Workdir, write_json


def average(workdir: Workdir, into: Workdir, last: int) -> list[int]:
    """Writes the mean of a run's last checkpoints as a new run; returns their steps.

    The new folder holds the run's config and tokenizers, and one checkpoint, at the newest step,
    without metrics. The run's folder is not changed.
    """
    Range(1, 2**31 - 1).check("last", last)
    if into.path.exists():
        raise UserError(f"{into.path} already exists; choose another --into, or delete it")
    if workdir.path.resolve() in into.path.resolve().parents:
        raise UserError(f"{into.path} is inside the averaged run; choose another --into")
    run = Run.saved(workdir.path, mesh=one_device_mesh())
    every, best = run.config.save_every, run.config.best_metric
    with Checkpoints(workdir.checkpoints, None, best) as checkpoints:
        checkpoints.find("latest")  # a UserError if there is none
        saved = checkpoints.steps()
        steps = consecutive(saved, run.config.save_intervals())[-last:]
        if len(steps) < last:
            raise UserError(
                f"last={last}: {workdir.path} has {len(steps)} checkpoints in a row (at "
                f"{', '.join(map(str, saved))}; save_every={every}); lower it, or train "
                f"with --config.keep_checkpoints={last}, which keeps more"
            )
        state = mean(checkpoints.restore(step, run.abstract_state) for step in steps)
    into.plots.mkdir(parents=True)
    with Checkpoints(into.checkpoints, 1, best) as checkpoints:
        checkpoints.save(state, {})
    run.tokenizers.save(into.tokenizers)
    # Last: a folder without it holds no run.
    record, source = workdir.read_record(), {"workdir": str(workdir.path), "steps": steps}
    write_json(into.config, record | {"config": record["config"].to_dict(), "averaged": source})
    return steps


def consecutive(steps: Sequence[int], intervals: Sequence[int]) -> list[int]:
    """The last of `steps` without a gap: the best checkpoint may be much older than the others."""
    first = len(steps) - 1
    next_save = lambda step: min((step // every + 1) * every for every in intervals)  # noqa: E731
    while first > 0 and steps[first] <= next_save(steps[first - 1]):
        first -= 1
    return list(steps[first:])


def mean(states: Iterable[TrainState]) -> TrainState:
    """The last state of a run with the averages over several states.

    Parameters, their moving averages and batch statistics are averaged in float64 and rounded to
    float32 once: the mean of equal arrays is bit-identical to them. The statistics of batch norm
    are not those of the mean parameters, which would take a pass over the training data (Izmailov
    et al. 2018, section 3.2).
    """

    def wide(state: TrainState) -> Any:
        kept = {name: getattr(state, name) for name in ("params", "ema_params", "batch_stats")}
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), kept)

    def rounded(total: np.ndarray, leaf: jax.Array) -> jax.Array:
        return place((total / count).astype(leaf.dtype), leaf.sharding)

    states = iter(states)
    state, count = next(states), 1
    totals = wide(state)  # not 0.0 at first, which would turn -0.0 into 0.0
    for state in states:
        totals, count = jax.tree.map(np.add, totals, wide(state)), count + 1
    last = {name: getattr(state, name) for name in totals}
    return state._replace(**jax.tree.map(rounded, totals, last))
