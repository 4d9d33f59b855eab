"""Tables of the benchmark, and the page and the chart made of them."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lab.benchmark.contender import CONTENDERS, OURS
from lab.tables import markdown, ratios, spread
from transformer.inference.plots import GRID, INK
from transformer.workdir import write_json

PEER = "#9aa5b1"
OURS_TITLE = CONTENDERS[OURS].title
HEAD = """# Benchmark

    python scripts/benchmark.py

This library beside its peers: the same strings to reverse, sizes, precision and threads. Each
contender has a process of its own; the processes take turns in random order, one at a time. Values
are medians over the rounds with the lowest and the highest; "this library / it" is the ratio of
each round, in **bold** beside the fastest peer. Compare only within a table, which is of one run.

![Medians, and lines from the lowest to the highest round]({chart})
"""
NOTES = {
    "training": "Useful tokens are those of the targets, EOS included, without padding. *Padded* "
    "batches are in random order, *bucketed* ones hold strings of similar length, *packed* rows "
    "several strings; a step trains on as many strings in each case.",
    "time_to_accuracy": "Seconds of training until greedy decoding reaches the target exact "
    "match on 1,000 held-out strings; neither compilation nor evaluation counts.",
    "decoding": "Held-out strings per second with trained parameters, sorted by length. Speeds are "
    "comparable where exact match and tokens per output are similar.",
}


def comparison(
    title: str,
    values: Mapping[str, Sequence[float]],
    extra: Mapping[str, Mapping[str, str]],
    *,
    lower: bool = False,
    write: Callable[[float], str] = "{:,.0f}".format,
) -> dict[str, Any]:
    """A table (title, columns, rows; values for the chart) with a row per contender.

    After the extra columns come the value, and the ratio of this library's value to it.

    Args:
      title: the quantity.
      values: contender → a value per round; [] if there is none.
      extra: column → contender → cell.
      lower: whether lower is better.
      write: formats a value.
    """
    measured = {name: each for name, each in values.items() if each}
    ours = next((each for name, each in measured.items() if name.startswith(OURS_TITLE)), [])
    medians = {name: statistics.median(each) for name, each in measured.items() if each is not ours}
    fastest = (min if lower else max)(medians, key=lambda name: medians[name], default="")
    rows = []
    for name, each in values.items():
        ratio = ""
        if ours and name in medians:
            ratio = spread(ratios(ours, each), "{:.2f}".format)
            ratio = f"**{ratio}**" if name == fastest else ratio
        others = [column[name] for column in extra.values()]
        rows.append([name, *others, spread(each, write) if each else "", ratio])
    columns = ["", *extra, title, "this library / it"]
    return {"title": title, "columns": columns, "rows": rows, "values": values}


def store(path: Path, size: str, part: str, own: Mapping[str, Any]) -> None:
    """Adds a part (tables, about, rounds) to the record beside the page."""
    file = path.with_suffix(".json")
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    record.setdefault(size, {})[part] = own
    write_json(file, record)


def write(path: Path) -> None:
    """Writes the page and its chart from the record."""
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    chart, text = path.with_suffix(".png"), ""
    panels = {}
    for size, parts in record.items():
        text += f"\n## {size}\n"
        for part, own in parts.items():
            text += f"\n### {part.replace('_', ' ').capitalize()}, {size}\n\n"
            text += own.get("note") or NOTES[part]
            for table in own["tables"]:
                text += "\n\n" + markdown(table["columns"], table["rows"]).rstrip()
                panels[f"{size}: {table['title']}"] = table["values"]
            text += "\n\n" + own["about"] + "\n"
    draw(panels, chart)
    path.write_text(HEAD.format(chart=chart.name) + text, encoding="utf-8")


def draw(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel of bars per quantity: medians, with a line from the lowest to the highest round."""
    panels = {title: values for title, values in panels.items() if any(values.values())}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(5.2 * columns, rows * (1.0 + 0.28 * most)), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, values) in zip(places, panels.items(), strict=False):
        values = {name: each for name, each in values.items() if each}
        for row, (name, each) in enumerate(values.items()):
            color = INK if name.startswith(OURS_TITLE) else PEER
            axes.barh(row, statistics.median(each), height=0.7, color=color)
            axes.plot([min(each), max(each)], [row, row], color="black", linewidth=1.2)
        axes.set_yticks(range(len(values)), list(values), fontsize=8)
        axes.set(xlim=(0, None), ylim=(len(values) - 0.4, -0.6))
        axes.set_title(title, fontsize=9)
        axes.grid(color=GRID, linewidth=0.6, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=150)
