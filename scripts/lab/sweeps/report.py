"""The report of a sweep: tables with intervals and verdicts, figures, and their data as JSON.

Seeds are the source of chance. Every variant is trained with the same seeds, so differences from
the baseline are paired by seed, which removes what a seed does to all variants alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lab import plots
from lab.statistics import (
    ALPHA,
    Difference,
    Interval,
    holm,
    mean_interval,
    p_text,
    paired,
    verdict,
)
from lab.sweeps.records import Record, curve, read_all, read_json
from lab.sweeps.sweep import PaperRow, Program, Sweep, parameters
from lab.tables import markdown
from transformer.metrics import METRICS, percent
from transformer.workdir import Workdir, write_json

CROWDED = 8  # most variants whose learning curves are told apart in one pair of axes
PAPER_VOCABULARY = 37_000  # shared pieces, by the paper's text; Table 3 does not state it
PAPER_CONFIG = str(Path(__file__).parents[3] / "configs" / "vaswani_base.py")


class Outcome(NamedTuple):
    """A quantity that variants are compared in.

    write: formats a value.
    unit: formats the magnitude of a difference.
    factor: from a value to the figure's axis.
    """

    title: str
    write: Callable[[float], str]
    unit: Callable[[float], str]
    higher_is_better: bool
    axis: str
    factor: float = 1.0


def outcomes_of(sweep: Sweep) -> dict[str, Outcome]:
    """The metrics that the sweep compares, by their declarations, and the steps to the target."""
    found = {}
    for name in sweep.metrics:
        metric, title = METRICS[name], name.replace("_", " ").capitalize()
        share = metric.format is percent
        axis = (f"{title.lower()}, points", 100.0) if share else (title.lower(), 1.0)
        unit = points if share else metric.format
        found[name] = Outcome(title, metric.format, unit, metric.better > 0, *axis)
    whole = "{:,.0f}".format
    steps = Outcome("Steps to the target", whole, "{:,.0f} steps".format, False, "steps to target")
    return found | {"steps": steps}


def points(difference: float) -> str:
    """The magnitude of a difference of shares, in percentage points."""
    return (
        f"{100 * difference:.2g} points" if difference < 0.1 else f"{100 * difference:.0f} points"
    )


@dataclass(frozen=True)
class Comparison:
    """A variant in one outcome, and its difference from the baseline.

    values: of the seeds in order; None where the target was not reached.
    interval: of the mean over the seeds that have a value.
    difference, p: None where there is no comparison; p is corrected by Holm.
    """

    values: list[float | None]
    interval: Interval | None
    difference: Difference | None
    p: float | None
    verdict: str


def compare(
    records: Mapping[str, Sequence[Record]], baseline: str, name: str, outcome: Outcome
) -> dict[str, Comparison]:
    """Each variant against the baseline in one outcome, p-values corrected by Holm for all.

    A variant with a seed that did not reach the target is not compared: to leave that seed out
    would flatter it.
    """
    values: dict[str, list[Any]] = {
        variant: [record.outcomes[name] for record in each] for variant, each in records.items()
    }
    complete = {variant for variant, each in values.items() if None not in each}
    others = [each for each in values if each != baseline and {each, baseline} <= complete]
    # Holm's strictest step, which the smallest of the p-values has to pass.
    strict = 1.0 - ALPHA / max(len(others), 1)
    differences = {
        variant: replace(
            paired(values[variant], values[baseline]),
            detectable=paired(values[variant], values[baseline], strict).detectable,
        )
        for variant in others
    }
    corrected = dict(zip(others, holm([differences[each].p for each in others]), strict=True))
    result = {}
    for variant, each in values.items():
        known = [value for value in each if value is not None]
        difference, p = differences.get(variant), corrected.get(variant)
        if variant == baseline:
            words = "baseline"
        elif difference is None or p is None:
            short, who = (each, "") if None in each else (values[baseline], " of the baseline")
            reached = sum(value is not None for value in short)
            words = f"not compared: {reached} of {len(short)} seeds{who} reach the target"
        else:
            words = verdict(difference, p, outcome.unit, outcome.higher_is_better)
        interval = mean_interval(known) if known else None
        result[variant] = Comparison(each, interval, difference, p, words)
    return result


def write_report(
    sweep: Sweep, programs: Sequence[Program], failures: Mapping[str, str], root: Path, command: str
) -> Path:
    """Writes `report.md`, `report.json` and the figures; returns the path of the first.

    Args:
      sweep: what was compared.
      programs: all of its programs.
      failures: name → reason of those that failed.
      root: the sweep's folder.
      command: the one that produced it.
    """
    path, finished = root / "report.md", [each for each in programs if each.name not in failures]
    records = read_all(sweep, finished, root)
    # Variants that lack a seed cannot be paired.
    lost = [name for name, each in records.items() if len(each) < sweep.seeds]
    records = {name: each for name, each in records.items() if name not in lost}
    if sweep.baseline not in records:
        text = f"# {root.name}\n\nThe baseline, {sweep.baseline}, failed: there is no report.\n"
        path.write_text(text, encoding="utf-8")
        return path
    outcomes = outcomes_of(sweep)
    compared = {
        name: compare(records, sweep.baseline, name, each) for name, each in outcomes.items()
    }
    configs = [read_json(Workdir(str(root / each.name)).config) for each in finished]
    facts = {
        "command": command,
        "commit": ", ".join(sorted({each["commit"] or "unknown" for each in configs})),
        "devices": read_json(Workdir(str(root / finished[0].name)).results)["devices"],
        "config": sweep.config,
        "overrides": dict(sweep.overrides),
        "seeds": sweep.seeds,
        "target": sweep.target,
        "baseline": sweep.baseline,
        "failed": dict(failures),
    }
    variants = {
        name: {
            "overrides": dict(sweep.variants[name]),
            "seeds": [asdict(record) for record in each],
            "outcomes": {outcome: asdict(by[name]) for outcome, by in compared.items()},
        }
        for name, each in records.items()
    }
    write_json(root / "report.json", facts | {"variants": variants})
    figures = draw(sweep, records, compared, root)
    parts = [
        heading(sweep, root, facts),
        *(f"![{title}]({file})\n" for title, file in figures.items()),
        *(outcome_table(outcomes[name], by) for name, by in compared.items()),
        cost_table(records),
        *(length_table(split, records) for split in sweep.splits),
        paper_table(sweep.paper),
        *([f"Failed: {', '.join(lost)}. See `log.txt` in their folders.\n"] if lost else []),
    ]
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def draw(
    sweep: Sweep,
    records: Mapping[str, Sequence[Record]],
    compared: Mapping[str, Mapping[str, Comparison]],
    root: Path,
) -> dict[str, str]:
    """Draws the figures; title → file name. The baseline is in every panel."""
    groups: dict[str, list[str]] = {}
    for name in records:  # where there are many variants, a panel for the first part of each name
        groups.setdefault(name.split(", ")[0] if len(records) > CROWDED else "", []).append(name)
    panels = []
    for title, names in groups.items():
        series = {name: curve(records[name]) for name in dict.fromkeys([sweep.baseline, *names])}
        panels.append(learning_panel(title, "step", series, sweep.target))
    plots.lines(panels, root / "learning_curves.png", columns=3)
    forest: dict[str, dict[str, Interval | None]] = {}
    hollow = set()
    for outcome, by in zip(outcomes_of(sweep).values(), compared.values(), strict=True):
        label, factor = outcome.axis, outcome.factor
        others = {name: each for name, each in by.items() if name != sweep.baseline}
        forest[label] = {name: scaled(each.difference, factor) for name, each in others.items()}
        hollow |= {(label, k) for k, each in others.items() if each.p is None or each.p > ALPHA}
    title = f"difference from {sweep.baseline}, 95% interval; filled: p ≤ {ALPHA} after Holm"
    plots.intervals(forest, root / "forest.png", title=title, hollow=hollow)
    figures = {"Learning curves": "learning_curves.png", "Differences": "forest.png"}
    for split in sweep.splits:
        series = {}
        for name, each in records.items():
            rows = list(zip(*(record.by_length[split] for record in each), strict=True))
            found = [mean_interval([tokens for _, _, tokens in row]) for row in rows]
            bounds = ([getattr(one, k) for one in found] for k in ("mean", "low", "high"))
            series[name] = ([row[0][0] for row in rows], *bounds)
        panel = plots.Panel("", "source length", f"token accuracy, {split}", series, share=True)
        figures[f"Accuracy by source length, {split}"] = file = f"by_length_{split}.png"
        plots.lines([panel], root / file)
    return figures


def learning_panel(
    title: str, x: str, series: Mapping[str, Any], target: float | None = None
) -> plots.Panel:
    """Learning curves in one pair of axes."""
    horizontal = {} if target is None else {"target": target}
    y = "validation sequence accuracy"
    return plots.Panel(title, x, y, series, share=True, horizontal=horizontal)


def scaled(interval: Interval | None, factor: float) -> Interval | None:
    """An interval in another unit."""
    if interval is None:
        return None
    mean, low, high = (factor * each for each in (interval.mean, interval.low, interval.high))
    return Interval(mean, low, high, interval.n)


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
        found, size = each.interval, len(each.values)
        mean = f"not reached (0/{size})" if found is None else interval_text(found, outcome.write)
        mean += f" ({found.n}/{size})" if found is not None and found.n < size else ""
        difference = each.difference and interval_text(each.difference, partial(signed, outcome))
        p = "" if each.p is None else p_text(each.p).removeprefix("p ").removeprefix("= ")
        rows.append((name, mean, difference or "", p, each.verdict))
    columns = ("variant", "mean", "difference", "p", "verdict")
    return f"## {outcome.title}\n\n{markdown(columns, rows, align='lrrrl')}"


def signed(outcome: Outcome, x: float) -> str:
    """A difference with its sign."""
    return f"{'−' if x < 0 else '+'}{outcome.write(abs(x))}"


def interval_text(interval: Interval, write: Callable[[float], str]) -> str:
    """`99.10% [98.52%, 99.68%]`; of a single seed the value alone."""
    mean, low, high = map(write, (interval.mean, interval.low, interval.high))
    return mean if interval.n == 1 else f"{mean} [{low}, {high}]"


def cost_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Parameters, FLOPs and speed of every variant."""
    rows = []
    for name, each in records.items():
        known = [record.seconds for record in each if record.seconds is not None]
        seconds = interval_text(mean_interval(known), "{:.1f}".format) if known else "not reached"
        seconds += f" ({len(known)}/{len(each)})" if 0 < len(known) < len(each) else ""
        speed = sum(record.tokens_per_second for record in each) / len(each)
        counts = f"{each[0].parameters:,}", f"{each[0].flops_per_step:,}"
        rows.append((name, *counts, seconds, f"{speed:,.0f}"))
    columns = ("variant", "parameters", "FLOPs per step", "seconds to the target")
    return f"""## Cost

{markdown((*columns, "target tokens/s"), rows)}
FLOPs are those of the matrix products in a step, from its jaxpr. Seconds are of training alone,
without compilation and evaluation; those of a program are divided by its number of replicas.
Programs may have run side by side, so compare speeds within this table only, and roughly.
"""


def length_table(split: str, records: Mapping[str, Sequence[Record]]) -> str:
    """Mean accuracy over seeds by source length."""
    rows, sizes = [], []
    for name, each in records.items():
        by_length = np.array([record.by_length[split] for record in each])  # [seeds, lengths, 3]
        sizes, *means = by_length.mean(0).T
        cells = [
            f"{sequences:.1%} ({tokens:.1%})" for sequences, tokens in zip(*means, strict=True)
        ]
        rows.append((name, *cells))
    table = markdown(("variant", *(f"{size:.0f}" for size in sizes)), rows)
    return f"## {split}: sequence accuracy (token accuracy) by source length\n\n{table}"


def paper_table(paper: Mapping[str, PaperRow]) -> str:
    """The exact number of parameters at the paper's size, next to the paper's column."""
    if not paper:
        return ""
    rows = []
    for name, row in paper.items():
        count = parameters(PAPER_CONFIG, row.overrides, PAPER_VOCABULARY)
        printed = "" if row.millions is None else f"{row.millions}M"
        difference = "" if row.millions is None else f"{count / 1e6 - row.millions:+.1f}M"
        rows.append((name, f"{count:,}", printed, difference))
    table = markdown(("variant", "parameters", "the paper's column", "difference"), rows)
    return f"""## Parameters at the paper's size, {PAPER_VOCABULARY:,} shared pieces

{table}
Exact, by shape evaluation alone. The paper's column (Vaswani et al. 2017, Table 3) is rounded, is
empty where the paper prints nothing, and does not state its vocabulary.
"""
