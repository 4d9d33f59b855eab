"""How far two finished runs agree: in their metrics, and in every array of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.parallel.mesh import one_device_mesh
from transformer.run import Run
from transformer.training.metrics import read_metrics

SPEEDS = ("per_second", "mfu", "data_waits")  # metrics that no two runs share

Groups = dict[str, dict[str, Any]]  # metric, or field of the train state → where → value


def metrics_of(path: Path) -> Groups:
    """Each metric of a `metrics.jsonl` by step and replica, without speeds."""
    found: Groups = {}
    for row in read_metrics(path):
        step, replica = row.pop("step"), row.pop("replica", 0)
        where = f"step {step:,}" + (f", replica {replica}" if replica else "")
        for name, value in row.items():
            if not name.endswith(SPEEDS):
                found.setdefault(name, {})[where] = value
    return found


def arrays_of(workdir: Path, step: int) -> Groups:
    """The arrays of a checkpoint, grouped by field of the train state."""
    found: Groups = {}
    state = Run.saved(workdir, mesh=one_device_mesh()).restore(str(step))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        field = name.lstrip(".").split("[")[0].split(".")[0]
        found.setdefault(f"{field} at step {step:,}", {})[name] = np.asarray(leaf)
    return found


class Agreement(NamedTuple):
    """How two groups of named numbers or arrays differ."""

    group: str
    compared: int  # names that both have
    missing: int  # names that only one has
    unequal: int  # names that both have, with different bits
    largest: float  # `distance`; NaN where one is NaN and the other is not
    where: str  # the name with the largest distance

    @property
    def identical(self) -> bool:
        """Whether all are bit-identical."""
        return not self.missing and not self.unequal


def compare(one: Groups, other: Groups) -> list[Agreement]:
    """How two runs differ, group by group."""
    return [agreement(name, one.get(name, {}), other.get(name, {})) for name in {**one, **other}]


def agreement(group: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Agreement:
    """How two groups differ."""
    both = {name: (np.asarray(one[name]), np.asarray(other[name])) for name in one if name in other}
    unequal = {k: distance(a, b) for k, (a, b) in both.items() if a.tobytes() != b.tobytes()}
    where = max(unequal, key=lambda k: (np.isnan(unequal[k]), unequal[k]), default="")
    missing = len(one.keys() ^ other.keys())
    return Agreement(group, len(both), missing, len(unequal), unequal.get(where, 0.0), where)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of an element, relative to the root mean square of `one`."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    scale, apart = float(np.sqrt(np.mean(one**2))), np.abs(one - other).max()
    return float(apart / scale) if scale else float("inf") if apart else 0.0
