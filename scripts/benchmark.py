"""Benchmarks this library beside its peers in one run, and writes the page.

`pip install -e '.[bench]'` installs the peers; one that is missing is skipped. Run it on an idle
machine, because the threads of a busy one wait for each other.

Usage:
    python scripts/benchmark.py
    python scripts/benchmark.py --sizes=tiny --what=time_to_accuracy,decoding
    python scripts/benchmark.py --device=gpu --sizes=base,big --what=training
"""

import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from absl import flags
from lab.benchmark import measure, page, task
from lab.benchmark.contender import CONTENDERS, OURS, Setting
from lab.benchmark.worker import ContenderError

from transformer import cli
from transformer.console import console, facts, table
from transformer.errors import UserError, choose
from transformer.parallel.devices import cpu_cores, cpu_name
from transformer.training.workdir import commit, versions

DEVICE = flags.DEFINE_enum("device", "cpu", list(task.SIZES), "What all contenders run on.")
SIZES = flags.DEFINE_list("sizes", ["tiny", "base"], "Sizes; see task.SIZES.")
WHAT = flags.DEFINE_list("what", list(measure.PARTS), "Parts; see measure.PARTS.")
ONLY = flags.DEFINE_list("contenders", list(CONTENDERS), "Contenders; see contender.CONTENDERS.")
THREADS = flags.DEFINE_integer("threads", cpu_cores(), "Threads, on a CPU.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each contender.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of training to the target.", lower_bound=1)
TARGET = flags.DEFINE_float("target", 0.999, "Exact match at which training ends.")
LIMIT = flags.DEFINE_float("limit", 600.0, "Seconds of training per seed at most.")
WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "Folder for logs and parameters.")
OUTPUT = flags.DEFINE_string(
    "output", "docs/results/benchmark.md", "The page; its record and chart lie beside it."
)


def main() -> None:
    """Measures part by part, and writes the page after each."""
    known_sizes = task.SIZES[DEVICE.value]
    for flag, known in ((WHAT, measure.PARTS), (ONLY, CONTENDERS), (SIZES, known_sizes)):
        for name in flag.value:
            choose(known, name, f"--{flag.name}")
    if OURS not in ONLY.value:
        raise UserError(f"--contenders: it must include {OURS}, which the ratios are taken with")
    output = Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in SIZES.value:
        bench = prepare(name)
        for part in WHAT.value:
            if part != "training" and not bench.setting.size.steps:
                console.print(f"{name} on a {DEVICE.value} is too large for {part}")
                continue
            console.print(f"{name}: {part}")
            about = {"load": round(os.getloadavg()[0], 2), "commit": commit()}
            try:
                tables, found = measure.PARTS[part](bench)
            except ContenderError as error:
                log = bench.setting.folder / f"{OURS}.log"
                raise UserError(f"{OURS} failed in {part} of {name}: {error}; see {log}") from error
            for each in tables:
                table(each.title, each.columns, each.rows)
            page.store(output, name, part, tables, about=made_with(bench) | about, rounds=found)
            page.write(output)
    if output.exists():
        facts({"page": str(output)})


def prepare(name: str) -> measure.Bench:
    """Draws the strings of a size, and finds the contenders that are installed."""
    size = task.SIZES[DEVICE.value][name]
    folder = Path(WORKDIR.value, f"{name}_{DEVICE.value}")
    task.save(size, folder)
    missing = {each: ", ".join(CONTENDERS[each].missing()) for each in ONLY.value}
    failures = {each: f"{packages} not installed" for each, packages in missing.items() if packages}
    for each, why in failures.items():
        console.print(f"{CONTENDERS[each].title} is skipped: {why}")
    return measure.Bench(
        size=name,
        setting=Setting(size, folder, DEVICE.value, THREADS.value),
        contenders=ONLY.value,
        rounds=ROUNDS.value,
        seeds=SEEDS.value,
        target=TARGET.value,
        limit=LIMIT.value,
        failures=failures,
    )


def made_with(bench: measure.Bench) -> dict:
    """What a part was measured on and with."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # it takes no GPU memory
    device = cpu_name() if DEVICE.value == "cpu" else subprocess.check_output(query, text=True)
    present = [CONTENDERS[each] for each in bench.contenders if not CONTENDERS[each].missing()]
    needs = sorted({package for entry in present for package in entry.needs})
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": device.partition("\n")[0],
        "threads": bench.setting.threads,
        "size": vars(bench.setting.size),
        "versions": versions() | {each: metadata.version(each) for each in needs},
        "absent": bench.failures,
    }


if __name__ == "__main__":
    cli.run(main)
