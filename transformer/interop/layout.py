"""`bart_layout` and `t5_layout`, the names of their tensors and of our parameters; conversions.

A layout maps the name of each of their tensors to the parameters that it holds.
"""

import math
from collections.abc import Mapping

import numpy as np

from transformer.errors import UserError

Layout = dict[str, tuple[str, ...]]

PARTS = ("query", "key", "value", "out")
LINEAR = {"weight": "kernel", "bias": "bias"}
# Parameters with a row a token, and the side whose tokens they are.
TABLES = {
    "embedding/embedding": "source",
    "target_embedding/embedding": "target",
    "output_embedding/embedding": "target",
    "logits_bias": "target",
}
NORM = {"weight": "scale", "bias": "bias"}


def bart_layout(encoder_layers: int, decoder_layers: int, *, final_norm: bool) -> Layout:
    """The layers of Marian, BART, mBART, PEGASUS and M2M100; tables and positions are left out."""
    layout: Layout = {}
    for stack, depth in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        attentions = {"self_attn": "self_attention"}
        if stack == "decoder":
            attentions["encoder_attn"] = "cross_attention"
        for layer in range(depth):
            theirs, ours = f"model.{stack}.layers.{layer}", f"{stack}/layers/{layer}"
            for place, (name, attention) in enumerate(attentions.items()):
                for key, part in zip(("q", "k", "v", "out"), PARTS, strict=True):
                    _add(
                        layout, f"{theirs}.{name}.{key}_proj", f"{ours}/{attention}/{part}", LINEAR
                    )
                norm = f"{ours}/residuals/{place}/norm"
                _add(layout, f"{theirs}.{name}_layer_norm", norm, NORM)
            _add(layout, f"{theirs}.fc1", f"{ours}/feed_forward/expand", LINEAR)
            _add(layout, f"{theirs}.fc2", f"{ours}/feed_forward/contract", LINEAR)
            norm = f"{ours}/residuals/{len(attentions)}/norm"  # final in their layer, not the stack
            _add(layout, f"{theirs}.final_layer_norm", norm, NORM)
        if final_norm:
            _add(layout, f"model.{stack}.layer_norm", f"{stack}/final_norm", NORM)
    return layout


def t5_layout(encoder_layers: int, decoder_layers: int, *, gated: bool) -> Layout:
    """The layers of the T5 family, without biases; tables and relative positions are left out."""
    layout: Layout = {}
    weight = {"weight": "kernel"}
    feed_forward = {"wi_0": "expand", "wi_1": "gate"} if gated else {"wi": "expand"}
    for stack, depth in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        attentions = {"SelfAttention": "self_attention"}
        if stack == "decoder":
            attentions["EncDecAttention"] = "cross_attention"
        for layer in range(depth):
            theirs, ours = f"{stack}.block.{layer}.layer", f"{stack}/layers/{layer}"
            for place, (name, attention) in enumerate(attentions.items()):
                for key, part in zip("qkvo", PARTS, strict=True):
                    _add(
                        layout,
                        f"{theirs}.{place}.{name}.{key}",
                        f"{ours}/{attention}/{part}",
                        weight,
                    )
            last = len(attentions)
            for name, part in {**feed_forward, "wo": "contract"}.items():
                full = f"{theirs}.{last}.DenseReluDense.{name}"
                _add(layout, full, f"{ours}/feed_forward/{part}", weight)
            for place in range(last + 1):
                norm = f"{ours}/residuals/{place}/norm"
                _add(layout, f"{theirs}.{place}.layer_norm", norm, {"weight": "scale"})
        _add(layout, f"{stack}.final_layer_norm", f"{stack}/final_norm", {"weight": "scale"})
    return layout


def to_ours(
    tensor: np.ndarray, name: str, shape: tuple[int, ...], theirs: np.ndarray | None = None
) -> np.ndarray:
    """Returns the parameter `name` of `shape` that `tensor` holds.

    `theirs` is the tokenizer's map from our ids to theirs, given for what has a row a token.
    """
    if tensor.size != math.prod(shape):
        raise UserError(f"{name} of shape {shape} cannot hold {tensor.shape}: check config.json")
    if name.endswith("/kernel"):
        expected = _matrix(name, shape)[::-1]
        if tensor.shape != expected:
            raise UserError(f"{name} needs {expected}, not {tensor.shape}: check config.json")
        tensor = tensor.T
    tensor = tensor.reshape(shape)
    return np.ascontiguousarray(tensor if theirs is None else tensor[theirs])


def to_theirs(parameter: np.ndarray, name: str, theirs: np.ndarray | None = None) -> np.ndarray:
    """Returns the tensor that holds the parameter `name`; the inverse of `to_ours`."""
    if name.endswith("/kernel"):
        parameter = parameter.reshape(_matrix(name, parameter.shape)).T
    if theirs is not None:
        parameter = parameter[np.argsort(theirs)]
    elif name.endswith("/bias"):
        parameter = parameter.reshape(-1)  # biases of heads have two axes here, one there
    return np.ascontiguousarray(parameter)


def check_names(found: Mapping[str, object], layout: Layout, ignored: frozenset[str]) -> None:
    """Raises a UserError that names a tensor missing from `found`, or one that no layout holds."""
    if missing := sorted(layout.keys() - found.keys()):
        raise UserError(
            f"the weights lack {missing[0]} ({len(missing)} missing): check config.json"
        )
    if extra := sorted(found.keys() - layout.keys() - ignored):
        raise UserError(f"no parameter holds {extra[0]} ({len(extra)} such): check config.json")


def _add(layout: Layout, theirs: str, ours: str, parts: Mapping[str, str]) -> None:
    layout.update({f"{theirs}.{key}": (f"{ours}/{part}",) for key, part in parts.items()})


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The [in, out] shape of a kernel: only attention's output has its heads on the input side."""
    inputs = len(shape) - 1 if name.endswith("/out/kernel") else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])
