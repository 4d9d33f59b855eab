"""Trains the variants of a sweep and writes a report with confidence intervals and verdicts.

A program is a call of `train.py`; `--dry_run` prints them. Repeating the command skips finished
programs and resumes interrupted ones.

    python scripts/sweep.py --sweep=configs/ablations/norms.py --jobs=4
    python scripts/sweep.py --sweep=configs/ablations/norms.py --cluster=slurm \\
        --cluster_parameters=timeout_min=60,slurm_partition=gpu,gpus_per_node=1
"""

import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags
from lab.sweeps import report, runner
from lab.sweeps.sweep import load_sweep, plan

from transformer import cli
from transformer.console import console, facts

SWEEP = flags.DEFINE_string("sweep", None, "The sweep file.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; default runs/<file's name>.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
REPLICAS = flags.DEFINE_integer("replicas", 8, "Most runs per program.", lower_bound=1)
JOBS = flags.DEFINE_integer("jobs", 1, "Programs at a time on this machine.", lower_bound=1)
CLUSTER = flags.DEFINE_enum("cluster", None, ["slurm", "local"], "Submit through submitit.")
PARAMETERS = flags.DEFINE_list("cluster_parameters", [], "For submitit: timeout_min=60, …")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the programs and their cost, and stop.")
PUBLISH = flags.DEFINE_string("publish", None, "A folder for a copy of the report.")


def main() -> None:
    """Plans the programs, runs them and writes the report."""
    sweep = load_sweep(SWEEP.value)
    root = Path(WORKDIR.value or f"runs/{Path(SWEEP.value).stem}")
    programs = plan(sweep, REPLICAS.value)
    runs = sum(len(program.members) for program in programs)
    console.print(f"{runs} runs in {len(programs)} programs")
    if DRY_RUN.value:
        title = f"{SWEEP.value}: {len(sweep.variants)} variants × {sweep.seeds} seeds"
        runner.show(title, programs, root, DATA_DIR.value)
        return
    signal.signal(signal.SIGTERM, runner.stop)
    parameters = dict(map(cli.cluster_parameter, PARAMETERS.value))
    cluster: Any = {"cluster": CLUSTER.value, "parameters": parameters}
    failures = runner.run_all(programs, root, DATA_DIR.value, jobs=JOBS.value, **cluster)
    command = shlex.join(["python", "scripts/sweep.py", *sys.argv[1:]])
    path = report.write_report(sweep, programs, failures, root, command)
    facts({"report": str(path)})
    if PUBLISH.value:
        folder = Path(PUBLISH.value)
        folder.mkdir(parents=True, exist_ok=True)
        for each in (*root.glob("*.png"), path, path.with_suffix(".json")):
            shutil.copy(each, folder / each.name)
    runner.check(failures, root)


if __name__ == "__main__":
    cli.run(main)
