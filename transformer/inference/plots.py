"""Pictures of a run. Matplotlib is imported by those who call, not with the package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

INK, SECOND, GRID = "#1f4e79", "#c8553d", "#d9d9d9"
PANELS = 8  # layers, and heads, of a picture of attention at most
PIXELS = 16e6  # of such a picture at most


def learning_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and accuracies over steps, from the rows of `metrics.jsonl`."""

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(*series("train/loss"), color=INK, label="train")
    loss.plot(*series("validation/loss"), color=SECOND, marker="o", label="validation")
    loss.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    accuracy.plot(*series("train/accuracy"), color=INK, label="train, tokens")
    accuracy.plot(
        *series("validation/token_accuracy"), color=SECOND, marker="o", label="validation, tokens"
    )
    accuracy.plot(
        *series("validation/sequence_accuracy"),
        color=SECOND,
        marker="o",
        linestyle="--",
        label="validation, whole sequences",
    )
    accuracy.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    finish(figure, (loss, accuracy), path)


def accuracy_by_length(
    lengths: Sequence[float], tokens: Sequence[float], sequences: Sequence[float], path: Path
) -> None:
    """Token and sequence accuracy for each source length."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, tokens, color=INK, marker="o", label="tokens")
    axes.plot(lengths, sequences, color=SECOND, marker="o", linestyle="--", label="whole sequences")
    axes.set(xlabel="source length", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(figure, (axes,), path, legend="lower left")


def finish(figure: Figure, axes: Sequence, path: Path, legend: str = "best") -> None:
    """Grid, legend, no box; then the file. `beside`: one legend, to the right of the axes."""
    for each in axes:
        each.grid(color=GRID, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        if legend != "beside":
            each.legend(frameon=False, loc=legend, fontsize=8)
    if legend == "beside":
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def attention(
    maps: Sequence[np.ndarray],
    queries: Sequence[str],
    keys: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """One panel for each layer (down) and head (across), of the first `PANELS` of each.

    Args:
      maps: the weights [N, T, S] of each layer, with room for padding.
      queries: a label for each query that is to be shown.
      keys: a label for each key.
      title: above the panels.
      path: the PNG to write.
    """
    title = shortened(title, 100)
    layers, heads = min(len(maps), PANELS), min(maps[0].shape[0], PANELS)
    if (layers, heads) != (len(maps), maps[0].shape[0]):
        title += f", {layers} of {len(maps)} layers, {heads} of {maps[0].shape[0]} heads"
    queries, keys = ([shortened(label, 20) for label in labels] for labels in (queries, keys))
    side = 0.7 + 0.19 * max(len(queries), len(keys))
    letters = max(map(len, (*queries, *keys)))  # of the longest label
    edge = 0.5 + 0.08 * letters  # inches to the left of the panels and below them
    wide, high = edge + side * heads + 1.2, edge + side * layers + 0.6
    figure = Figure(figsize=(wide, high))
    # Not laid out by Matplotlib, which measures every label several times.
    room = {"left": edge / wide, "right": 1 - 1.2 / wide}
    room |= {"bottom": edge / high, "top": 1 - 0.6 / high, "wspace": 0.1, "hspace": 0.1}
    panels = figure.subplots(layers, heads, squeeze=False, gridspec_kw=room)
    literal = {"fontsize": 8, "parse_math": False}  # a dollar sign in a text begins no formula
    for (layer, head), panel in np.ndenumerate(panels):
        weights = maps[layer][head, : len(queries), : len(keys)]
        panel.imshow(weights, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xticks(range(len(keys)), keys, rotation=90 * (letters > 2), **literal)
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(queries)), queries, **literal)
    for panel in panels.flat:
        panel.tick_params(length=0)
    panels[-1, 0].set(xlabel="key (⊣ end)", ylabel="query (⊢ begin)")
    bar = figure.add_axes((1 - 0.9 / wide, 0.15, 0.2 / wide, 0.7))
    figure.colorbar(panels[0, 0].images[0], cax=bar, label="attention weight")
    figure.suptitle(title, y=1 - 0.15 / high, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=min(150, (PIXELS / (wide * high)) ** 0.5))


def shortened(text: str, most: int) -> str:
    """`text`, or its beginning and … in the place of what is too long."""
    return text if len(text) <= most else text[: most - 1] + "…"


def without_glyph(text: str) -> str:
    """The characters of `text` that the font of the pictures cannot draw."""
    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(character for character in dict.fromkeys(text) if ord(character) not in known)
