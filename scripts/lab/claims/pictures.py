"""The pictures of the claims: lines in panels, maps, and points with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.sweeps.pictures import styles
from lab.sweeps.statistics import Interval
from transformer.inference.plots import GRID, INK, SECOND, finish


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes.

    title, x, y: what they are.
    series: name → (x, y), or (x, y, low, high) with a band.
    log: which axes are logarithmic: "", "x", "y" or "xy".
    marks: name → where a vertical line stands.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Any]]
    log: str = "xy"
    marks: Mapping[str, Any] = field(default_factory=dict)


def lines(panels: Sequence[Panel], path: Path, columns: int = 4) -> None:
    """The panels in rows; a name has the same colour in all of them."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    style = styles(list(dict.fromkeys(name for panel in panels for name in panel.series)))
    for axes, panel in zip(all_axes, panels, strict=True):
        for name, (x, y, *band) in panel.series.items():
            axes.plot(x, y, label=name, marker=".", **style[name])
            if band:
                axes.fill_between(x, *band, color=style[name]["color"], alpha=0.15, linewidth=0)
        for name, where in panel.marks.items():
            axes.axvline(where, color="gray", linestyle=":", linewidth=1.0)
            axes.annotate(
                name, (where, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color="gray"
            )
        if "x" in panel.log:
            axes.set_xscale("log", base=2)
        if "y" in panel.log:
            axes.set_yscale("log")
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    finish(figure, all_axes, path)


def maps(panels: Mapping[str, np.ndarray], x: str, y: str, path: Path) -> None:
    """Matrices on a logarithmic scale; what is exactly zero is left white."""
    figure = Figure(figsize=(4.4 * len(panels), 3.9), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        shown = np.ma.masked_equal(values, 0.0)
        image = axes.imshow(shown, norm=LogNorm(), cmap="viridis")
        axes.set(title=title, xlabel=x, ylabel=y)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, shrink=0.85)
    figure.suptitle("white: exactly zero", fontsize=9)
    figure.savefig(path, dpi=150)


def points(panels: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """Means with their intervals, a panel for each unit, a row for each name."""
    rows = max(len(each) for each in panels.values())
    figure = Figure(figsize=(5.4 * len(panels), 1.3 + 0.3 * rows), layout="constrained")
    for axes, (unit, each) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for row, interval in enumerate(each.values()):
            axes.plot([interval.low, interval.high], [row, row], color=INK, linewidth=1.5)
            axes.plot([interval.mean], [row], "o", color=INK)
        axes.axvline(0.0, color=SECOND, linewidth=1.0, linestyle="--", zorder=0)
        axes.set(xlabel=unit)
        axes.set_yticks(range(len(each)), list(each), fontsize=8)
        axes.set_ylim(len(each) - 0.5, -0.5)
        axes.grid(color=GRID, linewidth=0.6, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
