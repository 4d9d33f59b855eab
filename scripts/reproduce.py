"""Trains and evaluates as a paper did, and says whether its result is reproduced.

    python scripts/reproduce.py --list
    python scripts/reproduce.py scan_simple [--jobs=2] [--seeds=5]

A name is that of a file in `configs/published`; the path of a file of your own works too. Repeating
the command resumes interrupted runs. With `--steps` there are fewer updates than in the recipe, and
the result says so.
"""

import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags
from lab import published
from lab.sweeps import runner
from lab.sweeps.sweep import plan

from transformer import cli
from transformer.config import load_config
from transformer.console import console, facts, table
from transformer.errors import UserError

LIST = flags.DEFINE_bool("list", False, "Print all results with their data and cost, and stop.")
SEEDS = flags.DEFINE_integer("seeds", None, "Number of seeds; default 3 to 5.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Updates; default the recipe's.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "Default runs/published/NAME, or NAME_STEPS.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
REPLICAS = flags.DEFINE_integer("replicas", 1, "Most seeds per program.", lower_bound=1)
JOBS = flags.DEFINE_integer("jobs", 1, "Programs at a time on this machine.", lower_bound=1)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the programs and their cost, and stop.")
PUBLISH = flags.DEFINE_string(
    "publish", None, "A folder of results, such as docs/results/published."
)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "published"


def main(*words: str) -> None:
    """Runs the programs of a result, and prints the published figures beside those found."""
    if LIST.value:
        show_list()
        return
    if len(words) != 1:
        raise UserError(f"give one name, of {', '.join(published.names())}; or --list")
    result, config = published.load(words[0])
    if PUBLISH.value and Path(config).resolve().parent != published.FOLDER:
        raise UserError(f"only results in configs/published have a page: move {words[0]} there")
    name, recipe = Path(config).stem, load_config(config)
    overrides = {"steps": STEPS.value} if STEPS.value else {}
    result.check(config, overrides)
    check_data(result, recipe.data)
    sweep = result.sweep(config, overrides, SEEDS.value)
    root = Path(WORKDIR.value or f"runs/published/{name}{f'_{STEPS.value}' if STEPS.value else ''}")
    records = [root / "published.json"]
    records += [Path(PUBLISH.value) / f"{name}.json"] if PUBLISH.value else []
    for path in filter(Path.exists, records):
        check_better(sweep.seeds, STEPS.value or recipe.steps, published.read_record(path), path)
    programs = plan(sweep, REPLICAS.value)
    if DRY_RUN.value:
        runner.show(name, programs, root, DATA_DIR.value)
        return
    signal.signal(signal.SIGTERM, runner.stop)
    runner.check(runner.run_all(programs, root, DATA_DIR.value, jobs=JOBS.value), root)
    command = shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]])
    recipes = result.recipes(config, overrides)
    record = published.write_record(result, recipes, programs, root, command)
    for row in published.summary(name, result, config, record):
        label, metric, figure, here, updates, answer = row
        console.print(f"{label}: published {figure}; here {here}; {answer}", markup=False)
        facts({"metric": metric, "updates": updates})
    if PUBLISH.value:
        folder = Path(PUBLISH.value).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "published.json", folder / f"{name}.json")
        facts({"page": str(published.write_page(folder))})


def check_data(result: published.Published, data: Any) -> None:
    """Raises a UserError that says where the data come from, if files are missing."""
    files = ",".join((data.train, data.validation, data.test)) if data.dataset == "files" else ""
    for file in filter(None, files.split(",")):
        if not Path(file).exists():
            raise UserError(f"{file}: there is no such file; get it from {result.data}")


def check_better(seeds: int, steps: int, record: dict[str, Any], path: Path) -> None:
    """Raises a UserError if a record is of more seeds, of which these are a choice, or updates."""
    outcomes = record["outcomes"].values()
    known = max(len(each.seeds) for each in outcomes)
    longest = max(each.config["steps"] for each in outcomes)
    if seeds < known or steps < longest:
        held = f"{known} seeds and {longest} steps; give as many, or choose another folder"
        raise UserError(f"--seeds={seeds} --steps={steps}: {path} holds a result of {held}")


def show_list() -> None:
    """Prints what can be reproduced, with its data and cost, and the last results."""
    rows, results = [], []
    for name in published.names():
        result, config = published.load(name)
        record, steps = published.saved(RESULTS, name), load_config(config).steps
        hours = result.hours(steps, record)
        rows.append((name, result.task, result.data, str(result.seeds), hours))
        results += published.summary(name, result, config, record)
    columns = ("name", "task", "data", "seeds", "hours of a seed, estimated")
    table("published results", columns, rows, text=True)
    table("last results", published.COLUMNS, results, text=True)


if __name__ == "__main__":
    cli.run(main, positional=True)
