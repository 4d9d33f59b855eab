"""Pictures of a run. Matplotlib is imported by those who call, not with the package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, SECOND, GRID = "#1f4e79", "#c8553d", "#d9d9d9"


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
    lengths: Sequence[int], tokens: Sequence[float], sequences: Sequence[float], path: Path
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
    """One panel for each layer (down) and head (across).

    Args:
      maps: the weights [N, T, S] of each layer, with room for padding.
      queries: a label for each query that is to be shown.
      keys: a label for each key.
      title: above the panels.
      path: the PNG to write.
    """
    layers, heads = len(maps), maps[0].shape[0]
    side = 0.7 + 0.19 * max(len(queries), len(keys))
    figure = Figure(figsize=(max(side * heads, 4), side * layers + 0.5), layout="constrained")
    panels = figure.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            panel = panels[layer, head]
            weights = maps[layer][head, : len(queries), : len(keys)]
            panel.imshow(weights, vmin=0, vmax=1, cmap="Blues")
            panel.set_xticks(range(len(keys)), keys, fontsize=8)
            panel.set_yticks(range(len(queries)), queries, fontsize=8)
            panel.tick_params(length=0)
            panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
    panels[-1, 0].set(xlabel="key (⊣ end)", ylabel="query (⊢ begin)")
    figure.colorbar(ScalarMappable(cmap="Blues"), ax=panels, shrink=0.8, label="attention weight")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
