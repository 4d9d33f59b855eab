"""Benchmarks this library against its peers in one run, and writes the page of results.

`pip install -e '.[bench]'` installs the peers; missing ones are skipped. Run it on an idle machine:
on a busy one, threads wait for each other.

    python scripts/benchmark.py
    python scripts/benchmark.py --sizes=tiny --what=time_to_accuracy,decoding
    python scripts/benchmark.py --sizes=marian --what=imported
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
from transformer.errors import UserError, check_choice, explained
from transformer.parallel.mesh import cpu_cores, cpu_name
from transformer.workdir import commit, versions

DEVICE = flags.DEFINE_enum("device", "cpu", list(task.SIZES), "What all contenders run on.")
SIZES = flags.DEFINE_list("sizes", ["tiny", "base", "text"], "Sizes; see task.SIZES.")
WHAT = flags.DEFINE_list("what", list(measure.PARTS)[:3], "Parts; see measure.PARTS.")
ONLY = flags.DEFINE_list("contenders", list(CONTENDERS), "Contenders; see contender.CONTENDERS.")
THREADS = flags.DEFINE_integer("threads", cpu_cores(), "Threads, on a CPU.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each contender.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of training to the target.", lower_bound=1)
TARGET = flags.DEFINE_float("target", 0.999, "Exact match at which training ends.")
LIMIT = flags.DEFINE_float("limit", 600.0, "Seconds of training per seed at most.")
WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "Folder for logs and parameters.")
OUTPUT = flags.DEFINE_string("output", "docs/results/benchmark.md", "Page; record beside it.")


def main() -> None:
    """Measures part by part, and writes the page after each."""
    known_sizes = task.SIZES[DEVICE.value]
    for flag, known in ((WHAT, measure.PARTS), (ONLY, CONTENDERS), (SIZES, known_sizes)):
        for name in flag.value:
            check_choice(known, name, f"--{flag.name}")
    if OURS not in ONLY.value:
        raise UserError(f"--contenders: it must include {OURS}, which the ratios are taken with")
    output = Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in SIZES.value:
        bench = prepare(name)
        for part in WHAT.value:
            if part != "training" and not bench.setting.size.steps:
                console.print(f"{name} on a {DEVICE.value} is not trained to a target for {part}")
                continue
            console.print(f"{name}: {part}")
            load, log = os.getloadavg()[0], bench.setting.folder / f"{OURS}.log"
            with explained(f"{OURS} failed in {part}: {{reason}}; see {log}", ContenderError):
                tables, found = measure.PARTS[part](bench)
            for each in tables:
                table(each["title"], each["columns"], each["rows"])
            own = {"tables": tables, "about": about(bench, load), "rounds": found}
            page.write(output, name, part, own)
    if output.exists():
        facts({"page": str(output)})


def prepare(name: str) -> measure.Bench:
    """Draws the pairs of a size, and finds the contenders that are installed."""
    size, folder = task.SIZES[DEVICE.value][name], Path(WORKDIR.value, f"{name}_{DEVICE.value}")
    task.save(size, folder)
    setting = Setting(size, folder, DEVICE.value, THREADS.value)
    often = ROUNDS.value, SEEDS.value, TARGET.value, LIMIT.value
    bench = measure.Bench(name, setting, ONLY.value, *often)
    for each in ONLY.value:
        if missing := CONTENDERS[each].missing():
            bench.failures[each] = f"{', '.join(missing)} not installed"
            console.print(f"{CONTENDERS[each].title} is skipped: {bench.failures[each]}")
    return bench


def about(bench: measure.Bench, load: float) -> str:
    """Describes the machine, the software and the missing contenders of a measurement."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # it takes no GPU memory
    device = cpu_name() if DEVICE.value == "cpu" else subprocess.check_output(query, text=True)
    present = [CONTENDERS[each] for each in bench.contenders if not CONTENDERS[each].missing()]
    peers = sorted({package for entry in present for package in entry.needs})
    both = vars(bench.setting.size), versions() | {each: metadata.version(each) for each in peers}
    size, software = (", ".join(f"{k} {v}" for k, v in each.items()) for each in both)
    absent = "".join(f" {CONTENDERS[name].title}: {why}." for name, why in bench.failures.items())
    return (
        f"`{shlex.join(['python', *sys.argv])}` on {device.strip()}, {THREADS.value} threads, load "
        f"before {load:.2f}; {size}; {software}; commit {commit() or 'unknown'}.{absent}"
    )


if __name__ == "__main__":
    cli.run(main)
