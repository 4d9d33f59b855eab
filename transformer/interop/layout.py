"""Names and layouts of the tensors of other libraries, and their conversion in both directions.

A layout maps the name of each of their tensors to the parameters side by side in it.
"""

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from transformer.data.corpus import Tokenizers
from transformer.errors import UserError
from transformer.modules.config import ModelConfig

Layout = dict[str, tuple[str, ...]]
Tensors = Mapping[str, np.ndarray]
Values = dict[str, Any]  # of knobs, or of a config file
Depths = Mapping[str, int]  # of encoder and decoder

SIDES = {"encoder": "source", "decoder": "target"}
# Knobs of `DecodingConfig` that are the same in all other libraries; a margin that limits nothing.
BEAMS: Values = {"penalty": "length", "unfinished": "equal", "decode_margin": 2**16}
# Parameters with a row for each token, and the side whose tokens they are.
TABLES = {
    "embedding/embedding": "source",
    "target_embedding/embedding": "target",
    "output_embedding/embedding": "target",
    "logits_bias": "target",
}


@dataclass(frozen=True)
class Imported:
    """A model of another library in our terms."""

    family: str
    knobs: Values  # of ModelConfig
    decoding: Values  # knobs of DecodingConfig
    tokenizers: Tokenizers
    layout: Layout  # see `find`
    tensors: Tensors = field(repr=False)


class Naming(NamedTuple):
    """A library's names of tensors, and ours.

    `*` stands for the stack, `@` for its side, `#` for the layer, `{a,b}` for each of several
    names, and `a+b` for parameters side by side in one tensor. Several names may stand for the same
    parameter: files hold one of them.
    """

    both: str  # rows of either stack
    encoder: str
    decoder: str
    linear: tuple[str, str] = (".weight", ".bias")
    norm: tuple[str, str] = (".weight", ".bias")


def expand(naming: Naming, depths: Depths, params: Container[str] | None = None) -> Layout:
    """Returns the layout of stacks with `depths` layers, only that of `params` if they are given.

    Several names may stand for the same parameter; see `find`.
    """
    layout: Layout = {}
    for stack, depth in depths.items():
        words = (naming.both + getattr(naming, stack)).split()
        for theirs, ours in zip(words[::2], words[1::2], strict=True):
            for layer in range(depth if "#" in theirs else 1):
                fill = {"*": stack, "@": SIDES[stack], "#": str(layer)}
                one, other = (text.translate(str.maketrans(fill)) for text in (theirs, ours))
                for pair in zip(_alternatives(one), _alternatives(other), strict=True):
                    for name, held in _tensors(naming, *pair):
                        if params is None or held[0] in params:
                            layout[name] = held
    return layout


def _alternatives(text: str) -> list[str]:
    """The texts for which `a{b,c}` stands: ab and ac."""
    head, brace, rest = text.partition("{")
    inside, _, tail = rest.partition("}")
    return [head + each + tail for each in inside.split(",")] if brace else [text]


def _tensors(naming: Naming, theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    path, _, last = ours.rpartition("/")
    if last in ("embedding", "logits_bias"):
        yield theirs, (ours,)
    elif last.endswith("norm"):
        for suffix, kind in zip(naming.norm, ("scale", "bias"), strict=True):
            yield theirs + suffix, (f"{ours}/{kind}",)
    else:
        for suffix, kind in zip(naming.linear, ("kernel", "bias"), strict=True):
            yield theirs + suffix, tuple(f"{path}/{part}/{kind}" for part in last.split("+"))


def count_layers(naming: Naming, tensors: Tensors) -> dict[str, int]:
    """Returns the number of layers of each stack that `tensors` name."""
    depths = {}
    for stack in SIDES:
        first = next(x for x in (naming.both + getattr(naming, stack)).split() if "#" in x)
        before = re.escape(first.partition("#")[0].replace("*", stack))
        found = [match[1] for name in tensors if (match := re.match(rf"{before}(\d+)", name))]
        if not found:
            raise UserError(f"the weights have no layers of the {stack}: not an encoder-decoder")
        depths[stack] = 1 + max(map(int, found))
    return depths


def find(layout: Layout, tensors: Tensors, ignored: Container[str] = ()) -> Layout:
    """Returns the part of `layout` whose names are in `tensors`.

    Raises:
      UserError: there is no tensor for a parameter, or no parameter for a tensor.
    """
    found = {theirs: ours for theirs, ours in layout.items() if theirs in tensors}
    held = {name for names in found.values() for name in names}
    if missing := [theirs for theirs, ours in layout.items() if not held.issuperset(ours)]:
        some = f"{missing[0]} ({len(missing)} missing)"
        raise UserError(f"the weights lack {some}: take the files of one whole model")
    if extra := sorted(name for name in tensors if name not in layout and name not in ignored):
        some = f"{extra[0]} ({len(extra)} such)"
        raise UserError(f"no parameter holds {some}: such a model is not supported")
    return found


def parameters(
    tensors: Tensors,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and value of each of our parameters; reads one tensor at a time.

    `rows` maps source and target to their id of each of our ids.
    """
    done: set[str] = set()
    for theirs, ours in layout.items():
        if done.issuperset(ours):
            continue  # another name of it was read
        done.update(ours)
        value = tensors[theirs]
        value = value.ravel() if ours == ("logits_bias",) else value
        ends = np.cumsum([their_shape(name, shapes[name])[0] for name in ours])
        if len(value) != ends[-1]:
            problem = f"{theirs} of shape {value.shape} needs {ends[-1]} rows"
            raise UserError(f"{problem}: take the files of one whole model")
        parts = np.split(value, ends[:-1])
        del value  # its memory is free while the parameter is used
        for name in ours:
            side = TABLES.get(name)
            own = None if side is None else rows[side]
            yield name, to_ours(parts.pop(0), name, shapes[name], own)


def to_ours(
    tensor: np.ndarray, name: str, shape: tuple[int, ...], rows: np.ndarray | None = None
) -> np.ndarray:
    """Returns the parameter `name` of `shape` that `tensor` holds.

    `rows` is the tokenizer's map from our ids to theirs, for what has a row for each token.
    """
    if tensor.shape != (wanted := their_shape(name, shape)):
        problem = f"{name} needs a tensor of shape {wanted}, not {tensor.shape}"
        raise UserError(f"{problem}: take the files of one whole model")
    tensor = (tensor.T if name.endswith("/kernel") else tensor).reshape(shape)
    return np.ascontiguousarray(tensor if rows is None else tensor[rows])


def to_theirs(parameter: np.ndarray, name: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Returns the tensor that holds the parameter `name`; the inverse of `to_ours`."""
    shape = their_shape(name, parameter.shape)
    kernel = name.endswith("/kernel")
    tensor = parameter.reshape(shape[::-1]).T if kernel else parameter.reshape(shape)
    return np.ascontiguousarray(tensor if rows is None else tensor[np.argsort(rows)])


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor that holds a parameter: [out, in], with no axis of heads."""
    if name.endswith("/kernel"):
        # Only the output of attention has its heads on the input side.
        inputs = len(shape) - 1 if name.endswith("/out/kernel") else 1
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if name.endswith("/bias") else shape


def infer_knobs(tensors: Tensors, layout: Layout, heads: int, *, pre: bool) -> Values:
    """Returns the knobs of `ModelConfig` that names and shapes of tensors tell.

    `layout` is the whole layout of a library; `pre`: whether norms come before sublayers, unless
    they are on both sides.
    """
    held = {name: theirs for theirs, names in layout.items() if theirs in tensors for name in names}
    layer = "encoder/layers/0"
    try:
        width = tensors[held["embedding/embedding"]].shape[1]
        inner = tensors[held[f"{layer}/self_attention/out/kernel"]].shape[1] // heads
        own = {held[f"{layer}/self_attention/{part}/kernel"] for part in ("query", "key", "value")}
        hidden = len(tensors[held[f"{layer}/feed_forward/expand/kernel"]])
    except KeyError as error:
        raise UserError(f"no tensor holds {error}: take the files of one whole model") from error
    kv_heads = (sum(len(tensors[name]) for name in own) // inner - heads) // 2
    placement = "pre" if pre else "post"
    placement = "both" if f"{layer}/residuals/0/output_norm/scale" in held else placement
    final = "encoder/final_norm/scale" in held
    return {
        "d_model": width,
        "num_heads": heads,
        "d_k": None if inner * heads == width else inner,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "d_ff": hidden,
        "scale_gated": False,
        "ff_bias": f"{layer}/feed_forward/expand/bias" in held,
        "attention_bias": f"{layer}/self_attention/out/bias" in held,
        "norm": "layer" if f"{layer}/residuals/0/norm/bias" in held else "rms",
        "norm_placement": placement,
        "final_norm": None if final == (placement != "post") else final,
        "embedding_norm": "source_embedding_norm/scale" in held,
        "logits_bias": "logits_bias" in held,
    }


def tied(source: np.ndarray, target: np.ndarray, logits: np.ndarray) -> str:
    """The `tie_embeddings` of three tables, which are tied if they are equal."""
    inputs, outputs = (np.array_equal(each, target) for each in (source, logits))
    ties = {(True, True): "all", (True, False): "inputs", (False, True): "target_output"}
    return ties.get((inputs, outputs), "none")


def position_table(config: ModelConfig, length: int) -> Float[np.ndarray, "T D"]:
    """The first rows of what is added to embedded tokens: zeros or sinusoids."""
    if config.position_encoding != "sinusoidal":
        return np.zeros((length, config.d_model), np.float32)
    half = config.d_model // 2
    divisor = half if config.sinusoid_rates == "paper" else max(half - 1, 1)
    positions = config.position_offset + np.arange(length)
    angles = positions[:, None] * np.power(10_000.0, -np.arange(half) / divisor)
    parts = [np.sin(angles), np.cos(angles)]
    if config.sinusoid_layout == "neighbours":
        return np.stack(parts, -1).reshape(length, -1).astype(np.float32)
    return np.concatenate(parts, -1).astype(np.float32)


def _sinusoidal(layout: str, rates: str, offset: int) -> Values:
    knobs = {"sinusoid_layout": layout, "sinusoid_rates": rates, "position_offset": offset}
    return {"position_encoding": "sinusoidal"} | knobs


COMPUTED: tuple[Values, ...] = (  # positions that other libraries may store as a table
    {"position_encoding": "none"},
    _sinusoidal("neighbours", "paper", 0),
    _sinusoidal("halves", "paper", 0),
    _sinusoidal("halves", "tensor2tensor", 2),
    _sinusoidal("halves", "tensor2tensor", 1),
)


def position_knobs(*tables: np.ndarray) -> Values:
    """The knobs of positions that add the rows of `tables`; rounded sinusoids are learned ones."""
    length, width = tables[0].shape
    for knobs in COMPUTED:
        if width % 2 and knobs["position_encoding"] != "none":
            continue
        table = position_table(ModelConfig(d_model=width, num_heads=1, **knobs), length)
        if all(np.allclose(each, table, atol=1e-5) for each in tables):
            return knobs
    return {"position_encoding": "learned", "max_length": length}
