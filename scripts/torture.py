"""Kills a run at random moments, again and again, and compares it with one that was left alone.

Each time it is started again by the same command. What it ends with must be the same to the
last bit: every array of its checkpoints, which of them are kept and which is the best, and each
line of its metrics but for their speed; of a sweep that of all of its runs, and the report. One
that ends before the last kill is followed by another from the beginning.

Usage:
    python scripts/torture.py --kills=100
    python scripts/torture.py --kills=20 --command='train.py --config=configs/toy_copy.py'
    python scripts/torture.py --kills=20 \\
        --command='scripts/sweep.py --sweep=configs/ablations/norms.py --jobs=4'
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from absl import flags
from lab.sweeps.comparison import compare, read

from transformer import cli
from transformer.console import console, facts, table
from transformer.errors import UserError
from transformer.training.interruption import PARENT

SMALL = (
    "train.py --config=configs/toy_reverse.py --config.data.size=tiny --config.model.d_model=16 "
    "--config.model.num_heads=2 --config.model.d_ff=32 --config.model.dropout_rate=0.1 "
    "--config.optimizer.warmup_steps=5 --config.steps=1000 --config.log_every=20 "
    "--config.eval_every=100 --config.save_every=100"
)

KILLS = flags.DEFINE_integer("kills", 100, "How often it is killed.", lower_bound=1)
COMMAND = flags.DEFINE_string(
    "command", SMALL, "train.py or scripts/sweep.py and its flags, without --workdir."
)
WORKDIR = flags.DEFINE_string("workdir", "runs/torture", "Takes both runs.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

SPEEDS = ("seconds", "tokens_per_second")  # of a sweep's runs, in its report

ROOT = Path(__file__).parent.parent


def main() -> None:
    """One run is left alone, another is killed; then both are looked at."""
    words = shlex.split(COMMAND.value)
    if not words or words[0] not in ("train.py", "scripts/sweep.py"):
        raise UserError(
            f"--command={COMMAND.value!r}: it begins with train.py or scripts/sweep.py, and their "
            "flags follow"
        )
    root, rng = Path(WORKDIR.value).absolute(), random.Random(SEED.value)
    shutil.rmtree(root, ignore_errors=True)
    whole, killed = root / "whole", root / "killed"
    started = time.monotonic()
    finish(start(words, whole), whole)
    duration = time.monotonic() - started
    facts({"left alone": f"{duration:.1f} s"})

    moments: Counter[str] = Counter()
    runs = 0
    while moments.total() < KILLS.value:
        process = start(words, killed)
        try:
            process.wait(rng.uniform(0.0, duration))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the programs of a sweep too
            process.wait()
            moments[moment(words, killed)] += 1
            continue
        finish(process, killed)
        check(whole, killed)
        runs += 1
        shutil.rmtree(killed)
    finish(start(words, killed), killed)
    check(whole, killed)
    table(
        f"{KILLS.value} kills",
        ("while it was", "times"),
        [(k, str(n)) for k, n in moments.most_common()],
    )
    runs += 1
    console.print(f"{runs} run{'s' * (runs > 1)} ended as the one left alone, bit for bit")


def start(words: list[str], workdir: Path) -> subprocess.Popen:
    """The command in a process, its output in a file beside the folder."""
    more = [f"--workdir={workdir}"]
    more += [f"--data_dir={DATA_DIR.value}"] if DATA_DIR.value else []
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with log_of(workdir).open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *words, *more],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {PARENT: str(os.getpid())},
            start_new_session=True,
        )


def log_of(workdir: Path) -> Path:
    """What the last process in a folder has said."""
    return workdir.with_suffix(".log")


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for the end of a run, which must be a good one."""
    if process.wait() != 0:
        said = log_of(workdir).read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        raise UserError(
            f"{workdir}: exit status {process.returncode}, {said[-1]}; see {log_of(workdir)}"
        )


def moment(words: list[str], workdir: Path) -> str:
    """What a process was doing when it was killed, from what it left."""
    if words[0] != "train.py":
        ended = len(list(workdir.glob("*/results.json")))
        return f"sweeping, {ended} program{'s' * (ended != 1)} ended"
    checkpoints = workdir / "checkpoints"
    if "compiled" not in log_of(workdir).read_text(encoding="utf-8"):
        return "starting or compiling"
    if list(checkpoints.glob("*.orbax-checkpoint-tmp")):
        return "saving"
    if list(checkpoints.glob("trash/*")):
        return "deleting an old checkpoint"
    if (workdir / "results.json").exists():
        return "showing its results"
    return "training or evaluating"


def check(whole: Path, killed: Path) -> None:
    """Raises a UserError for the first difference between two finished runs, or sweeps."""
    for file in sorted(whole.rglob("config.json")):
        check_run(file.parent, killed / file.parent.relative_to(whole))
    reports = [figures(folder / "report.json") for folder in (whole, killed)]
    if reports[0] != reports[1]:
        raise UserError(f"{killed} has another report.json than {whole}; both are left as they are")


def figures(report: Path) -> str | None:
    """What a sweep's report says but for speeds, as text; None where there is none."""

    def without_speeds(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_speeds(v) for k, v in value.items() if k not in SPEEDS}
        return [without_speeds(each) for each in value] if isinstance(value, list) else value

    return (
        json.dumps(without_speeds(json.loads(report.read_text(encoding="utf-8"))))
        if report.exists()
        else None
    )


def check_run(whole: Path, killed: Path) -> None:
    """Raises a UserError for the first difference between two finished runs."""
    one, other = (read(folder) for folder in (whole, killed))
    if (one.steps, one.best) != (other.steps, other.best):
        apart = [
            f"it has the checkpoints {other.steps}, of which {other.best} is the best, and not "
            f"{one.steps} and {one.best}"
        ]
    else:
        apart = [
            f"{each.unequal} of {each.compared} {each.what} differ, {each.missing} one alone has"
            for each in compare(one, other, one.steps)
            if not each.identical()
        ]
    if apart:
        raise UserError(f"{killed} is not what {whole} is: {apart[0]}; both are left as they are")


if __name__ == "__main__":
    cli.run(main)
