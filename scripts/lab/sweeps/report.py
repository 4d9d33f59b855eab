"""The report of a sweep: tables with intervals and verdicts, figures, and their data as JSON.

Differences from the baseline are paired by seed, which removes what a seed does to all variants.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lab import plots, statistics
from lab.statistics import ALPHA, Difference, Interval, corrected, mean_interval, paired
from lab.sweeps.sweep import PaperRow, Program, Sweep, parameters
from lab.tables import markdown
from transformer.errors import explained
from transformer.files import nan_for_null
from transformer.metrics import METRICS, percent
from transformer.training.metrics import read_metrics
from transformer.workdir import Workdir, write_json

TARGET_METRIC = "validation/sequence_accuracy"
CURVE: Any = {"y": "validation sequence accuracy", "share": True}  # of a panel
CROWDED = 8  # most variants whose learning curves are told apart in one pair of axes
PAPER_VOCABULARY = 37_000  # shared pieces, by the paper's text; Table 3 does not state it
PAPER_CONFIG = str(Path(__file__).parents[3] / "configs" / "vaswani_base.py")


@dataclass(frozen=True)
class Record:
    """The results of one seed of one variant."""

    seed: int
    outcomes: dict[str, Any]  # test metrics, and the steps to the target; None: not reached
    seconds: float | None  # of training to the target: the program's divided by its replicas
    tokens_per_second: float  # useful target tokens of this replica, times the replicas
    parameters: int
    flops_per_step: int
    curve: list[tuple[int, float]]  # step, validation sequence accuracy
    by_length: dict[str, list[tuple[int, float, float]]]  # length, sequence and token accuracy


Records = Mapping[str, Sequence[Record]]  # variant → seeds


def read_all(sweep: Sweep, programs: Iterable[Program], root: Path) -> dict[str, list[Record]]:
    """Variant → the records of its seeds in order, of finished programs."""
    found: dict[str, list[Record]] = {variant: [] for variant in sweep.variants}
    for program in programs:
        for k, (variant, seed) in enumerate(program.members):
            found[variant].append(_read(sweep, program, k, seed, root / program.name))
    return {name: sorted(each, key=lambda one: one.seed) for name, each in found.items()}


def _read(sweep: Sweep, program: Program, replica: int, seed: int, folder: Path) -> Record:
    workdir, size = Workdir(str(folder)), len(program.members)
    results = read_json(workdir.results)
    final = nan_for_null(results["replicas"][replica])
    rows = [row for row in read_metrics(workdir.metrics) if row.get("replica", 0) == replica]
    trained = [row for row in rows if "train/steps_per_second" in row]
    curve = [(row["step"], row[TARGET_METRIC]) for row in rows if TARGET_METRIC in row]
    reached = next((step for step, accuracy in curve if accuracy >= sweep.target), None)
    seconds, before = 0.0, 0
    for row in trained:
        if reached is not None and row["step"] <= reached:
            seconds += (row["step"] - before) / row["train/steps_per_second"]
            before = row["step"]
    tokens = [row["train/target_tokens_per_second"] for row in trained]
    by_length = {}
    for split in program.splits:
        evaluated = read_json(folder / f"eval_{split}.json")["replicas"][replica]
        by_length[split] = [
            (row["length"], row["sequence_accuracy"], row["token_accuracy"])
            for row in map(nan_for_null, evaluated["by_source_length"])
        ]
    return Record(
        seed=seed,
        outcomes={name: final[f"test/{name}"] for name in sweep.metrics} | {"steps": reached},
        seconds=None if reached is None else seconds / size,
        tokens_per_second=size * sum(tokens) / len(tokens),
        parameters=results["parameters"],
        flops_per_step=results["flops_per_step"],
        curve=curve,
        by_length=by_length,
    )


def read_json(path: Path) -> Any:
    """The content of a result file."""
    message = f"{path} cannot be read ({{reason}}); delete the folder and run again"
    with explained(message, OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))


def curve(records: Sequence[Record], seconds_per_step: float = 1.0) -> tuple[Any, ...]:
    """Steps, or seconds, and the mean, lowest and highest validation accuracy of the seeds.

    A run that has stopped early keeps its last accuracy.
    """
    longest = max((record.curve for record in records), key=len)
    curves = [record.curve + record.curve[-1:] * len(longest) for record in records]
    values = np.array([[accuracy for _, accuracy in c[: len(longest)]] for c in curves])
    steps = [step * seconds_per_step for step, _ in longest]
    return steps, values.mean(0), values.min(0), values.max(0)


class Outcome(NamedTuple):
    """A quantity that variants are compared in, and how its values are written."""

    title: str
    write: Callable[[float], str]
    higher_is_better: bool

    def unit(self, difference: float) -> str:
        """The magnitude of a difference; of shares, in percentage points."""
        points = 100 * difference
        if self.write is not percent:
            return self.write(difference)
        return f"{points:.2g} points" if points < 10 else f"{points:.0f} points"

    def signed(self, difference: float) -> str:
        """A difference with its sign."""
        return f"{'−' if difference < 0 else '+'}{self.write(abs(difference))}"


@dataclass(frozen=True)
class Comparison:
    """A variant in one outcome."""

    values: list[float | None]  # of the seeds in order; None: the target was not reached
    interval: Interval | None  # of the mean over the seeds that have a value
    difference: Difference | None  # from the baseline, corrected by Holm; None: not compared
    verdict: str


def compare(records: Records, baseline: str, name: str, outcome: Outcome) -> dict[str, Comparison]:
    """Each variant against the baseline in one outcome."""
    values: dict[str, list[Any]] = {
        variant: [record.outcomes[name] for record in each] for variant, each in records.items()
    }
    # Without a seed that did not reach the target, a variant would be flattered.
    complete = {variant for variant, each in values.items() if None not in each}
    others = [each for each in values if each != baseline and {each, baseline} <= complete]
    tests = [paired(values[variant], values[baseline]) for variant in others]
    differences = dict(zip(others, corrected(tests), strict=True))
    result = {}
    for variant, each in values.items():
        difference = differences.get(variant)
        if variant == baseline:
            words = "baseline"
        elif difference:
            words = statistics.verdict(difference, outcome.unit, outcome.higher_is_better)
        else:
            short, who = (each, "") if None in each else (values[baseline], " of the baseline")
            reached = sum(value is not None for value in short)
            words = f"not compared: {reached} of {len(short)} seeds{who} reach the target"
        known = [value for value in each if value is not None]
        interval = mean_interval(known) if known else None
        result[variant] = Comparison(each, interval, difference, words)
    return result


def write_report(
    sweep: Sweep, programs: Sequence[Program], failures: Mapping[str, str], root: Path, command: str
) -> Path:
    """Writes `report.md`, `report.json` and figures; `failures`: name of a program → reason."""
    path, finished = root / "report.md", [each for each in programs if each.name not in failures]
    records = read_all(sweep, finished, root)
    # Variants that lack a seed cannot be paired.
    lost = [name for name, each in records.items() if len(each) < sweep.seeds]
    records = {name: each for name, each in records.items() if name not in lost}
    if sweep.baseline not in records:
        text = f"# {root.name}\n\nThe baseline, {sweep.baseline}, failed: there is no report.\n"
        path.write_text(text, encoding="utf-8")
        return path
    outcomes = {
        name: Outcome(name.replace("_", " "), METRICS[name].format, METRICS[name].better > 0)
        for name in sweep.metrics
    } | {"steps": Outcome("steps to the target", "{:,.0f}".format, False)}
    compared = {
        name: compare(records, sweep.baseline, name, each) for name, each in outcomes.items()
    }
    configs = [read_json(Workdir(str(root / each.name)).config) for each in finished]
    told = ("config", "overrides", "seeds", "target", "baseline")
    facts = {
        "command": command,
        "commit": ", ".join(sorted({each["commit"] or "unknown" for each in configs})),
        "devices": read_json(Workdir(str(root / finished[0].name)).results)["devices"],
        **{name: getattr(sweep, name) for name in told},
        "failed": dict(failures),
    }
    variants = {
        name.replace("_", " "): {
            "overrides": dict(sweep.variants[name]),
            "seeds": [asdict(record) for record in each],
            "outcomes": {outcome: asdict(by[name]) for outcome, by in compared.items()},
        }
        for name, each in records.items()
    }
    write_json(root / "report.json", facts | {"variants": variants})
    parts = [
        heading(sweep, root, facts),
        *draw(sweep, records, compared, root),
        *(outcome_table(outcomes[name], by) for name, by in compared.items()),
        cost_table(records),
        *(length_table(split, records) for split in sweep.splits),
        *([paper_table(sweep.paper)] if sweep.paper else []),
        *([f"Failed: {', '.join(lost)}. See `log.txt` in their folders.\n"] if lost else []),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def draw(
    sweep: Sweep, records: Records, compared: Mapping[str, Mapping[str, Comparison]], root: Path
) -> list[str]:
    """Draws the figures; their Markdown. The baseline is in every panel."""
    groups: dict[str, list[str]] = {}
    for name in records:  # where there are many variants, a panel for the first part of each name
        groups.setdefault(name.split(", ")[0] if len(records) > CROWDED else "", []).append(name)
    panels = []
    for title, names in groups.items():
        series = {name: curve(records[name]) for name in dict.fromkeys([sweep.baseline, *names])}
        panels.append(plots.Panel(title, "step", **CURVE, series=series, horizontal=sweep.target))
    plots.lines(panels, root / "learning_curves.png", columns=3)
    forest = {
        name.replace("_", " "): {
            variant: each.difference for variant, each in by.items() if variant != sweep.baseline
        }
        for name, by in compared.items()
    }
    title = f"difference from {sweep.baseline}, 95% interval; filled: p ≤ {ALPHA} after Holm"
    plots.intervals(forest, root / "forest.png", title=title)
    figures = {"Learning curves": "learning_curves.png", "Differences": "forest.png"}
    for split in sweep.splits:
        series = {}
        for name, each in records.items():
            sizes, _, tokens = np.array([record.by_length[split] for record in each]).T
            means = [mean_interval(row) for row in tokens]
            bounds = np.array([(each.mean, each.low, each.high) for each in means]).T
            series[name] = (sizes[:, 0], *bounds)
        panel = plots.Panel("", "source length", f"token accuracy, {split}", series, share=True)
        figures[f"Accuracy by source length, {split}"] = file = f"by_length_{split}.png"
        plots.lines([panel], root / file)
    return [f"![{title}]({file})\n" for title, file in figures.items()]


def heading(sweep: Sweep, root: Path, facts: Mapping[str, Any]) -> str:
    """The title, what was run, and how to read the tables."""
    overrides = ", ".join(f"`{name}={value}`" for name, value in sweep.overrides.items())
    return f"""# {root.name.replace("_", " ").capitalize()}

{sweep.note.strip()}

    {facts["command"]}

{sweep.seeds} seeds per variant, from `{sweep.config}`{f" with {overrides}" if overrides else ""}; \
baseline **{sweep.baseline}**; {facts["devices"]} per program; commit {facts["commit"]}.

Brackets are 95% confidence intervals of the mean over seeds (Student's t). Differences from the
baseline are paired by seed; p is that of the paired t-test, corrected by Holm for the comparisons
of its table. "Smallest detectable" is the true difference that would be found with power 0.8 after
that correction, given the observed scatter of the seeds. The target is a validation sequence
accuracy of {sweep.target:.0%}.
"""


def outcome_table(outcome: Outcome, by_variant: Mapping[str, Comparison]) -> str:
    """One outcome of every variant."""
    rows = []
    for name, each in by_variant.items():
        difference, p, smallest = "", "", ""
        if each.difference:
            difference = each.difference.text(outcome.signed)
            if not np.isnan(each.difference.p):  # as that of a single seed is
                p = statistics.p_text(each.difference.p).removeprefix("p ").removeprefix("= ")
                smallest = outcome.unit(each.difference.detectable)
        mean = _mean_text(each.values, outcome.write)
        rows.append((name, mean, difference, p, smallest, each.verdict))
    columns = ("variant", "mean", "difference", "p", "smallest detectable", "verdict")
    return f"## {outcome.title.capitalize()}\n\n{markdown(columns, rows, align='lrrrrl')}"


def _mean_text(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    """The mean of the values that are known, and how many they are if not all."""
    known = [value for value in values if value is not None]
    mean = mean_interval(known).text(write) if known else "not reached"
    return mean if len(known) == len(values) else f"{mean} ({len(known)}/{len(values)})"


def cost_table(records: Records) -> str:
    """Parameters, FLOPs and speed of every variant."""
    rows = []
    for name, each in records.items():
        counts = f"{each[0].parameters:,}", f"{each[0].flops_per_step:,}"
        seconds = _mean_text([record.seconds for record in each], "{:.1f}".format)
        speed = sum(record.tokens_per_second for record in each) / len(each)
        rows.append((name, *counts, seconds, f"{speed:,.0f}"))
    columns = ("variant", "parameters", "FLOPs per step", "seconds to the target")
    return f"""## Cost

{markdown((*columns, "target tokens/s"), rows)}
FLOPs are those of the matrix products in a step, from its jaxpr. Seconds are of training alone,
without compilation and evaluation; those of a program are divided by its number of replicas.
Programs may have run side by side, so compare speeds within this table only, and roughly.
"""


def length_table(split: str, records: Records) -> str:
    """Mean accuracy over seeds by source length."""
    rows, sizes = [], []
    for name, each in records.items():
        by_length = np.array([record.by_length[split] for record in each])  # [seeds, lengths, 3]
        means = by_length.mean(0)
        sizes = [f"{size:.0f}" for size, _, _ in means]
        rows.append((name, *(f"{whole:.1%} ({tokens:.1%})" for _, whole, tokens in means)))
    table = markdown(("variant", *sizes), rows)
    return f"## {split}: sequence accuracy (token accuracy) by source length\n\n{table}"


def paper_table(paper: Mapping[str, PaperRow]) -> str:
    """The exact number of parameters at the paper's size, next to the paper's column."""
    rows = []
    for name, row in paper.items():
        count = parameters(PAPER_CONFIG, row.overrides, PAPER_VOCABULARY)
        printed = row.millions and (f"{row.millions}M", f"{count / 1e6 - row.millions:+.1f}M")
        rows.append((name, f"{count:,}", *(printed or ("", ""))))
    table = markdown(("variant", "parameters", "the paper's column", "difference"), rows)
    return f"""## Parameters at the paper's size, {PAPER_VOCABULARY:,} shared pieces

{table}
Exact, by shape evaluation alone. The paper's column (Vaswani et al. 2017, Table 3) is rounded, is
empty where the paper prints nothing, and does not state its vocabulary.
"""
