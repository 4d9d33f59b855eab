"""Compares two finished runs of one config: their metrics, and the arrays of their checkpoints.

The runs may differ in the mesh, the number of processes, the version of JAX or the machine.

    python scripts/compare.py --run=runs/one --other=runs/two
"""

from collections import defaultdict
from typing import Any

import jax
import numpy as np
from absl import flags

from transformer import cli
from transformer.config import differences
from transformer.console import console, facts, table
from transformer.errors import UserError
from transformer.parallel.mesh import one_device_mesh
from transformer.run import Run
from transformer.training.metrics import read_metrics
from transformer.workdir import Workdir

RUN = flags.DEFINE_string("run", None, "A run's folder.", required=True)
OTHER = flags.DEFINE_string("other", None, "Another run's folder.", required=True)
cli.define_plugins_flag()

SPEEDS = ("per_second", "mfu", "data_waits")  # metrics that no two runs share

Groups = dict[str, dict[str, Any]]  # metric, or field of the train state → where → value


def values_of(folder: Workdir, step: int) -> Groups:
    """The metrics by step and replica, without speeds; the arrays of a checkpoint by field."""
    found: Groups = defaultdict(dict)
    for row in read_metrics(folder.metrics):
        where = f"step {row.pop('step'):,}, replica {row.pop('replica', 0)}"
        for name in (name for name in row if not name.endswith(SPEEDS)):
            found[name][where] = row[name]
    state = Run.saved(folder.path, mesh=one_device_mesh()).restore(str(step))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        field = name.lstrip(".").split("[")[0].split(".")[0]
        found[f"{field} at step {step:,}"][name] = np.asarray(leaf)
    return found


def compare(one: Groups, other: Groups) -> list[tuple[str, int, int, int, float, str]]:
    """How two runs differ, group by group.

    The number of names that both have, that only one has, and that both have with different bits;
    the largest `distance`, NaN where one is NaN and the other is not, and its name.
    """
    found = []
    for group in {**one, **other}:
        ours, theirs = one.get(group, {}), other.get(group, {})
        both = {k: (np.asarray(ours[k]), np.asarray(theirs[k])) for k in ours if k in theirs}
        unequal = {k: distance(a, b) for k, (a, b) in both.items() if a.tobytes() != b.tobytes()}
        where = max(unequal, key=lambda k: (np.isnan(unequal[k]), unequal[k]), default="")
        counts = len(both), len(ours.keys() ^ theirs.keys()), len(unequal)
        found.append((group, *counts, unequal.get(where, 0.0), where))
    return found


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of an element, relative to the root mean square of `one`."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    scale, apart = float(np.sqrt(np.mean(one**2))), np.abs(one - other).max()
    return float(apart / scale) if scale else float("inf") if apart else 0.0


def main() -> None:
    """Prints a row for each metric and each field of the train state."""
    cli.set_up_jax()
    folders = [Workdir(path) for path in (RUN.value, OTHER.value)]
    if changed := differences(*(folder.read_config() for folder in folders)):
        facts({"configs": "; ".join(changed)})
    one, other = (
        {int(path.name) for path in folder.checkpoints.glob("*") if path.name.isdigit()}
        for folder in folders
    )
    if not one & other:
        fault = f"the runs have no checkpoint of the same step: {sorted(one)} and {sorted(other)}"
        raise UserError(f"{fault}; train them for equally many steps")
    found = compare(*(values_of(folder, max(one & other)) for folder in folders))
    rows = [
        (group, *map(str, counts), f"{largest:.1e}" * (counts[-1] > 0), where)
        for group, *counts, largest, where in found
    ]
    columns = ("of", "compared", "in one only", "unequal", "largest, relative", "at")
    table(f"{RUN.value} and {OTHER.value}", columns, rows)
    identical = not any(missing or unequal for _, _, missing, unequal, *_ in found)
    console.print("bit-identical" if identical else "not bit-identical")


if __name__ == "__main__":
    cli.run(main)
