"""Compares two finished runs of one config: their metrics, and the arrays of their checkpoints.

The runs may differ in the mesh, the number of processes, the version of JAX or the machine.

Usage:
    python scripts/compare.py --run=runs/one --other=runs/two
"""

from absl import flags
from lab.comparison import arrays_of, compare, metrics_of

from transformer import cli
from transformer.config import differences
from transformer.console import console, facts, table
from transformer.errors import UserError
from transformer.workdir import Workdir

RUN = flags.DEFINE_string("run", None, "A run's folder.", required=True)
OTHER = flags.DEFINE_string("other", None, "Another run's folder.", required=True)
cli.define_plugins_flag()


def main() -> None:
    """Prints a row for each metric and each field of the train state."""
    cli.set_up_jax()
    folders = [Workdir(path) for path in (RUN.value, OTHER.value)]
    changed = differences(*(folder.read_config() for folder in folders))
    if changed:
        facts({"configs": "; ".join(changed)})
    steps = [
        {int(path.name) for path in folder.checkpoints.glob("*") if path.name.isdigit()}
        for folder in folders
    ]
    if not steps[0] & steps[1]:
        raise UserError(
            f"the runs have no checkpoint of the same step: {sorted(steps[0])} and "
            f"{sorted(steps[1])}; train them for equally many steps"
        )
    last = max(steps[0] & steps[1])
    found = compare(*(metrics_of(each.metrics) | arrays_of(each.path, last) for each in folders))
    rows = [
        (
            each.group,
            *map(str, (each.compared, each.missing, each.unequal)),
            f"{each.largest:.1e}" if each.unequal else "",
            each.where,
        )
        for each in found
    ]
    columns = ("of", "compared", "in one only", "unequal", "largest, relative", "at")
    table(f"{RUN.value} and {OTHER.value}", columns, rows)
    console.print("bit-identical" if all(each.identical for each in found) else "not bit-identical")


if __name__ == "__main__":
    cli.run(main)
