"""Draws the curves of several runs in one picture, and prints their final and best metrics.

    python scripts/plot_runs.py runs/a runs/b [--out=runs.png]
    python scripts/plot_runs.py runs/norms

Each folder is a run, finished or not, or contains runs, like the folder of a sweep. A run is named
by the knobs that differ between the runs, or by its folder if they are none or many.

Replicas of a population that differ in their seed alone are one curve: their mean, in a band from
the lowest to the highest; the tables have mean (lowest–highest). Others are curves of their own.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from lab import plots
from ml_collections import ConfigDict

from transformer import cli
from transformer.config import EVALUATION_KNOBS, FREE_KNOBS, RunConfig, flat_knobs
from transformer.console import facts, table
from transformer.errors import UserError, explained
from transformer.inference.plots import by_replica, curve
from transformer.inference.text_metrics import TEXT_METRICS
from transformer.metrics import PRINTED, percent
from transformer.parallel.replicas import format_replicas
from transformer.training.metrics import read_metrics
from transformer.workdir import Workdir

OUT = flags.DEFINE_string("out", "runs.png", "The picture to write.")
cli.define_plugins_flag()

LONGEST = 48  # characters of a name that consists of knobs
WATCHED = FREE_KNOBS + EVALUATION_KNOBS  # knobs that name no run


@dataclass(frozen=True)
class Member:
    """A run, or the replicas of a population that differ in their seed alone."""

    folder: Path
    replicas: Sequence[int]
    knobs: Mapping[str, Any]  # those that change a result; `seed` has that of each replica
    steps: int  # that the run is to take
    rows: Sequence[Mapping[str, Any]]  # of `metrics.jsonl`


class Shown(NamedTuple):
    """How a metric is shown."""

    words: str
    format: Callable[[float], str]
    better: int  # 1 if more is better, -1 if less is
    unit: str


def main(*folders: str) -> None:
    """Finds the runs, prints the tables and draws the picture."""
    if not folders:
        raise UserError("no folder is named: python scripts/plot_runs.py runs/a runs/b")
    if Path(OUT.value).is_dir():
        raise UserError(f"--out={OUT.value} is a folder; name a file, such as {OUT.default}")
    runs = {run.resolve(): run for folder in folders for run in find_runs(Path(folder))}
    every = [member for run in runs.values() for member in read_run(run)]
    if empty := dict.fromkeys(str(each.folder) for each in every if not each.rows):
        facts({"left out": f"{', '.join(empty)}: no metrics yet"})
    every = [each for each in every if each.rows]
    if not every:
        raise UserError(f"{', '.join(folders)}: no metrics yet; wait for the first log_every steps")
    named, metrics = dict(zip(names(every), every, strict=True)), metrics_of(every)
    columns = ("run", "step", *(metric.words for metric in metrics.values()))
    for title, best in (("final metrics", False), ("best metrics, each by itself", True)):
        table(title, columns, [(name, *cells(each, metrics, best)) for name, each in named.items()])
    path, drawn = Path(OUT.value), panels(named, metrics)
    path = path if path.suffix else path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(f"--out={path}: {{reason}}", ValueError):  # the suffix is not of a format
        plots.lines(drawn, path, columns=2 if len(drawn) < 5 else 3)
    facts({"picture": str(path)})


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, or the runs below it; a UserError if there are none."""

    def search(path: Path) -> list[Path]:
        if Workdir(str(path)).config.exists():
            return [path]
        return [run for each in sorted(path.iterdir()) if each.is_dir() for run in search(each)]

    if not folder.is_dir() or not (runs := search(folder)):
        raise UserError(f"{folder} holds no run; name a run's folder, or one that contains runs")
    return runs


def read_run(folder: Path) -> list[Member]:
    """The run of a folder; several members if its replicas differ in more than their seed."""
    workdir = Workdir(str(folder))
    config, rows = RunConfig.from_config_dict(workdir.read_config()), read_metrics(workdir.metrics)
    groups: dict[tuple[tuple[str, Any], ...], dict[int, int]] = {}  # knobs → replica → seed
    for k, single in enumerate(config.single_runs()):
        knobs = flat_knobs(ConfigDict(asdict(single)))
        seed = knobs.pop("seed")
        own = tuple((x, value) for x, value in knobs.items() if not x.startswith(WATCHED))
        groups.setdefault(own, {})[k] = seed
    members = []
    for knobs, seeds in groups.items():
        own = [row for row in rows if row.get("replica", 0) in seeds]
        values = {**dict(knobs), "seed": (*seeds.values(),)}
        members.append(Member(folder, [*seeds], values, config.steps, own))
    return members


def names(every: Sequence[Member]) -> list[str]:
    """A name for each: the knobs in which they differ, or the folder where that is not unique."""
    labels, found = knobs_that_differ(every), []
    places = Counter(folder.name for folder in {each.folder for each in every})
    for label, each in zip(labels, every, strict=True):
        if max(map(len, labels)) > LONGEST or not label or labels.count(label) > 1:
            label = each.folder.name if places[each.folder.name] == 1 else str(each.folder)
            siblings = [other for other in every if other.folder == each.folder]
            if len(siblings) > 1:  # replicas that differ
                label += f", {knobs_that_differ(siblings)[siblings.index(each)]}"
        found.append(label)
    return found


def knobs_that_differ(every: Sequence[Member]) -> list[str]:
    """The values of each in the knobs in which some differ, such as `norm=rms, seed=0–2`."""
    knobs = every[0].knobs
    differing = [knob for knob in knobs if len({each.knobs[knob] for each in every}) > 1]
    last = {knob: knob.rpartition(".")[2] for knob in differing}
    short = {k: name if [*last.values()].count(name) == 1 else k for k, name in last.items()}
    return [
        ", ".join(f"{name}={written(each.knobs[knob])}" for knob, name in short.items())
        for each in every
    ]


def written(value: Any) -> str:
    """The value of a knob as text; of consecutive seeds the first and the last."""
    if not isinstance(value, tuple):
        return "none" if value in ("", None) else str(value)
    if len(value) > 1 and value == (*range(value[0], value[0] + len(value)),):
        return f"{value[0]}–{value[-1]}"
    return " ".join(map(str, value)) or "none"


def metrics_of(every: Sequence[Member]) -> dict[str, Shown]:
    """The metrics that are printed and that a run has; those without `train` of validation."""
    shown = {}
    for name, metric in {**PRINTED, **TEXT_METRICS}.items():
        unit = "percent" if name in TEXT_METRICS else "nats per token" if name == "loss" else ""
        shown[name] = Shown(name.replace("_", " "), metric.format, metric.better, unit)
    known = {"train/loss": shown["loss"]._replace(words="train loss")}
    known |= {f"validation/{name}": each for name, each in shown.items()}
    logged = {name for each in every for row in each.rows for name in row}
    return {name: each for name, each in known.items() if name in logged}


def cells(member: Member, metrics: Mapping[str, Shown], best: bool) -> list[str]:
    """A row of a table: the step reached, and the last or the best value of each metric."""
    last = max(row["step"] for row in member.rows)
    found = [f"{last:,}" + f" of {member.steps:,}" * (last < member.steps)]
    for name, metric in metrics.items():
        values = []
        for points in by_replica(member.rows, name):
            *_, value = points.values()
            known = [x for x in points.values() if not np.isnan(x)] if best else []
            values.append(max(known, key=lambda x: metric.better * x, default=value))
        found.append(format_replicas(values, metric.format) if values else "–")
    return found


def panels(named: Mapping[str, Member], metrics: Mapping[str, Shown]) -> list[plots.Panel]:
    """A panel for each metric but perplexity, exp of the loss, with the runs that have it."""
    found = []
    for name, metric in metrics.items():
        if name.endswith("perplexity"):
            continue
        points = {who: by_replica(each.rows, name) for who, each in named.items()}
        series = {who: curve(replicas) for who, replicas in points.items() if replicas}
        share = metric.format is percent
        log = "" if share or metric.unit == "percent" else "y"
        title = name.replace("/", " ").replace("_", " ")
        found.append(plots.Panel(title, "step", metric.unit, series, log=log, share=share))
    return found


if __name__ == "__main__":
    cli.run(main, positional=True)
