"""Carries out a sweep and writes its report: from a question to a table with its uncertainty.

What is done is skipped and what was cut off is gone on with, so the same command can be
given again. Each program is a call of `train.py` that `--dry_run` prints.

Usage:
    python scripts/sweep.py --sweep=configs/ablations/norms.py --workdir=runs/norms --jobs=4
    python scripts/sweep.py --sweep=configs/ablations/norms.py --workdir=runs/norms --dry_run
    python scripts/sweep.py --sweep=configs/ablations/norms.py --workdir=runs/norms \\
        --cluster=slurm --cluster_parameters=timeout_min=60,slurm_partition=gpu,gpus_per_node=1
"""

import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags
from lab.sweeps import report, runner
from lab.sweeps.sweep import Program, Sweep, load_sweep, plan

from transformer import cli
from transformer.config import RunConfig
from transformer.console import console, facts, table
from transformer.data.load import open_corpus
from transformer.errors import UserError
from transformer.modules.model import Model
from transformer.training import costs
from transformer.training.interruption import Interrupted

SWEEP = flags.DEFINE_string("sweep", None, "The sweep file.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; default runs/<file's name>.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
REPLICAS = flags.DEFINE_integer("replicas", 8, "At most so many runs in a program.", lower_bound=1)
JOBS = flags.DEFINE_integer("jobs", 1, "Programs at a time on this machine.", lower_bound=1)
CLUSTER = flags.DEFINE_enum(
    "cluster", None, ["slurm", "local"], "Submit the programs through submitit."
)
PARAMETERS = flags.DEFINE_list(
    "cluster_parameters", [], "name=value, … for submitit's executor, such as timeout_min=60."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the programs and their cost, and stop.")
PUBLISH = flags.DEFINE_string("publish", None, "A folder that takes a copy of the report.")


def main() -> None:
    """Plans, runs, reports."""
    sweep = load_sweep(SWEEP.value)
    root = Path(WORKDIR.value or f"runs/{Path(SWEEP.value).stem}")
    programs = plan(sweep, REPLICAS.value)
    show(sweep, programs, root)
    if DRY_RUN.value:
        return
    signal.signal(signal.SIGTERM, stop)
    outcomes = runner.run_all(
        programs,
        root,
        DATA_DIR.value,
        jobs=JOBS.value,
        cluster=CLUSTER.value,
        cluster_parameters=dict(map(runner.parameter, PARAMETERS.value)),
    )
    failures = {each.program.name: each.failure for each in outcomes if each.failure is not None}
    command = shlex.join(["python", "scripts/sweep.py", *sys.argv[1:]])
    written = report.make(sweep, programs, failures, root, command)
    facts({"report": str(written)})
    if PUBLISH.value:
        publish(root, Path(PUBLISH.value))
    if failures:
        named = "; ".join(f"{name} ({reason})" for name, reason in failures.items())
        raise UserError(
            f"{len(failures)} of {len(programs)} programs failed: {named}; see log.txt in their "
            f"folders under {root}, and give the command again for what is missing"
        )


def stop(*_: Any) -> None:
    """Ends the programs with a checkpoint each, and the sweep."""
    raise Interrupted("the sweep was asked to stop; the same command goes on with it")


def show(sweep: Sweep, programs: list[Program], root: Path) -> None:
    """What will be run, together with what, and what it costs."""
    if DRY_RUN.value:
        for program in programs:
            for command in program.commands(root / program.name, DATA_DIR.value):
                print(shlex.join(["python", *command]))
        table(
            f"{SWEEP.value}: {len(sweep.variants)} variants × {sweep.seeds} seeds",
            ("program", "runs", "steps", "FLOPs of a run"),
            [
                (
                    program.name,
                    str(len(program.members)),
                    f"{program.resolved().steps:,}",
                    f"{flops(program):.3g}",
                )
                for program in programs
            ],
        )
    runs = sum(len(program.members) for program in programs)
    console.print(f"{runs} runs in {len(programs)} programs")


def flops(program: Program) -> float:
    """Of the matrix products in all the steps of one run."""
    cfg = RunConfig.from_config_dict(program.resolved())
    corpus = open_corpus(cfg.data, DATA_DIR.value)
    data = corpus.load(cfg.data.train, cfg.batch_size)
    model = Model.of(cfg.model, *corpus.tokenizers)
    return float(cfg.steps * costs.step_flops(model, cfg.step_config(), data))


def publish(root: Path, folder: Path) -> None:
    """Copies the report and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*root.glob("*.png"), root / "report.md", root / "report.json"):
        shutil.copy(path, folder / path.name)


if __name__ == "__main__":
    cli.run(main)
