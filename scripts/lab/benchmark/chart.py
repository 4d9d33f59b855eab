"""The chart of the benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from transformer.inference.plots import GRID, INK

PEER = "#9aa5b1"


def draw(panels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of medians, with a line from the lowest to the highest round; a panel a quantity.

    Args:
      panels: title → contender → (spread, whether it is this code).
      path: the PNG to write.
    """
    columns = min(3, max(len(panels), 1))
    rows = max(-(-len(panels) // columns), 1)
    most = max((len(each) for each in panels.values()), default=1)
    figure = Figure(figsize=(5.2 * columns, rows * (1.0 + 0.28 * most)), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, each) in zip(places, panels.items(), strict=False):
        for row, (spread, ours) in enumerate(each.values()):
            axes.barh(row, spread.median, height=0.7, color=INK if ours else PEER)
            axes.plot([spread.low, spread.high], [row, row], color="black", linewidth=1.2)
        axes.set_yticks(range(len(each)), list(each), fontsize=8)
        axes.set_ylim(len(each) - 0.4, -0.6)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(left=0)
        axes.grid(color=GRID, linewidth=0.6, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=150)
