"""Writes the mean of a run's last checkpoints as a run of its own, to evaluate and to predict with.

As in "Attention Is All You Need", section 6.1. The mean is of the parameters, of their moving
average (`ema_decay`) and of batch norm's statistics, whichever the run has; `averaging.mean` says
more. A run keeps as many checkpoints as its `--config.keep_checkpoints`. Its folder is only read;
in the new one no training goes on.

Usage:
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

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
LAST = flags.DEFINE_integer("last", 5, "How many checkpoints.")
INTO = flags.DEFINE_string("into", None, "The new folder; default that of the run, and _average.")
cli.define_plugins_flag()


def main() -> None:
    """Takes the mean, and says of what."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the run
    workdir = Workdir(WORKDIR.value)
    into = Workdir(INTO.value or f"{Path(WORKDIR.value)}_average")
    steps = average(workdir, into, LAST.value)
    facts(
        {
            "mean of": f"{workdir.path} at steps {', '.join(f'{step:,}' for step in steps)}",
            "workdir": str(into.path),
        }
    )


if __name__ == "__main__":
    cli.run(main)
