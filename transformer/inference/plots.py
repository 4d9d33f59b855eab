"""Plots of a run and of an evaluation; this module imports Matplotlib."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from transformer.inference.evaluation import Maps
from transformer.metrics import METRICS, percent
from transformer.parallel import hosts

INK, SECOND, GRID = "#1f4e79", "#c8553d", "#d9d9d9"
LINES = ("-", "--", ":", "-.")
EXAMPLES = 3  # number of examples whose attention is drawn
MAX_TOKENS = 64  # the longest text whose attention is drawn
PANELS = 8  # the maximum number of layers, and of heads, in an attention plot
PIXELS = 16e6  # the maximum number of pixels of an attention plot


def learning_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the loss and the percentages over steps, from the rows of `metrics.jsonl`."""

    def plot(axes: Any, name: str, label: str, **style: Any) -> None:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **style)

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    plot(loss, "train/loss", "train", color=INK)
    plot(loss, "validation/loss", "validation", color=SECOND, marker="o")
    loss.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    plot(accuracy, "train/accuracy", "train, token accuracy", color=INK)
    for k, name in enumerate(name for name, each in METRICS.items() if each.format is percent):
        style = {"color": SECOND, "marker": "o", "linestyle": LINES[k % len(LINES)]}
        label = f"validation, {name.replace('_', ' ')}"
        plot(accuracy, f"validation/{name}", label, **style)
    accuracy.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    finish(figure, (loss, accuracy), path)


def accuracy_by_length(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the metrics that are percentages over the source length, from rows of an evaluation."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    lengths = [row["length"] for row in rows]
    for k, name in enumerate(name for name, each in METRICS.items() if each.format is percent):
        values, color = [row[name] for row in rows], (INK, SECOND)[k % 2]
        style: Any = {"color": color, "linestyle": LINES[k % len(LINES)], "marker": "o"}
        axes.plot(lengths, values, label=name.replace("_", " "), **style)
    axes.set(xlabel="source length", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(figure, (axes,), path, legend="lower left")


def finish(figure: Figure, axes: Sequence, path: Path, legend: str = "best") -> None:
    """Adds a grid and legends and saves; `beside`: one legend to the right of the axes."""
    for each in axes:
        each.grid(color=GRID, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        if legend != "beside":
            each.legend(frameon=False, loc=legend, fontsize=8)
    if legend == "beside":
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_evaluation(
    folder: Path,
    name: str,
    by_length: Sequence[Mapping[str, Any]],
    maps_of: Callable[[Dataset], Maps],
    data: Dataset,
    tokenizers: Tokenizers,
) -> None:
    """Draws accuracy by source length, and the attention maps of the first short examples.

    Args:
      folder: the folder of the plots.
      name: the name of the evaluation, part of the file names.
      by_length: metrics for each source length.
      maps_of: the attention maps of a dataset; every host calls it.
      data: the evaluated examples.
      tokenizers: the tokenizers of source and target.
    """
    lengths = [(np.asarray(side) != PAD).sum(1) for side in (data.source, data.target)]
    shown = np.flatnonzero(np.max(lengths, axis=0) <= MAX_TOKENS)[:EXAMPLES]
    if len(shown) < min(EXAMPLES, len(data)) or (shown != np.arange(len(shown))).any():
        facts(
            {"plots": f"attention is drawn for {len(shown)} texts of at most {MAX_TOKENS} tokens"}
        )
    source, target = (np.asarray(side)[shown, :MAX_TOKENS] for side in (data.source, data.target))
    maps = {}
    with attempted("attention"):
        maps = hosts.fetch(maps_of(Dataset(source, target, len(shown))))
    if not hosts.first():
        return
    with attempted("accuracy by length"):
        accuracy_by_length(by_length, folder / f"accuracy_by_length_{name}.png")
    missing = ""
    for i, example in enumerate(shown):
        keys, lost = labels(tokenizers.source, source[i])
        outputs, lost_too = labels(tokenizers.target, target[i])
        missing += lost + lost_too
        inputs = [tokenizers.target.symbol(BOS), *outputs[:-1]]
        axes = {"encoder": (keys, keys), "decoder": (inputs, inputs), "cross": (inputs, keys)}
        for kind in (kind for kind in axes if maps.get(kind)):  # recurrence: no self-attention
            with attempted(f"{kind} attention of example {example + 1}"):
                title = f"{kind} attention, {(' ' * bool(lost)).join(keys[:-1])}"
                file = folder / f"attention_{name}_{example}_{kind}.png"
                attention([layer[i] for layer in maps[kind]], *axes[kind], title, file)
    if missing:
        characters = " ".join(map(repr, dict.fromkeys(missing)))[:60]
        facts({"plots": f"the font lacks {characters}: token ids are drawn instead"})


@contextlib.contextmanager
def attempted(what: str) -> Iterator[None]:
    """Prints an exception instead of raising it: a failed plot must not end an evaluation."""
    try:
        yield
    except Exception as error:  # whatever Matplotlib or a full memory may raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        facts({"plots": f"{what} is not drawn ({reason[:200]})"})


def labels(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[list[str], str]:
    """The tokens of a row as text, or as ids if the font lacks characters, and these characters."""
    own = [token for token in tokens.tolist() if token != PAD]
    symbols = [tokenizer.symbol(token) for token in own]
    known = get_font(findfont(FontProperties())).get_charmap()
    lost = "".join(c for c in dict.fromkeys("".join(symbols)) if ord(c) not in known)
    return ([str(token) for token in own] if lost else symbols), lost


def attention(
    maps: Sequence[np.ndarray],
    queries: Sequence[str],
    keys: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Plots a panel for each of the first `PANELS` layers (rows) and heads (columns).

    Args:
      maps: the weights [N, T, S] of each layer; T and S may exceed the labels.
      queries: a label for each query that is shown.
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
    letters = max(map(len, (*queries, *keys)))  # in the longest label
    edge = 0.5 + 0.08 * letters  # inches to the left of the panels and below them
    wide, high = edge + side * heads + 1.2, edge + side * layers + 0.6
    figure = Figure(figsize=(wide, high))
    # Matplotlib's layout engines would measure every label several times.
    room = {"left": edge / wide, "right": 1 - 1.2 / wide}
    room |= {"bottom": edge / high, "top": 1 - 0.6 / high, "wspace": 0.1, "hspace": 0.1}
    panels = figure.subplots(layers, heads, squeeze=False, gridspec_kw=room)
    literal = {"fontsize": 8, "parse_math": False}  # "$" does not start mathtext
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
    """Truncates `text` to `most` characters, ending in … if it was longer."""
    return text if len(text) <= most else text[: most - 1] + "…"
