"""How far two finished runs agree: in their metrics, and in every array of a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.errors import UserError
from transformer.run import Run
from transformer.strict_json import numbers

SPEEDS = ("per_second", "mfu", "data_waits")  # metrics that no two runs share

Groups = dict[str, dict[str, np.ndarray]]  # metric, or kind of array → where → value


def read_metrics(path: Path) -> Groups:
    """Each metric of a finished run's `metrics.jsonl` by step and replica, without speeds.

    Raises:
      UserError: a line is damaged, incomplete or repeats a value.
    """
    found: Groups = {}
    try:
        text = path.read_text(encoding="utf-8")
        rows = [numbers(json.loads(line)) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); train again") from error
    if not text.endswith("\n"):
        raise UserError(f"{path} ends in the middle of a line; train again")
    for row in rows:
        step, replica = row.pop("step"), row.pop("replica", 0)
        where = f"step {step:,}" + (f", replica {replica}" if replica else "")
        for name, value in row.items():
            if where in found.setdefault(name, {}):
                raise UserError(f"{path} has {name} of {where} twice; train again")
            found[name][where] = np.asarray(value)
    return {name: each for name, each in found.items() if not name.endswith(SPEEDS)}


def read_arrays(workdir: Path, step: int) -> Groups:
    """The arrays of a checkpoint, grouped by field of the train state."""
    found: Groups = {}
    state = Run.saved(workdir).restore(str(step))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        field = name.lstrip(".").split("[")[0].split(".")[0]
        found.setdefault(f"{field} at step {step:,}", {})[name] = np.asarray(leaf)
    return found


class Agreement(NamedTuple):
    """How two groups of named numbers or arrays differ.

    compared: names that both have.
    missing: names that only one has.
    unequal: names that both have with other bits.
    largest: relative difference: of a number to its size, of an array's element to the root
      mean square of the array; NaN where one is NaN and the other is not.
    where: the name with the largest difference.
    """

    group: str
    compared: int
    missing: int
    unequal: int
    largest: float
    where: str

    @property
    def identical(self) -> bool:
        """Whether all are bit-identical."""
        return not self.missing and not self.unequal


def compare(one: Groups, other: Groups) -> list[Agreement]:
    """How two runs differ, group by group."""
    names = {**one, **other}
    return [agreement(name, one.get(name, {}), other.get(name, {})) for name in names]


def agreement(group: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Agreement:
    """How two groups differ."""
    both = {k: (np.asarray(one[k]), np.asarray(other[k])) for k in one if k in other}
    unequal = {k: distance(*each) for k, each in both.items() if different(*each)}
    where = max(unequal, key=lambda k: (np.isnan(unequal[k]), unequal[k]), default="")
    missing = len(one.keys() ^ other.keys())
    return Agreement(group, len(both), missing, len(unequal), unequal.get(where, 0.0), where)


def different(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays differ in any bit."""
    return one.tobytes() != other.tobytes()


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of an element, relative to the root mean square of `one`."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    scale, apart = float(np.sqrt(np.mean(one**2))), np.abs(one - other).max()
    return float(apart / scale) if scale else float("inf") if apart else 0.0
