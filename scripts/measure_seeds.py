"""Trains and evaluates a config with several seeds, one process after another, from cold.

Each run starts with an empty compilation cache and no prepared dataset, and the seconds
are of the whole process, from its start to its end, the preparation of the data and all
compilation included. `to step 1` ends when the train step is compiled and its first step
can begin; `again` is the same command with its compilation cache and dataset there. The accuracy is
that of `eval.py`: greedy decoding of the test split.

Usage:
    python scripts/measure_seeds.py --config=configs/toy_reverse.py --seeds=5
    taskset -c 0,1 python scripts/measure_seeds.py --config=configs/toy_reverse.py --seeds=1
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from transformer import cli
from transformer.console import console, table
from transformer.errors import UserError
from transformer.metrics import percent

CONFIG = flags.DEFINE_string("config", None, "The config file.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 5, "How many seeds, from 0.", lower_bound=1)

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Runs every seed and prints the table."""
    rows = []
    for seed in range(SEEDS.value):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(seed, Path(folder)))
        console.print(f"seed {seed}: {rows[-1]['seconds']:.1f} s")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table(
        f"{CONFIG.value}, {cores} CPU cores",
        ("seed", "to step 1", "to step 1, again", "whole run", "exact match"),
        [
            (
                str(row["seed"]),
                f"{row['first']:.1f} s",
                f"{row['again']:.1f} s",
                f"{row['seconds']:.1f} s",
                percent(row["accuracy"]),
            )
            for row in rows
        ],
    )


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Seconds and accuracy of one seed, with its own cache, data and workdir in `folder`."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    data, workdir = f"--data_dir={folder / 'data'}", f"--workdir={folder / 'run'}"
    train = ("train.py", f"--config={CONFIG.value}", f"--config.seed={seed}", data)
    seconds, first = run(train, workdir, environment)
    run(("eval.py", data), workdir, environment)
    (record,) = (folder / "run").glob("eval_*.json")
    (accuracy,) = (
        value
        for name, value in json.loads(record.read_text(encoding="utf-8"))["replicas"][0][
            "metrics"
        ].items()
        if name.endswith("sequence_accuracy")
    )
    _, again = run(train, f"--workdir={folder / 'again'}", environment, until_compiled=True)
    return {
        "seed": seed,
        "seconds": seconds,
        "first": first,
        "again": again,
        "accuracy": accuracy,
    }


def run(
    words: tuple[str, ...], workdir: str, environment: dict, until_compiled: bool = False
) -> tuple[float, float]:
    """Runs a program; the seconds to its end, and to its first step's line if it trains."""
    started, first = time.perf_counter(), float("nan")
    process = subprocess.Popen(
        [sys.executable, *words, workdir],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("compiled"):
            first = time.perf_counter() - started
            if until_compiled:
                process.kill()
    if process.wait() and not until_compiled:
        raise UserError(f"{' '.join(words)} failed with status {process.returncode}")
    return time.perf_counter() - started, first


if __name__ == "__main__":
    cli.run(main)
