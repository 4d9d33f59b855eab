"""The pictures of a sweep's report: learning curves with bands, a forest plot, lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lab.sweeps.statistics import mean_interval
from transformer.inference.plots import GRID, INK, SECOND, finish

CROWD = 8  # variants that can be told apart between one pair of axes


def draw(
    sweep: Any, records: Mapping[str, Sequence[Any]], compared: Mapping[str, Any], root: Path
) -> dict[str, str]:
    """Draws all of them; title → file name."""
    drawn = {
        "Learning curves": "learning_curves.png",
        "Differences from the baseline": "forest.png",
    }
    learning_curves(records, sweep.baseline, sweep.target, root / "learning_curves.png")
    forest(sweep.baseline, compared, root / "forest.png")
    for split in sweep.splits:
        drawn[f"Accuracy by source length, {split}"] = f"by_length_{split}.png"
        by_length(records, split, root / f"by_length_{split}.png")
    return drawn


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour for each name, and another dash where colours come round again."""
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    dashes = ("-", "--", ":", "-.")
    return {
        name: {"color": colours[i % 10], "linestyle": dashes[i // 10 % 4]}
        for i, name in enumerate(names)
    }


def learning_curves(
    records: Mapping[str, Sequence[Any]], baseline: str, target: float, path: Path
) -> None:
    """Validation sequence accuracy over steps: means, and bands from lowest to highest seed.

    More than `CROWD` variants are told apart by panels, one for each first part of their
    names, with the baseline in all of them.
    """
    groups = {"": list(records)}
    if len(records) > CROWD:
        groups = {}
        for name in records:
            groups.setdefault(name.split(", ")[0], []).append(name)
    columns = 2 if len(groups) == 4 else min(len(groups), 3)
    rows = -(-len(groups) // columns)
    size = (8, 4.5) if len(groups) == 1 else (4.4 * columns, 3.2 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, names in zip(panels, groups.values(), strict=False):
        for name, style in styles(names).items():
            band(axes, records[name], name, style)
        if baseline not in names:
            band(axes, records[baseline], f"{baseline} (baseline)", {"color": "gray"})
        axes.axhline(target, color=GRID, linestyle=":", zorder=0)
        axes.set(ylim=(-0.02, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels[len(groups) :]:
        axes.remove()
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("validation sequences right", fontsize=10)
    finish(figure, panels[: len(groups)], path, legend="beside" if len(groups) == 1 else "best")


def band(axes: Any, records: Sequence[Any], name: str, style: Mapping[str, Any]) -> None:
    """One variant's curve."""
    steps = [step for step, _ in records[0].curve]
    values = np.array([[value for _, value in record.curve] for record in records])
    axes.plot(steps, values.mean(0), label=name, **style)
    low, high = values.min(0), values.max(0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def forest(baseline: str, compared: Mapping[str, Any], path: Path) -> None:
    """Each variant's difference from the baseline with its interval, an outcome a panel."""
    panels = {
        "accuracy": ("sequences right", 100.0, "points"),
        "loss": ("loss", 1.0, "nats a token"),
        "steps": ("steps to the target", 1.0, "steps"),
    }
    panels = {
        outcome: panel
        for outcome, panel in panels.items()
        if any(each.difference for each in compared[outcome].values()) or outcome == "accuracy"
    }
    names = [name for name in compared["accuracy"] if name != baseline]
    figure = Figure(
        figsize=(2.0 + 2.8 * len(panels), 1.4 + 0.28 * max(len(names), 2)), layout="constrained"
    )
    for panel, (outcome, (title, scale, unit)) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for row, name in enumerate(names):
            comparison = compared[outcome][name]
            difference = comparison.difference
            if difference is None:
                panel.annotate("not compared", (0, row), color="gray", fontsize=7, va="center")
                continue
            low, mean, high = (
                scale * value for value in (difference.low, difference.mean, difference.high)
            )
            found = comparison.p is not None and comparison.p <= 0.05
            panel.plot([low, high], [row, row], color=INK, linewidth=1.5)
            panel.plot([mean], [row], "o", color=INK, markerfacecolor=INK if found else "white")
        panel.axvline(0.0, color=SECOND, linewidth=1.0, linestyle="--", zorder=0)
        panel.set(xlabel=unit, title=title)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.grid(color=GRID, linewidth=0.6, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_ylim(max(len(names), 1) - 0.5, -0.5)
    figure.suptitle(
        f"difference from {baseline}, 95% interval; filled: p ≤ 0.05 after Holm", fontsize=9
    )
    figure.savefig(path, dpi=150)


def by_length(records: Mapping[str, Sequence[Any]], split: str, path: Path) -> None:
    """Token accuracy for each source length: means with 95% intervals."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, style in styles(list(records)).items():
        rows = [record.by_length[split] for record in records[name]]
        sizes = [length for length, _, _ in rows[0]]
        intervals = [mean_interval([row[i][2] for row in rows]) for i in range(len(sizes))]
        axes.plot(sizes, [each.mean for each in intervals], marker="o", label=name, **style)
        axes.fill_between(
            sizes,
            [each.low for each in intervals],
            [each.high for each in intervals],
            color=style["color"],
            alpha=0.12,
            linewidth=0,
        )
    axes.set(xlabel="source length", ylabel=f"tokens right, {split}", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(figure, (axes,), path, legend="beside")
