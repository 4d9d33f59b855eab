"""Tables of the benchmark, and the page and the chart made of them."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lab.benchmark.contender import CONTENDERS, OURS
from lab.tables import markdown, spread
from transformer.inference.plots import GRID, INK
from transformer.workdir import write_json

PEER = "#9aa5b1"
OURS_TITLE = CONTENDERS[OURS].title
HEAD = """# Benchmark

    python scripts/benchmark.py

This library beside its peers: the same pairs, sizes, precision and threads; strings to reverse,
or (`text`) random tokens with the vocabulary, frequencies and lengths of Multi30k, with dropout 0.3
on embedded tokens and sublayer outputs and label smoothing 0.1. Each
contender has a process of its own; the processes take turns in random order, one at a time. Values
are medians over the rounds with the lowest and the highest; "this library / it" is the ratio of
each round, in **bold** beside the fastest peer. Compare only within a table, which is of one run.

![Medians, and lines from the lowest to the highest round]({chart})
"""
NOTES = {
    "training": "Useful tokens are those of the targets, EOS included, without padding. *Padded* "
    "batches are in random order, *bucketed* ones hold pairs of similar length (of the longer "
    "side), *packed* rows several pairs; a step trains on as many pairs in each case. CPU time is "
    "that of all threads per useful token, memory the peak of the process. The GFLOP/s are those "
    "of products of square matrices, measured after; their fraction counts for each useful token "
    "the products of this library's step. Marian on 1 thread is not compiled: that was slower.",
    "time_to_accuracy": "Seconds of training until greedy decoding reaches the target exact "
    "match on 1,000 held-out strings; neither compilation nor evaluation counts.",
    "decoding": "Held-out strings per second with trained parameters, sorted by length. Speeds are "
    "comparable where exact match and tokens per output are similar. This library decodes fewer "
    "hypotheses than a batch at once on a CPU, see `rows_at_once`.",
    "imported": "One Marian with random parameters, whose outputs all end at the length limit: in "
    "Hugging Face's `generate`, imported by `scripts/import_weights.py` with the rules of "
    "`generate`, and as a model of this library with its own rules.",
}


def comparison(
    title: str,  # the quantity
    values: Mapping[str, Sequence[float]],  # contender → a value per round; [] if there is none
    extra: Mapping[str, Mapping[str, str]],  # column → contender → cell
    lower: bool = False,  # whether lower is better
    write: Callable[[float], str] = "{:,.0f}".format,
) -> dict[str, Any]:
    """A table (title, columns, rows; values for the chart) with a row per contender."""
    ours = next((each for name, each in values.items() if name.startswith(OURS_TITLE)), [])
    peers = [name for name, each in values.items() if each and each is not ours]
    best = min if lower else max
    fastest = best(peers, key=lambda name: statistics.median(values[name]), default="")
    rows = []
    for name, each in values.items():
        ratio = ""
        if ours and name in peers:  # round by round, so that what slows a whole round cancels
            ratio = spread(np.divide(ours, each).tolist(), "{:.2f}".format)
        ratio = f"**{ratio}**" if ratio and name == fastest else ratio
        others = [column[name] for column in extra.values()]
        rows.append([name, *others, spread(each, write) if each else "", ratio])
    columns = ["", *extra, title, "this library / it"]
    return {"title": title, "columns": columns, "rows": rows, "values": values}


def write(path: Path, size: str, part: str, own: Mapping[str, Any]) -> None:
    """Adds a part (tables, about, rounds) to the record beside the page; writes page and chart."""
    file, chart = path.with_suffix(".json"), path.with_suffix(".png")
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    record.setdefault(size, {})[part] = own
    write_json(file, record)
    text, panels = HEAD.format(chart=chart.name), {}
    for name, parts in record.items():
        text += f"\n## {name}\n"
        for what, measured in parts.items():
            text += f"\n### {what.replace('_', ' ').capitalize()}, {name}\n\n"
            text += measured.get("note") or NOTES[what]
            for table in measured["tables"]:
                text += "\n\n" + markdown(table["columns"], table["rows"]).rstrip()
                panels[f"{name}: {table['title']}"] = table["values"]
            text += "\n\n" + measured["about"] + "\n"
    draw(panels, chart)
    path.write_text(text, encoding="utf-8")


def draw(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel of bars per quantity: medians, with a line from the lowest to the highest round."""
    panels = {title: values for title, values in panels.items() if any(values.values())}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = rows * (1.0 + 0.28 * max(map(len, panels.values())))
    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, values) in zip(places, panels.items(), strict=False):
        values = {name: each for name, each in values.items() if each}
        medians = np.array([statistics.median(each) for each in values.values()])
        low, high = (np.array([end(each) for each in values.values()]) for end in (min, max))
        colors = [INK if name.startswith(OURS_TITLE) else PEER for name in values]
        axes.barh(list(values), medians, 0.7, xerr=[medians - low, high - medians], color=colors)
        axes.set(xlim=(0, None), ylim=(len(values) - 0.4, -0.6), axisbelow=True)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(color=GRID, linewidth=0.6, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=150)
