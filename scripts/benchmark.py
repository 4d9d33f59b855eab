"""Times this code beside what people would use instead, in one run, and writes the page.

The peers come with `pip install -e '.[bench]'`; who is not installed is left out. On a machine
where nothing else works: the threads of a loaded one wait for each other. `search` looks for
each contender's learning rate, the same grid for all, and the parts after it train with what it
found.

Usage:
    python scripts/benchmark.py
    python scripts/benchmark.py --sizes=tiny --what=search,time_to_accuracy,decoding
    python scripts/benchmark.py --device=gpu --sizes=base,big --what=training
"""

import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from absl import flags
from lab.benchmark import measure, page, task
from lab.benchmark.contender import CONTENDERS, OURS, Setting
from lab.benchmark.rotation import ContenderError

from transformer import cli
from transformer.console import console, facts
from transformer.errors import UserError, choose
from transformer.parallel.devices import cpu_cores, cpu_name
from transformer.training.workdir import commit, versions, write_json

DEVICE = flags.DEFINE_enum("device", "cpu", list(task.SIZES), "What all of them run on.")
SIZES = flags.DEFINE_list("sizes", ["tiny", "base"], "Which sizes; see task.SIZES.")
WHAT = flags.DEFINE_list(
    "what", ["start", "training", "time_to_accuracy", "decoding"], "Which parts; see measure.PARTS."
)
ONLY = flags.DEFINE_list("contenders", list(CONTENDERS), "Who takes part.")
THREADS = flags.DEFINE_integer("threads", cpu_cores(), "Of a CPU.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each contender.", lower_bound=1)
STARTS = flags.DEFINE_integer("starts", 3, "Starts of each contender.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 5, "Of training to the target.", lower_bound=1)
TARGET = flags.DEFINE_float("target", 0.999, "The share of strings that come out right.")
LIMIT = flags.DEFINE_float("limit", 600.0, "Seconds of training for a seed at most.")
WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "Takes logs and trained parameters.")
OUTPUT = flags.DEFINE_string(
    "output", "docs/results/benchmark.md", "The page; its numbers and its chart lie beside it."
)


def main() -> None:
    """Measures part by part, and writes the page after each."""
    for name in WHAT.value:
        choose(measure.PARTS, name, "--what")
    for name in ONLY.value:
        choose(CONTENDERS, name, "--contenders")
    for name in SIZES.value:
        choose(task.SIZES[DEVICE.value], name, "--sizes")
    if OURS not in ONLY.value:
        raise UserError(f"--contenders: {OURS} must be among them, for ratios are taken with it")
    if DEVICE.value == "gpu":
        gpu()  # or there is no use in going on
    output = Path(OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in SIZES.value:
        size = task.SIZES[DEVICE.value][name]
        bench = prepare(name, size, output)
        for part in WHAT.value:
            if part in measure.TRAINED and not size.steps:
                console.print(f"{name} is not trained to its end on a {DEVICE.value}: no {part}")
                continue
            carry_out(part, name, bench, output)
    if output.exists():
        facts({"page": str(output)})


def prepare(name: str, size: task.Size, output: Path) -> measure.Bench:
    """Draws the strings of a size and finds out who takes part."""
    folder = Path(WORKDIR.value, f"{name}_{DEVICE.value}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "strings.npz"
    task.save(size, data)
    absent = {each: CONTENDERS[each].missing() for each in ONLY.value}
    for each, packages in absent.items():
        if packages:
            console.print(
                f"{CONTENDERS[each].title} is left out: {', '.join(packages)} not installed"
            )
    bench = measure.Bench(
        setting=Setting(size=size, data=data, device=DEVICE.value, threads=THREADS.value),
        folder=folder,
        contenders=ONLY.value,
        rounds=ROUNDS.value,
        starts=STARTS.value,
        seeds=SEEDS.value,
        target=TARGET.value,
        limit=LIMIT.value,
        settings=searched(output, name),
    )
    bench.failures |= {
        each: f"{', '.join(packages)} not installed"
        for each, packages in absent.items()
        if packages
    }
    return bench


def carry_out(part: str, name: str, bench: measure.Bench, output: Path) -> None:
    """Measures a part of a size, and writes what came of it."""
    before = {"load": round(os.getloadavg()[0], 2), "commit": commit()}
    console.print(f"{name}: {part}")
    try:
        found = measure.PARTS[part](bench)
    except ContenderError as error:
        raise UserError(
            f"this code failed in {part} of {name}: {error}; see {bench.folder / OURS}.log"
        ) from error
    if part == "search":
        bench.settings = without_trials(found)
        path = settings_file(output)
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, record | {name: found})
        return
    page.store(output, name, part, found, about(bench) | before)
    page.write(output)
    for line in page.fastest(part, found).splitlines():
        console.print(line.replace("**", ""))


def settings_file(output: Path) -> Path:
    """Where a search leaves what it found: beside the page."""
    return output.with_name(f"{output.stem}_settings.json")


def searched(output: Path, size: str) -> dict:
    """What a search of that size has found, as `Bench.settings`; empty without one."""
    path = settings_file(output)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return without_trials(record.get(size, {}))


def without_trials(found: dict) -> dict:
    """What came out of a search, as `Bench.settings`."""
    return {
        name: {"schedule": own["schedule"], "batching": own["batching"]}
        for name, own in found.items()
    }


def about(bench: measure.Bench) -> dict:
    """What a part was measured with."""
    present = [CONTENDERS[each] for each in bench.contenders if not CONTENDERS[each].missing()]
    needs = {package for entry in present for package in entry.needs}
    size = vars(bench.setting.size)
    shown = ("width", "heads", "ff_width", "layers", "vocabulary", "longest", "batch", "pack")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": cpu_name() if DEVICE.value == "cpu" else gpu(),
        "threads": THREADS.value,
        "size": {each: size[each] for each in shown},
        "versions": versions() | {each: metadata.version(each) for each in sorted(needs)},
        "absent": dict(bench.failures),
    }


def gpu() -> str:
    """The name of the first GPU, asked for without taking its memory.

    Raises:
      UserError: there is none.
    """
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        out = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("--device=gpu: nvidia-smi finds none; leave it out for the CPU") from error
    return out.splitlines()[0]


if __name__ == "__main__":
    cli.run(main)
