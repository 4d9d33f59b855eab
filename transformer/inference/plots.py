"""Plots of a run and of an evaluation; this module imports Matplotlib."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from transformer.console import facts
from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import BOS, PAD, Tokenizer
from transformer.errors import reason
from transformer.metrics import METRICS, percent
from transformer.parallel import hosts

INK, SECOND, GRID = "#1f4e79", "#c8553d", "#d9d9d9"
EXAMPLES = 3  # number of examples whose attention is drawn
MAX_TOKENS = 64  # the longest text whose attention is drawn
PANELS = 8  # the maximum number of layers, and of heads, in an attention plot
PIXELS = 16e6  # the maximum number of pixels of an attention plot

Rows = Sequence[Mapping[str, Any]]


def _percentages() -> dict[str, str]:
    """Name → label of the metrics that are percentages."""
    return {k: k.replace("_", " ") for k, metric in METRICS.items() if metric.format is percent}


def _lines(axes: Any, rows: Rows, x: str, labels: Mapping[str, str]) -> None:
    """Draws a line for each name in `labels`, from the rows that have it."""
    for k, (name, label) in enumerate(labels.items()):
        points = [(row[x], row[name]) for row in rows if name in row]
        color, marker = (INK, "") if name.startswith("train/") else (SECOND, "o")
        style = {"color": color, "marker": marker, "linestyle": ("-", "--", ":", "-.")[k % 4]}
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **style)


def learning_curve(rows: Rows, path: Path) -> None:
    """Plots the loss and the percentages over steps, from the rows of `metrics.jsonl`."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _lines(loss, rows, "step", {"train/loss": "train", "validation/loss": "validation"})
    labels = {f"validation/{name}": f"validation, {text}" for name, text in _percentages().items()}
    _lines(accuracy, rows, "step", {"train/accuracy": "train, token accuracy"} | labels)
    loss.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    accuracy.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    finish(figure, (loss, accuracy), path)


def finish(figure: Figure, axes: Sequence, path: Path, beside: bool = False) -> None:
    """Adds a grid and legends, or one legend to the right of the axes, and saves the figure."""
    for each in axes:
        each.grid(color=GRID, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        if not beside:
            each.legend(frameon=False, fontsize=8)
    if beside:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_evaluation(
    folder: Path, name: str, rows: Rows, maps_of: Callable, data: Dataset, tokenizers: Tokenizers
) -> None:
    """Draws accuracy by source length (`rows`) and the attention maps of the first short examples.

    `name` is part of the names of the files. Every host calls `maps_of(dataset)`.
    """
    lengths = [(np.asarray(side) != PAD).sum(1) for side in (data.source, data.target)]
    shown = np.flatnonzero(np.max(lengths, axis=0) <= MAX_TOKENS)[:EXAMPLES].tolist()
    if shown != [*range(min(EXAMPLES, len(data)))]:
        say = f"attention is drawn for {len(shown)} texts of at most {MAX_TOKENS} tokens"
        facts({"plots": say})
    source, target = (np.asarray(side)[shown, :MAX_TOKENS] for side in (data.source, data.target))
    maps = {}
    with _attempted("attention"):
        maps = hosts.fetch(maps_of(Dataset(source, target, len(shown))))
    if not hosts.first():
        return
    with _attempted("accuracy by length"):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        _lines(axes, rows, "length", _percentages())
        axes.set(xlabel="source length", ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish(figure, (axes,), folder / f"accuracy_by_length_{name}.png")
    missing: set[str] = set()
    for i, example in enumerate(shown):
        keys, outputs = map(partial(_labels, missing), tokenizers, (source[i], target[i]))
        inputs = [tokenizers.target.symbol(BOS), *outputs[:-1]]
        labels = {"encoder": (keys, keys), "decoder": (inputs, inputs), "cross": (inputs, keys)}
        for kind in filter(maps.get, labels):  # recurrence: no self-attention
            with _attempted(f"{kind} attention of example {example + 1}"):
                title = f"{kind} attention, {''.join(keys[:-1])}"
                file = folder / f"attention_{name}_{example}_{kind}.png"
                attention([layer[i] for layer in maps[kind]], *labels[kind], title, file)
    if missing:
        characters = " ".join(map(repr, sorted(missing)))[:60]
        facts({"plots": f"the font lacks {characters}: token numbers are drawn instead"})


@contextlib.contextmanager
def _attempted(what: str) -> Iterator[None]:
    """Prints an exception instead of raising it: a failed plot must not end an evaluation."""
    try:
        yield
    except Exception as error:  # whatever Matplotlib or a full memory may raise
        facts({"plots": f"{what} is not drawn ({type(error).__name__}: {reason(error)})"})


def _labels(missing: set[str], tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """The tokens of a row as text; as a number where the font lacks a character (`missing`)."""
    known = get_font(findfont(FontProperties())).get_charmap()
    texts = [(token, tokenizer.symbol(token)) for token in tokens[tokens != PAD].tolist()]
    missing.update(letter for _, text in texts for letter in text if ord(letter) not in known)
    return [text if known.keys() >= {*map(ord, text)} else f"#{token}" for token, text in texts]


def attention(
    maps: Sequence[np.ndarray], queries: Sequence[str], keys: Sequence[str], title: str, path: Path
) -> None:
    """Plots the weights [N, T, S] of each layer, a row of panels with a column for each head.

    `queries` and `keys` label the positions that are shown; T and S may be larger.
    """
    layers, heads = min(len(maps), PANELS), min(maps[0].shape[0], PANELS)
    title = _shortened(title, 100)
    if (layers, heads) != (len(maps), len(maps[0])):
        title += f", {layers} of {len(maps)} layers, {heads} of {maps[0].shape[0]} heads"
    queries, keys = ([_shortened(label, 20) for label in labels] for labels in (queries, keys))
    side = 0.7 + 0.19 * max(len(queries), len(keys))
    letters = max(map(len, (*queries, *keys)))  # in the longest label
    edge = 0.5 + 0.08 * letters  # inches to the left of the panels and below them
    wide, high = edge + side * heads + 1.2, edge + side * layers + 0.6
    figure = Figure(figsize=(wide, high))
    panels = figure.subplots(layers, heads, squeeze=False)
    # Matplotlib's layout engines would measure every label several times.
    figure.subplots_adjust(edge / wide, edge / high, 1 - 1.2 / wide, 1 - 0.6 / high, 0.1, 0.1)
    literal = {"fontsize": 8, "parse_math": False}  # "$" does not start mathtext
    for (layer, head), panel in np.ndenumerate(panels):
        weights = maps[layer][head, : len(queries), : len(keys)]
        panel.imshow(weights, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.tick_params(length=0)
        panel.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xticks(range(len(keys)), keys, rotation=90 * (letters > 2), **literal)
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(queries)), queries, **literal)
    panels[-1, 0].set(xlabel="key (⊣ end)", ylabel="query (⊢ begin)")
    bar = figure.add_axes((1 - 0.9 / wide, 0.15, 0.2 / wide, 0.7))
    figure.colorbar(panels[0, 0].images[0], cax=bar, label="attention weight")
    figure.suptitle(title, y=1 - 0.15 / high, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=min(150, (PIXELS / (wide * high)) ** 0.5))


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
