"""Says how far two finished runs are alike: their metrics, and the arrays of their checkpoints.

For runs of one config: of another mesh, another number of processes, another version of JAX,
another machine.

Usage:
    python scripts/compare.py --run=runs/one --other=runs/two
"""

from pathlib import Path

from absl import flags
from lab.sweeps.comparison import compare, read

from transformer import cli
from transformer.config import differences
from transformer.console import console, facts, table
from transformer.errors import UserError
from transformer.training.workdir import Workdir

RUN = flags.DEFINE_string("run", None, "A run's folder.", required=True)
OTHER = flags.DEFINE_string("other", None, "Another's.", required=True)
cli.define_plugins_flag()


def main() -> None:
    """Reads both and prints a line for each metric and each kind of array."""
    cli.set_up_jax()
    configs = [Workdir(folder).read_config() for folder in (RUN.value, OTHER.value)]
    apart = differences(*configs)
    if apart:
        facts({"configs": "; ".join(apart)})
    one, other = (read(Path(folder)) for folder in (RUN.value, OTHER.value))
    common = sorted(set(one.steps) & set(other.steps))
    if not common:
        raise UserError(
            f"the runs have no checkpoint of the same step: {one.steps} and {other.steps}; "
            "train them for as many steps"
        )
    found = compare(one, other, common[-1:])
    rows = [
        (
            each.what,
            str(each.compared),
            str(each.missing),
            str(each.unequal),
            f"{each.largest:.1e}" if each.unequal else "",
            each.where,
        )
        for each in found
    ]
    columns = ("of", "compared", "in one only", "unequal", "largest, relative", "at")
    table(f"{RUN.value} and {OTHER.value}", columns, rows)
    alike = all(each.identical() for each in found)
    console.print("alike to the last bit" if alike else "not the same bits")


if __name__ == "__main__":
    cli.run(main)
