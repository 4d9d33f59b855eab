"""Submits a program to SLURM through submitit, as one process of many in each task.

The processes find each other by themselves. A job that is preempted, requeued, or at the end of its
time goes back into the queue and then on from its last checkpoint. The repository, the environment
and the run's folder must be where all nodes see them. It needs `pip install -e '.[cluster]'`.

Usage:
    python scripts/launch/slurm.py --nodes=4 --tasks_per_node=8 \\
        --cluster_parameters=gpus_per_node=8,cpus_per_task=8,timeout_min=720,slurm_partition=gpu \\
        --command='train.py --config=configs/vaswani_big.py --workdir=runs/big' [--dry_run]
"""

import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from lab.sweeps.runner import ROOT, parameter

from transformer import cli
from transformer.console import facts
from transformer.errors import UserError

NODES = flags.DEFINE_integer("nodes", 1, "How many nodes.", lower_bound=1)
TASKS = flags.DEFINE_integer("tasks_per_node", 1, "Processes a node; one a GPU.", lower_bound=1)
PARAMETERS = flags.DEFINE_list(
    "cluster_parameters", [], "name=value, … for submitit's executor, such as timeout_min=60."
)
COMMAND = flags.DEFINE_string("command", None, "train.py or eval.py, and its flags.", required=True)
LOGS = flags.DEFINE_string("logs", "runs/slurm", "The folder of what the jobs print.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be submitted, and stop.")


class Command:
    """A command line that submitit puts back into the queue as it is: it finds where it was."""

    def __init__(self, words: list[str]):
        self.words = words

    def __call__(self) -> None:
        # SLURM announces the end of a job to all its processes; submitit's answers for them.
        ignore = partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
        subprocess.run(self.words, cwd=ROOT, check=True, preexec_fn=ignore)

    def checkpoint(self) -> Any:
        """What is to be submitted when the job must end."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        return DelayedSubmission(self)


def main() -> None:
    """Submits, or prints what it would submit."""
    words = [sys.executable, *cli.host_command(COMMAND.value)]
    parameters: dict[str, Any] = {
        "name": Path(words[1]).stem,
        "nodes": NODES.value,
        "tasks_per_node": TASKS.value,
        "slurm_additional_parameters": {"requeue": True},
        **dict(map(parameter, PARAMETERS.value)),
    }
    if DRY_RUN.value:
        print("\n".join(f"{name}={value}" for name, value in parameters.items()))
        print(shlex.join(["srun", *words]))
        return
    try:
        import submitit  # pyright: ignore[reportMissingImports]  # an extra

        executor = submitit.AutoExecutor(LOGS.value, "slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**parameters)
        job = executor.submit(Command(words))
    except ImportError as error:
        raise UserError("submitit is not installed; pip install -e '.[cluster]'") from error
    except (RuntimeError, ValueError, TypeError, OSError, NameError) as error:
        raise UserError(f"SLURM took no job: {' '.join(str(error).split())[:200]}") from error
    facts({"job": job.job_id, "output": str(job.paths.stdout)})


if __name__ == "__main__":
    cli.run(main)
