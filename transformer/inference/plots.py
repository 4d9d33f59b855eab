"""Plots of a run and of an evaluation; this module imports Matplotlib."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from transformer.console import facts
from transformer.data.batches import Dataset
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import PAD, Tokenizer
from transformer.errors import reason
from transformer.inference.text_metrics import TEXT_METRICS
from transformer.metrics import METRICS, percent
from transformer.parallel import hosts

INK, SECOND, GRID = "#1f4e79", "#c8553d", "#d9d9d9"
MAX_TOKENS = 64  # the longest text whose attention is drawn
PANELS = 8  # the maximum number of layers, and of heads, in an attention plot
PIXELS = 16e6  # the maximum number of pixels of an attention plot

Rows = Sequence[Mapping[str, Any]]


def _percentages() -> dict[str, str]:
    """Name → label of the metrics that are percentages."""
    return {k: k.replace("_", " ") for k, metric in METRICS.items() if metric.format is percent}


def by_replica(rows: Rows, name: str, x: str = "step") -> list[dict[Any, float]]:
    """Step → value of a metric, of each replica that has it, from the rows of `metrics.jsonl`."""
    replicas: dict[int, dict[Any, float]] = {}
    for row in rows:
        if name in row:
            replicas.setdefault(row.get("replica", 0), {})[row[x]] = row[name]
    return list(replicas.values())


def curve(replicas: Sequence[Mapping[Any, float]]) -> tuple[Any, ...]:
    """Steps and values of `by_replica`; of several replicas their mean, lowest and highest.

    A replica that has ended early keeps its last value.
    """
    steps = sorted({step for points in replicas for step in points})
    values = np.full((len(replicas), len(steps)), np.nan)
    for own, points in zip(values, replicas, strict=True):
        value = np.nan
        for k, step in enumerate(steps):
            own[k] = value = points.get(step, value)
    if len(replicas) == 1:
        return steps, values[0]
    return steps, values.mean(0), values.min(0), values.max(0)


def _lines(axes: Any, rows: Rows, x: str, labels: Mapping[str, str]) -> None:
    """Draws a line for each name in `labels`, from the rows that have it."""
    for k, (name, label) in enumerate(labels.items()):
        color, marker = SECOND if k else INK, "" if name.startswith("train/") else "o"
        style: Any = {"color": color, "linestyle": ("-", "--", ":", "-.")[k % 4]}
        replicas = by_replica(rows, name, x)
        places, values, *band = curve(replicas) if replicas else ([], [])
        axes.plot(places, values, label=label, marker=marker, markersize=4, **style)
        if band:
            axes.fill_between(places, *band, color=color, alpha=0.12, linewidth=0)


def learning_curve(rows: Rows, path: Path, title: str) -> None:
    """Plots loss, accuracies and text metrics over steps, from the rows of `metrics.jsonl`."""
    names = [f"validation/{name}" for name in TEXT_METRICS]
    texts = {k: k.replace("_", " ").replace("/", ", ") for k in names if any(k in r for r in rows)}
    panels = 3 if texts else 2
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    loss, accuracy, *others = figure.subplots(1, panels)
    _lines(loss, rows, "step", {"train/loss": "train", "validation/loss": "validation"})
    labels = {f"validation/{name}": f"validation, {text}" for name, text in _percentages().items()}
    _lines(accuracy, rows, "step", {"train/accuracy": "train, token accuracy"} | labels)
    loss.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    accuracy.set(xlabel="step", ylabel="correct", ylim=(-0.02, 1.02))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in others:
        _lines(axes, rows, "step", texts)
        axes.set(xlabel="step", ylabel="of decoded text, in percent", ylim=(0, None))
    figure.suptitle(title, fontsize=10, parse_math=False)
    finish(figure, (loss, accuracy, *others), path)


def finish(figure: Figure, axes: Sequence, path: Path, beside: bool = False) -> None:
    """Adds a grid and legends, or one legend to the right of the axes, and saves the figure."""
    for each in axes:
        each.grid(color=GRID, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        if not beside:
            each.legend(frameon=False, fontsize=8)
    if beside:
        named = {}
        for each in axes:
            handles, labels = each.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        options = {"loc": "outside right center", "ncols": -(-len(named) // 40)}
        figure.legend(named.values(), named.keys(), **options, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_evaluation(
    folder: Path,
    name: str,
    rows: Rows,
    maps_of: Callable,
    data: Dataset,
    tokenizers: Tokenizers,
    title: str,
    everything: bool,
) -> None:
    """Draws accuracy by source length (`rows`), and attention in the first short example.

    That is cross-attention, or with `everything` attention of all kinds in three examples.
    `name` is part of the names of the files, which are printed. Every host calls
    `maps_of(dataset)`.
    """
    examples = 3 if everything else 1
    lengths = [(x != PAD).sum(1) for x in (data.source, data.target)]
    shown = np.flatnonzero(np.max(lengths, axis=0) <= MAX_TOKENS)[:examples].tolist()
    if shown != [*range(min(examples, len(data)))]:
        say = f"attention is drawn for {len(shown)} texts of at most {MAX_TOKENS} tokens"
        facts({"plots": say})
    source, target = (np.asarray(side)[shown, :MAX_TOKENS] for side in (data.source, data.target))
    maps = {}
    with _attempted("attention"):
        maps = hosts.fetch(maps_of(Dataset(source, target, len(shown))))
    if not hosts.first():
        return
    drawn: list[str] = []
    with _attempted("accuracy by length"):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        labels = _percentages() | {"sequence_accuracy": "exact match of outputs"}
        _lines(axes, rows, "length", labels)
        axes.set(xlabel="source length (tokens)", ylabel="correct", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(title, fontsize=10, parse_math=False)
        finish(figure, (axes,), folder / f"accuracy_by_length_{name}.png")
        drawn.append(f"accuracy_by_length_{name}.png")
    missing: set[str] = set()
    for i, example in enumerate(shown):
        keys, outputs = map(partial(_labels, missing), tokenizers, (source[i], target[i]))
        text = tokenizers.source.decode(source[i].tolist())
        text = text if _characters() >= {*text} else f"example {example + 1}"
        inputs = ["⊢", *outputs[:-1]]
        labels = {"encoder": (keys, keys), "decoder": (inputs, inputs), "cross": (inputs, keys)}
        kinds = labels if everything else ("cross",)
        for kind in filter(maps.get, kinds):  # recurrence: no self-attention
            with _attempted(f"{kind} attention of example {example + 1}"):
                file = folder / f"attention_{name}_{example}_{kind}.png"
                weights = [layer[i] for layer in maps[kind]]
                attention(weights, *labels[kind], f"{kind} attention: {text}", file)
                drawn.append(file.name)
    if missing:
        characters = " ".join(map(repr, sorted(missing)))[:60]
        facts({"plots": f"the font lacks {characters}: token numbers are drawn instead"})
    names = ", ".join(drawn) if len(drawn) < 4 else f"{len(drawn)} files"
    facts({"plots": f"{names} in {folder}" if drawn else ""})


@contextlib.contextmanager
def _attempted(what: str) -> Iterator[None]:
    """Prints an exception instead of raising it: a failed plot must not end an evaluation."""
    try:
        yield
    except Exception as error:  # whatever Matplotlib or a full memory may raise
        facts({"plots": f"{what} is not drawn ({type(error).__name__}: {reason(error)})"})


@cache
def _characters() -> set[str]:
    """The characters of Matplotlib's font."""
    return {*map(chr, get_font(findfont(FontProperties())).get_charmap())}


def _labels(missing: set[str], tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """The tokens of a row as text; as a number where the font lacks a character (`missing`)."""
    labels = []
    for token in tokens[tokens != PAD].tolist():
        text = tokenizer.symbol(token).replace("▁", "_")  # SentencePiece's space
        unknown = {*text} - _characters()
        missing |= unknown
        labels.append(f"#{token}" if unknown else text)
    return labels


def attention(
    maps: Sequence[np.ndarray], queries: Sequence[str], keys: Sequence[str], title: str, path: Path
) -> None:
    """Plots the weights [N, T, S] of each layer, a row of panels with a column for each head.

    `queries` and `keys` label the positions that are shown; T and S may be larger.
    """
    layers, heads = min(len(maps), PANELS), min(maps[0].shape[0], PANELS)
    queries, keys = ([_shortened(label, 20) for label in labels] for labels in (queries, keys))
    cell = 0.19 + 0.7 / max(len(queries), len(keys))  # inches, of a weight
    across, down = cell * len(keys), cell * len(queries)  # of a panel
    left, below = (0.5 + 0.07 * max(map(len, labels)) for labels in (queries, keys))
    turned = max(map(len, keys)) > 2  # but not single characters, such as ⊣
    below = below if turned else 0.5
    pitch = max(across, 1.0) + 0.3  # from panel to panel, wide enough for their titles
    fall = max(down, 1.2 / layers) + 0.35  # from row to row, high enough for the text beside them
    wide, high = left + pitch * heads + 0.8, 0.4 + fall * layers + below
    large = max(10, 0.6 * min(wide, high))  # to be read in the whole of a large picture
    title = _shortened(title, int(110 * wide / large))
    if (layers, heads) != (len(maps), len(maps[0])):
        title += f", {layers} of {len(maps)} layers, {heads} of {maps[0].shape[0]} heads"
    figure = Figure(figsize=(wide, high))
    # One Axes, in inches from the top left: panels with their own ticks take twice as long.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(high, 0))
    axes.set_axis_off()
    image: Any = partial(axes.imshow, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    literal = {"fontsize": 8, "parse_math": False}  # "$" does not start mathtext
    label: Any = partial(axes.text, **literal)
    center: Any = partial(axes.text, ha="center")
    for layer, head in np.ndindex(layers, heads):
        x, y = left + pitch * head, 0.75 + fall * layer
        weights = maps[layer][head, : len(queries), : len(keys)]
        image(weights, extent=(x, x + across, y + down, y), interpolation_stage="rgba")
        axes.add_patch(Rectangle((x, y), across, down, fill=False, linewidth=0.8))
        axes.text(x, y - 0.06, f"layer {layer + 1}, head {head + 1}", fontsize=9)
        for k, text in enumerate(queries if head == 0 else ()):
            label(x - 0.05, y + cell * (k + 0.5), text, ha="right", va="center_baseline")
        for k, text in enumerate(keys if layer == layers - 1 else ()):
            turn = {"ha": "center", "va": "top", "rotation": 90 * (turned and len(text) > 1)}
            label(x + cell * (k + 0.5), y + down + 0.05, text, **turn)
    x, y = left + (wide - left - 1.1) / 2, 0.75 + (high - below - 0.75) / 2
    axes.text(0.1, y, "query (⊢ begin)", rotation=90, va="center", fontsize=large)
    center(x, high - 0.1, "key (⊣ end)", fontsize=large)
    center(x, 0.35, title, fontsize=large, parse_math=False)
    bar = figure.add_axes((1 - 0.8 / wide, below / high, 0.2 / wide, 1 - (0.75 + below) / high))
    figure.colorbar(axes.images[0], cax=bar, label="attention weight")
    dpi = min(150, (PIXELS / (wide * high)) ** 0.5)
    figure.savefig(path, dpi=dpi, pil_kwargs={"compress_level": 1})


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
