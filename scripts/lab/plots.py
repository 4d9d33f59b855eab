"""Figures of the reports: lines in panels, confidence intervals, matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lab.statistics import ALPHA, Difference, Interval
from transformer.inference.plots import GRID, INK, SECOND, finish

INSIDE = 4  # the most names in a panel's own legend; more are listed beside the panels


@dataclass(frozen=True)
class Panel:
    """Lines in one pair of axes."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Any]]  # name → (x, y), or (x, y, low, high) with a band
    log: str = ""  # the logarithmic axes: "", "x", "y" or "xy"
    share: bool = False  # whether y is a share, shown in percent
    horizontal: float | None = None  # dotted line


def lines(panels: Sequence[Panel], path: Path, columns: int = 4) -> None:
    """Draws panels in rows; a name has the same colour and dashes in all of them."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (8.0, 4.5) if len(panels) == 1 else (4.6 * columns, 3.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes_of = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for axes, panel in zip(axes_of, panels, strict=False):
        for name, (x, y, *band) in panel.series.items():
            again, i = divmod(names.index(name), 10)
            dashes = ("-", "--", ":", "-.")[again % 4]
            axes.plot(x, y, label=name, marker=".", color=colours[i], linestyle=dashes)
            if band:
                axes.fill_between(x, *band, color=colours[i], alpha=0.12, linewidth=0)
        if panel.horizontal is not None:
            axes.axhline(panel.horizontal, color="gray", linestyle=":", linewidth=1.0)
        if "x" in panel.log:
            axes.set_xscale("log", base=2)
        if "y" in panel.log:
            axes.set_yscale("log")
        if panel.share:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    for axes in axes_of[len(panels) :]:
        axes.remove()
    beside = max(len(panel.series) for panel in panels) > INSIDE
    finish(figure, axes_of[: len(panels)], path, beside)


def intervals(
    panels: Mapping[str, Mapping[str, Interval | None]], path: Path, title: str = ""
) -> None:
    """Draws means with intervals: a panel per x axis, a row per name; None: not compared."""
    rows = max(2, *(len(each) for each in panels.values()))
    figure = Figure(figsize=(1.5 + 3.6 * len(panels), 1.4 + 0.3 * rows), layout="constrained")
    shared = len({tuple(each) for each in panels.values()}) == 1
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=shared)[0]
    for axes, (label, each) in zip(all_axes, panels.items(), strict=True):
        for row, interval in enumerate(each.values()):
            if interval is None:
                axes.annotate("not compared", (0, row), color="gray", fontsize=7, va="center")
                continue
            axes.plot([interval.low, interval.high], [row, row], color=INK, linewidth=1.5)
            filled = not isinstance(interval, Difference) or interval.p <= ALPHA
            face = INK if filled else "white"
            axes.plot([interval.mean], [row], "o", color=INK, markerfacecolor=face)
        axes.axvline(0.0, color=SECOND, linewidth=1.0, linestyle="--", zorder=0)
        axes.set_xlabel(label, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_yticks(range(len(each)), list(each), fontsize=8)
        axes.set_ylim(max(len(each), 1) - 0.5, -0.5)
        axes.grid(color=GRID, linewidth=0.6, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def maps(matrices: Mapping[str, np.ndarray], x: str, y: str, path: Path) -> None:
    """Draws matrices on a logarithmic scale; zeros are white."""
    figure = Figure(figsize=(4.4 * len(matrices), 3.9), layout="constrained")
    all_axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (title, values) in zip(all_axes, matrices.items(), strict=True):
        image = axes.imshow(np.ma.masked_equal(values, 0.0), norm=LogNorm(), cmap="viridis")
        axes.set(title=title, xlabel=x, ylabel=y)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, shrink=0.85)
    figure.suptitle("white: exactly zero", fontsize=9)
    figure.savefig(path, dpi=150)
