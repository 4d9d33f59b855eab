"""Averages the last checkpoints of a run, as in "Attention Is All You Need", section 6.1.

Writes a new run for evaluation and prediction, from which training cannot resume. A run keeps its
last `--config.keep_checkpoints` checkpoints.

    python scripts/average.py --workdir=runs/x [--last=5] [--into=runs/x_average]
    python eval.py --workdir=runs/x_average
"""

from pathlib import Path

import jax
from absl import flags

from transformer import cli
from transformer.averaging import average
from transformer.console import facts
from transformer.workdir import Workdir

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
LAST = flags.DEFINE_integer("last", 5, "Number of checkpoints.")
INTO = flags.DEFINE_string("into", None, "The new folder; default WORKDIR_average.")
cli.define_plugins_flag()


def main() -> None:
    """Writes the average and prints its steps."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the run
    workdir = Workdir(WORKDIR.value)
    into = Workdir(INTO.value or f"{Path(WORKDIR.value)}_average")
    steps = ", ".join(f"{step:,}" for step in average(workdir, into, LAST.value))
    facts({"average of": f"{workdir.path} at steps {steps}", "workdir": str(into.path)})


if __name__ == "__main__":
    cli.run(main)
