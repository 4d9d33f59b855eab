"""Published results: what is reproduced, the rule for the verdict, and the page of results.

A file in `configs/published` has `get_config()`, the recipe of the paper with the source of each
number, and `get_published()`, which returns what the paper reports. Only the latter imports this
module: `train.py` reads the file too, and has no `lab`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab import plots
from lab.statistics import Interval, mean_interval
from lab.sweeps.report import read_json
from lab.sweeps.sweep import Overrides, Program, Sweep, plan
from lab.tables import markdown
from transformer.config import RUNTIME_KNOBS, continued, differences, load_config, saved_config
from transformer.errors import UserError, check_choice, explained
from transformer.files import nan_for_null
from transformer.training.metrics import read_metrics
from transformer.workdir import Workdir, write_json

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "published"
FEWEST = 3  # seeds for a verdict
RECORD = ("command", "commits", "versions", "devices")  # in a record, beside the outcomes
# FLOP/s: of two cores, as measured of SCAN (CMUdict, on another CPU: 2.8e11); of a GPU, assumed.
CPU_RATE, GPU_RATE = 6e10, 1e13
GPU_SECONDS = 0.005  # of a small update, assumed
HEAD = f"""# Published results

    python scripts/reproduce.py NAME

trains by a paper's recipe, evaluates as the paper evaluated and compares. Where a recipe is ours,
its section says so. Figures, margins and intervals were fixed before the runs; the rules for
diverged, shorter and longer runs were added later. A figure is
*reproduced* if the mean over the seeds is better than it, or worse by at most its margin. The
verdict is *inconclusive* with fewer than {FEWEST} seeds, if the 95% interval is wider than twice
the margin, if a seed diverged, or if the figure was missed with fewer updates than the recipe has
(`--steps`). A published failure is reproduced only by all updates, and by models that have learned:
the validation sequence accuracy (teacher-forced) of each seed must be at least 95%. The interval is
the wider of two: Student's t over the seeds, and the mean of the seeds' intervals over test items
(bootstrap, or Wilson's for proportions). All figures are percentages or BLEU; brackets hold the
interval.
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure, and when it counts as reproduced."""

    value: float
    margin: float  # by which the mean may be worse
    better: int = 1  # 1 if a higher figure is better, -1 if a lower one is
    learned: float = 0.0  # least validation sequence accuracy: untrained models fail anyway
    overrides: Overrides = field(default_factory=dict)  # of the recipe
    words: str = ""  # the figure as the source words it, if not as a number

    def text(self) -> str:
        """`about 31 (at most 32)`."""
        bound = f"{self.value - self.better * self.margin:g}"
        side = "at least" if self.better > 0 else "at most"
        return f"{self.words or f'{self.value:g}'} ({side} {bound})"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A result of a paper."""

    task: str
    source: str  # the paper, and where it has the figures
    data: str  # where the data come from
    metric: str  # a text metric in the file of `eval.py`
    figures: Mapping[str, Figure]  # variant → its figure
    seeds: int = 5
    average: int = 0  # see `Sweep`
    flops: float  # of the most expensive seed, as --dry_run prints
    note: str = ""  # choices that the paper leaves open

    def __post_init__(self):
        if not self.figures:
            raise UserError("figures={}: give at least one")

    def hours(self, steps: int, record: Mapping[str, Any] | None) -> str:
        """How long `steps` updates take: `5.2 on 2 CPU cores, 0.03 on a GPU`, estimated.

        With a record, also what its slowest variant took on its device.
        """
        gpu = max(self.flops / GPU_RATE, steps * GPU_SECONDS)
        text = f"{_hours(self.flops / CPU_RATE)} on 2 CPU cores, {_hours(gpu)} on a GPU"
        if not record:
            return text
        rates = [each.seconds_per_update for each in record["outcomes"].values()]
        return f"{text}; measured: {_hours(steps * max(rates))} on {record['devices']}"

    def sweep(self, config: str, overrides: Overrides, seeds: int | None = None) -> Sweep:
        """The runs that reproduce it."""
        return Sweep(
            config=config,
            variants={name: each.overrides for name, each in self.figures.items()},
            baseline=next(iter(self.figures)),
            seeds=seeds or self.seeds,
            overrides=overrides,
            splits=("test",),
            average=self.average,
        )

    def recipes(self, config: str, overrides: Overrides) -> dict[str, Any]:
        """The config of each variant, of its first seed."""
        programs = plan(self.sweep(config, overrides, 1), 1)
        return {program.members[0][0]: program.resolved() for program in programs}

    def check(self, config: str, overrides: Overrides) -> None:
        """Raises a UserError for what would fail after the training."""
        for recipe in self.recipes(config, overrides).values():
            check_choice(recipe.data.metrics, self.metric.partition(",")[0], "metric")
            saved = min(recipe.keep_checkpoints, recipe.steps // recipe.save_every)
            if saved < self.average:
                fault = f"average={self.average} checkpoints, and there will be {saved}"
                raise UserError(f"{fault}: raise steps or keep_checkpoints, or lower save_every")


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def names() -> list[str]:
    """The names of the published results."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name: str) -> tuple[Published, str]:
    """A published result and the path of its config file: a name, or the path of another file."""
    path = Path(name)
    if path.suffix != ".py":
        check_choice(names(), name, "name")
        path = FOLDER / f"{name}.py"
        # In the commands that are printed, relative to the folder in which they work.
        path = path.relative_to(ROOT) if Path.cwd() == ROOT else path
    published = load_config(path, "get_published")
    if not isinstance(published, Published):
        raise UserError(f"{path}: get_published() returns no Published")
    return published, str(path)


@dataclass(frozen=True)
class Outcome:
    """What the runs of a variant gave."""

    seeds: Sequence[int]
    values: Sequence[float]  # of each seed
    low: float  # the mean of the seeds' bounds over test items
    high: float
    signature: str  # of the metric
    validation: Sequence[float]  # sequence accuracy of each seed, teacher-forced
    updates: Sequence[int]  # that each seed has taken
    seconds_per_update: float  # of a seed, so the program's by its replicas
    curve: Mapping[str, Sequence[float]]  # step, and mean, lowest and highest validation loss
    config: Mapping[str, Any]  # of the first seed

    def interval(self) -> Interval:
        """The wider interval: over the seeds, or over test items."""
        over_seeds = mean_interval(self.values)
        if over_seeds.n > 1 and over_seeds.high - over_seeds.low >= self.high - self.low:
            return over_seeds
        return Interval(over_seeds.mean, self.low, self.high, over_seeds.n)


def verdict(figure: Figure, outcome: Outcome, recipe: Any) -> str:
    """`reproduced`, `not reproduced`, or `inconclusive` and why."""
    found, learned = outcome.interval(), min(outcome.validation)
    saved = saved_config(outcome.config)
    shorter = saved.steps < recipe.steps
    free = (*RUNTIME_KNOBS, "steps") if shorter else RUNTIME_KNOBS
    changes = differences(saved, continued(recipe, saved), free)
    if changes:
        return f"inconclusive: of another recipe ({'; '.join(changes)})"
    if not np.isfinite([*outcome.values, *outcome.validation]).all():
        return "inconclusive: a seed diverged"
    if learned < figure.learned:
        return f"inconclusive: validation accuracy {learned:.1f}, and {figure.learned:g} is needed"
    if found.n < FEWEST:
        return f"inconclusive: {found.n} of at least {FEWEST} seeds"
    if not found.high - found.low <= 2 * figure.margin:
        return f"inconclusive: the interval is wider than {2 * figure.margin:g}"
    reached = figure.better * (found.mean - figure.value) >= -figure.margin
    if shorter and (figure.learned or not reached):
        return "inconclusive: fewer updates than the recipe's"
    return "reproduced" if reached else "not reproduced"


def read_outcome(
    variant: str, metric: str, recipe: Any, programs: Sequence[Program], root: Path
) -> Outcome:
    """The outcome of a variant, trained by `recipe`, from the folders of the programs."""
    scores, rows, seeds, updates, validation, seconds = [], [], [], [], [], []
    for program in programs:
        folder = Workdir(str(root / program.name))
        found = read_json(folder.path / "eval_test.json")
        results, metrics = read_json(folder.results), [*read_metrics(folder.metrics)]
        for replica, (name, seed) in enumerate(program.members):
            if name != variant:
                continue
            text = nan_for_null(found["replicas"][replica])["text"]
            check_choice(text, metric, "metric")
            scores.append(nan_for_null(text[metric]))
            final = nan_for_null(results["replicas"][replica])
            validation.append(100 * final["validation/sequence_accuracy"])
            seeds.append(seed)
            updates.append(found["step"])
            own = [row for row in metrics if row.get("replica", 0) == replica]
            rates = [row[rate] for row in own if (rate := "train/steps_per_second") in row]
            seconds += [1 / rate / len(program.members) for rate in rates]
            rows += own
    low, high = (float(np.mean([score[end] for score in scores])) for end in ("low", "high"))
    losses: dict[int, list[float]] = {}
    for row in rows:
        if "validation/loss" in row:
            losses.setdefault(row["step"], []).append(row["validation/loss"])
    kept = {step: each for step, each in sorted(losses.items()) if len(each) == len(scores)}
    curve = {"step": list(kept)}
    curve |= {f.__name__: [float(f(x)) for x in kept.values()] for f in (np.mean, min, max)}
    values = [score["value"] for score in scores]
    signature, median, config = scores[0]["signature"], float(np.median(seconds)), recipe.to_dict()
    return Outcome(seeds, values, low, high, signature, validation, updates, median, curve, config)


def write_record(
    published: Published,
    recipes: Mapping[str, Any],
    programs: Sequence[Program],
    root: Path,
    command: str,
) -> dict[str, Any]:
    """Writes `published.json`, from which the page is made, into the folder of the runs."""
    outcomes = {
        variant: read_outcome(variant, published.metric, recipe, programs, root)
        for variant, recipe in recipes.items()
    }
    folders = [Workdir(str(root / each.name)) for each in programs]
    runs = [read_json(folder.config) for folder in folders]
    versions: dict[str, set[str]] = {}
    for library, number in (pair for run in runs for pair in run["versions"].items()):
        versions.setdefault(library, set()).add(number)
    record = {
        "command": command,
        "commits": sorted({run["commit"] or "unknown" for run in runs}),
        "versions": {library: ", ".join(sorted(each)) for library, each in versions.items()},
        "devices": "; ".join(sorted({read_json(folder.results)["devices"] for folder in folders})),
        "outcomes": {variant: asdict(each) for variant, each in outcomes.items()},
    }
    write_json(root / "published.json", record)
    return read_record(root / "published.json")


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, with an `Outcome` for each variant."""
    record = read_json(path)
    message = f"{path} is damaged, or of another version ({{kind}}: {{reason}}); delete it"
    with explained(message, KeyError, TypeError, ValueError, AttributeError):
        if not record["outcomes"]:
            raise ValueError("no outcomes")
        outcomes = {variant: _outcome(each) for variant, each in record["outcomes"].items()}
        return {name: record[name] for name in RECORD} | {"outcomes": outcomes}


def _outcome(saved: Mapping[str, Any]) -> Outcome:
    def numbers(values: Sequence[Any]) -> list[float]:
        return [math.nan if x is None else x for x in values]

    lists: dict[str, Any] = {name: numbers(saved[name]) for name in ("values", "validation")}
    lists["curve"] = {name: numbers(each) for name, each in saved["curve"].items()}
    saved_config(saved["config"])
    return Outcome(**nan_for_null(saved) | lists)


def summary(
    name: str, published: Published, config: str, record: Mapping[str, Any] | None
) -> list[list[str]]:
    """Rows of the table: variant, published, here, updates, verdict."""
    rows = []
    for variant, recipe in published.recipes(config, {}).items():
        label = name if len(published.figures) == 1 else f"{name}, {variant}"
        figure = published.figures[variant]
        outcome = (record or {"outcomes": {}})["outcomes"].get(variant)
        if outcome is None:
            rows.append([label, published.metric, figure.text(), "not run", "", "not run"])
            continue
        found, ends = outcome.interval(), sorted({min(outcome.updates), max(outcome.updates)})
        seeds = f"{found.text()} over {found.n} seed{'s' * (found.n > 1)}"
        updates = f"{' to '.join(f'{end:,}' for end in ends)} of {recipe.steps:,}"
        answer = verdict(figure, outcome, recipe)
        rows.append([label, published.metric, figure.text(), seeds, updates, answer])
    return rows


COLUMNS = ("name", "metric", "published (bound)", "here", "updates", "verdict")


def saved(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of the last result in a folder of results, if there is one."""
    path = folder / f"{name}.json"
    return read_record(path) if path.exists() else None


def write_page(folder: Path) -> Path:
    """Writes the page of the results whose records are in `folder`, and draws their curves."""
    rows, sections = [], []
    for name in names():
        published, config = load(name)
        record = saved(folder, name)
        rows += summary(name, published, config, record)
        steps = load_config(config).steps
        sections.append(section(name, published, steps, record, folder))
    path = folder.parent / f"{folder.name}.md"
    table = markdown(COLUMNS, rows, "llllll")
    path.write_text("\n".join((HEAD, table, *sections)), encoding="utf-8")
    return path


def section(
    name: str, published: Published, steps: int, record: Mapping[str, Any] | None, folder: Path
) -> str:
    """The part of the page on one result."""
    config = f"../../configs/published/{name}.py"
    text = f"## {name}\n\n{published.task}. {published.source}.\n"
    text += f"Data: {published.data}. Recipe: [`configs/published/{name}.py`]({config}).\n"
    text += f"Hours of a seed, estimated: {published.hours(steps, record)}.\n"
    text += f"\n{published.note.strip()}\n" * bool(published.note)
    if record is None:
        return f"{text}\nNot run here.\n"
    outcomes = record["outcomes"]
    write, rows, series = "{:.2f}".format, [], {}
    for variant, each in outcomes.items():
        values, accuracies = (", ".join(map(write, x)) for x in (each.values, each.validation))
        bounds, seconds = f"{each.low:.2f} to {each.high:.2f}", write(each.seconds_per_update)
        rows.append((variant, values, bounds, accuracies, seconds))
        series[variant] = [each.curve[key] for key in ("step", "mean", "min", "max")]
    seeds, signature = (one := next(iter(outcomes.values()))).seeds, one.signature
    columns = ("variant", f"seeds {', '.join(map(str, seeds))}", "over test items")
    columns += ("validation sequence accuracy", "seconds per update")
    plots.lines([plots.Panel("", "update", "validation loss", series)], folder / f"{name}.png")
    versions = ", ".join(f"{library} {number}" for library, number in record["versions"].items())
    return f"""{text}
    {record["command"]}

{markdown(columns, rows, "lrrrr")}
![Validation loss of {name}: mean over the seeds, and range]({folder.name}/{name}.png)

{f"Signature: `{signature}`. " * bool(signature)}On {record["devices"]}; {versions}; \
commit {", ".join(record["commits"])}.
"""
