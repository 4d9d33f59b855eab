"""Submits a program to SLURM through submitit, one process per task.

SLURM requeues a job that is preempted or reaches its time limit, and the program resumes. All nodes
must see the repository, the environment and the run's folder. Needs `pip install -e '.[cluster]'`.

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

from transformer import cli
from transformer.console import facts
from transformer.errors import explained, needs

ROOT = Path(__file__).parents[2]
NODES = flags.DEFINE_integer("nodes", 1, "Number of nodes.", lower_bound=1)
TASKS = flags.DEFINE_integer("tasks_per_node", 1, "Processes per node; one per GPU.", lower_bound=1)
PARAMETERS = flags.DEFINE_list("cluster_parameters", [], "For submitit's executor: name=value,…")
COMMAND = flags.DEFINE_string("command", None, "train.py or eval.py, and its flags.", required=True)
LOGS = flags.DEFINE_string("logs", "runs/slurm", "Folder for the output of the jobs.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be submitted, and stop.")


class Command:
    """A command line that submitit requeues unchanged; the program itself finds its checkpoint."""

    def __init__(self, words: list[str]):
        self.words = words

    def __call__(self) -> None:
        # SLURM signals every process of a job before its end; submitit handles the signal.
        ignore = partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
        subprocess.run(self.words, cwd=ROOT, check=True, preexec_fn=ignore)

    def checkpoint(self) -> Any:
        """The submission that replaces the job when it must end."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        return DelayedSubmission(self)


def main() -> None:
    """Submits, or prints what it would submit."""
    words = [sys.executable, *cli.host_command(COMMAND.value)]
    parameters: dict[str, Any] = {"name": Path(words[1]).stem, "nodes": NODES.value}
    parameters |= {"tasks_per_node": TASKS.value, "slurm_additional_parameters": {"requeue": True}}
    parameters |= dict(map(cli.cluster_parameter, PARAMETERS.value))
    if DRY_RUN.value:
        print("\n".join(f"{name}={value}" for name, value in parameters.items()))
        print(shlex.join(["srun", *words]))
        return
    kinds = RuntimeError, ValueError, TypeError, OSError, NameError
    with needs("cluster"), explained("SLURM refused the job: {reason}", *kinds):
        import submitit  # pyright: ignore[reportMissingImports]  # an extra

        executor = submitit.AutoExecutor(LOGS.value, "slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**parameters)
        job = executor.submit(Command(words))
    facts({"job": job.job_id, "output": str(job.paths.stdout)})


if __name__ == "__main__":
    cli.run(main)
