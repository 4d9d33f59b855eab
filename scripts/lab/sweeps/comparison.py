"""What two finished runs have in common: their metrics, their checkpoints, every array in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.config import RunConfig
from transformer.data.load import saved_tokenizers
from transformer.errors import UserError
from transformer.modules.model import Model
from transformer.parallel.mesh import one_device_mesh
from transformer.strict_json import numbers
from transformer.training.checkpoint import Checkpoints
from transformer.training.step import abstract_state
from transformer.training.workdir import Workdir

SPEEDS = ("per_second", "mfu", "data_waits")  # what no two runs have alike


class Finished(NamedTuple):
    """What a run left.

    metrics: step, replica and name → value, but for speeds.
    steps: of its checkpoints.
    best: the step of the best one.
    arrays: step of a checkpoint → name → array.
    """

    metrics: dict[tuple[int, int, str], float]
    steps: list[int]
    best: int
    arrays: dict[int, dict[str, np.ndarray]]


def read(workdir: Path) -> Finished:
    """Reads a run's folder.

    Raises:
      UserError: it is no run's, or something in it is damaged or there twice.
    """
    folder = Workdir(str(workdir))
    cfg = RunConfig.from_config_dict(folder.read_config())
    model = Model.of(cfg.model, *saved_tokenizers(cfg.data, folder.tokenizers))
    like = abstract_state(model, cfg.step_config(), one_device_mesh(), cfg.replicas, cfg.hparams())
    arrays = {}
    with Checkpoints(workdir / "checkpoints", None, cfg.best_metric) as checkpoints:
        steps, best = sorted(checkpoints.manager.all_steps()), checkpoints.find("best")
        for step in steps:
            leaves, _ = jax.tree_util.tree_flatten_with_path(checkpoints.restore(step, like))
            arrays[step] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return Finished(read_every_metric(workdir / "metrics.jsonl"), steps, best, arrays)


def read_every_metric(path: Path) -> dict[tuple[int, int, str], float]:
    """See `Finished.metrics`. Unlike `metrics.read_metrics` it allows no line that is cut off.

    Raises:
      UserError: a line is damaged, or says again what another has said.
    """
    found = {}
    try:
        text = path.read_text(encoding="utf-8")
        rows = [numbers(json.loads(line)) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); train anew") from error
    if not text.endswith("\n"):
        raise UserError(f"{path} ends in the middle of a line; train anew")
    for row in rows:
        step, replica = row.pop("step"), row.pop("replica", 0)
        for name, value in row.items():
            if (step, replica, name) in found:
                raise UserError(f"{path} has {name} of step {step} twice; train anew")
            if not name.endswith(SPEEDS):
                found[step, replica, name] = value
    return found


class Likeness(NamedTuple):
    """How two sets of numbers differ.

    what: they are.
    compared: how many both have.
    missing: how many only one has.
    unequal: how many of those compared are not the same to the last bit.
    largest: relative difference: of a metric to its size, of an array's element to the root
      mean square of the array; NaN where one is not a number and the other is.
    where: that is.
    """

    what: str
    compared: int
    missing: int
    unequal: int
    largest: float
    where: str

    def identical(self) -> bool:
        """Whether there is no difference."""
        return not self.missing and not self.unequal


def compare(one: Finished, other: Finished, steps: Sequence[int]) -> list[Likeness]:
    """Metric by metric, then of the checkpoints of `steps`, which both have, each kind of array."""

    def of_metric(run: Finished, wanted: str) -> dict[str, float]:
        return {
            f"step {step:,}" + (f", replica {replica}" if replica else ""): value
            for (step, replica, name), value in run.metrics.items()
            if name == wanted
        }

    def of_kind(run: Finished, step: int, wanted: str) -> dict[str, np.ndarray]:
        return {k: v for k, v in run.arrays[step].items() if kind_of(k) == wanted}

    names = sorted({name for _, _, name in one.metrics | other.metrics})
    found = [likeness(name, of_metric(one, name), of_metric(other, name)) for name in names]
    for step in steps:
        for kind in dict.fromkeys(map(kind_of, one.arrays[step] | other.arrays[step])):
            own = (of_kind(run, step, kind) for run in (one, other))
            found.append(likeness(f"{kind} at step {step:,}", *own))
    return found


def kind_of(name: str) -> str:
    """`params` of `.params['…/kernel']`."""
    return name.lstrip(".").split("[")[0].split(".")[0]


def likeness(what: str, one: dict[str, Any], other: dict[str, Any]) -> Likeness:
    """How two sets of named numbers or arrays differ."""
    both = [name for name in one if name in other]
    distances = {
        name: distance(np.asarray(one[name]), np.asarray(other[name]))
        for name in both
        if np.asarray(one[name]).tobytes() != np.asarray(other[name]).tobytes()
    }
    where = max(distances, key=lambda k: (np.isnan(distances[k]), distances[k]), default="")
    return Likeness(
        what=what,
        compared=len(both),
        missing=len(one.keys() ^ other.keys()),
        unequal=len(distances),
        largest=distances.get(where, 0.0),
        where=where,
    )


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of an element, relative to the root mean square of `one`."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.sqrt(np.mean(one**2)))
    apart = np.abs(one - other).max()
    return float(apart / scale) if scale else float("inf") if apart else 0.0
