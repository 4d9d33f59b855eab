"""`read`, a checkpoint of OpenNMT-py in the words of this code; needs PyTorch, not OpenNMT-py."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transformer.errors import UserError, explained
from transformer.interop.layout import LINEAR, NORM, PARTS, Layout, check_names
from transformer.interop.readers import TorchTensors
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

Values = dict[str, Any]

ACTIVATIONS = {"relu": "relu", "gelu": "gelu_erf", "silu": "swish", "gated-silu": "swiglu"}
SINUSOIDS = {"SinusoidalInterleaved": ("neighbours", "paper")}
SINUSOIDS |= {"SinusoidalConcat": ("halves", "tensor2tensor")}
# Options that change outputs, and the values that a model here can have.
HOLDS: dict[str, tuple[Any, ...]] = {
    "encoder_type": ("transformer",),
    "decoder_type": ("transformer",),
    "position_encoding": (True,),
    "max_relative_positions": (0,),
    "parallel_residual": (False,),
    "num_experts": (0,),
    "sliding_window": (0,),
    "copy_attn": (False,),
    "feat_merge": ("concat", None),
    "aan_useffn": (False,),
    "generator_function": ("softmax",),
}


@dataclass(frozen=True)
class OpenNMTModel:
    """A checkpoint's model in our terms; token ids are theirs."""

    knobs: Values  # of ModelConfig
    layout: Layout
    pieces: dict[str, list[str]]  # of source and target, by id
    ids: dict[str, Values]  # the fields of `TokenIds` for source and target
    source_eos: bool  # whether a source ends with EOS: it does not
    tensors: Mapping[str, np.ndarray] = field(repr=False)


def read(path: Path) -> OpenNMTModel:
    """Returns the model in a checkpoint file.

    Raises:
      UserError: it is no such file, or our model has no such part.
    """
    with explained("OpenNMT-py checkpoints: pip install torch", ImportError):
        import torch
    message = f"{path} is not a checkpoint of OpenNMT-py that can be read safely"
    kinds = Exception  # of a file that is not PyTorch's, torch.load raises nearly anything
    with explained(message, kinds), torch.serialization.safe_globals([Namespace]):
        saved = torch.load(path, "cpu", weights_only=True, mmap=True)
    if not isinstance(saved, dict) or not {"model", "generator", "vocab", "opt"} <= saved.keys():
        raise UserError(f"{path} lacks model, generator, vocab or opt: not from OpenNMT-py 3")
    state = dict(saved["model"]) | {f"generator.{k}": v for k, v in saved["generator"].items()}
    tensors, options = TorchTensors(state), vars(saved["opt"])
    for name, values in HOLDS.items():
        if name in options and options[name] not in values:
            raise UserError(f"{path}: {name}={options[name]} is not supported")
    knobs = _knobs(tensors, options)
    vocab = saved["vocab"]
    pieces = {"source": list(vocab["src"]), "target": list(vocab["tgt"])}
    if pieces["source"] == pieces["target"]:
        pieces["target"] = pieces["source"]
    start = vocab.get("decoder_start_token") or "<s>"
    ids = {side: _ids(own, start if side == "target" else "<s>") for side, own in pieces.items()}
    model = Model(ModelConfig(**knobs), len(pieces["source"]), len(pieces["target"]))
    full = _layout(model.config)
    layout = {theirs: ours for theirs, ours in full.items() if ours[0] in model.shapes}
    tables = {f"{stack}.embeddings.make_embedding.emb_luts.0.weight" for stack in STACKS}
    positions = {f"{stack}.embeddings.make_embedding.pe.pe" for stack in STACKS}
    check_names(dict.fromkeys(tensors), layout, frozenset(tables | positions | {LOGITS}))
    return OpenNMTModel(knobs, layout, pieces, ids, False, tensors)


LOGITS = "generator.weight"
STACKS = {"encoder": "transformer", "decoder": "transformer_layers"}


def _ids(pieces: list[str], start: str) -> Values:
    """The fields of `TokenIds`."""
    places = {piece: number for number, piece in enumerate(pieces)}
    for name in ("<blank>", "</s>", start):
        if name not in places:
            raise UserError(f"the checkpoint's vocabulary lacks {name}: not from OpenNMT-py 3")
    pad, bos = places["<blank>"], places.get("<s>")
    return {
        "pad": pad,
        "eos": places["</s>"],
        "start": places[start],
        "bos": bos,
        "unk": places.get("<unk>"),
        "forced_first": None,
        "forced_last": None,
        "banned": tuple(sorted({pad, bos} - {None})),
    }


def _knobs(tensors: Mapping[str, np.ndarray], options: Values) -> Values:
    """The knobs of `ModelConfig`."""
    names, first = set(tensors), "encoder.transformer.0"
    depths = [
        len({name.split(".")[2] for name in names if name.startswith(f"{stack}.{layers}.")})
        for stack, layers in STACKS.items()
    ]
    if 0 in depths:
        raise UserError("the checkpoint has no layers of a Transformer: not from OpenNMT-py 3")
    heads = options.get("heads", 8)
    tables = [tensors[f"{stack}.embeddings.make_embedding.emb_luts.0.weight"] for stack in STACKS]
    keys, width = tensors[f"{first}.self_attn.linear_keys.weight"], tables[0].shape[1]
    activation = options.get("pos_ffn_activation_fn", "relu")
    if activation not in ACTIVATIONS:
        raise UserError(f"pos_ffn_activation_fn={activation} is none of {', '.join(ACTIVATIONS)}")
    kind = options.get("position_encoding_type") or "SinusoidalInterleaved"
    if kind not in SINUSOIDS:
        raise UserError(f"position_encoding_type={kind} is none of {', '.join(SINUSOIDS)}")
    layout, rates = SINUSOIDS[kind]
    inputs = np.array_equal(tables[0], tables[1])
    outputs = np.array_equal(tables[1], tensors[LOGITS])
    ties = {(True, True): "all", (True, False): "inputs", (False, True): "target_output"}
    kv_heads = keys.shape[0] * heads // width
    return {
        "num_layers": depths[0],
        "decoder_layers": None if depths[0] == depths[1] else depths[1],
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "d_ff": tensors[f"{first}.feed_forward.w_1.weight"].shape[0],
        "scale_gated": False,
        "feed_forward": ACTIVATIONS[activation],
        "ff_bias": f"{first}.feed_forward.w_1.bias" in names,
        "attention_bias": f"{first}.self_attn.linear_query.bias" in names,
        "norm": "layer" if f"{first}.layer_norm.bias" in names else "rms",
        "norm_placement": "pre",
        "norm_epsilon": options.get("norm_eps", 1e-6),
        "position_encoding": "sinusoidal",
        "sinusoid_layout": layout,
        "sinusoid_rates": rates,
        "tie_embeddings": ties.get((inputs, outputs), "none"),
        "logits_bias": "generator.bias" in names,
    }


def _layout(config: ModelConfig) -> Layout:
    """Their tensors, and the parameter of each, if the model has it."""
    out: Layout = {}

    def add(theirs: str, ours: str, parts: Mapping[str, str]) -> None:
        out.update({f"{theirs}.{name}": (f"{ours}/{part}",) for name, part in parts.items()})

    for (stack, layers), depth in zip(
        STACKS.items(), (config.num_layers, config.decoder_depth()), strict=True
    ):
        attentions = {"self_attn": "self_attention"}
        attentions |= {"context_attn": "cross_attention"} if stack == "decoder" else {}
        for i in range(depth):
            theirs, ours = f"{stack}.{layers}.{i}", f"{stack}/layers/{i}"
            for k, (name, attention) in enumerate(attentions.items()):
                linears = "linear_query", "linear_keys", "linear_values", "final_linear"
                for linear, part in zip(linears, PARTS, strict=True):
                    add(f"{theirs}.{name}.{linear}", f"{ours}/{attention}/{part}", LINEAR)
                norm = f"layer_norm_{k + 1}" if stack == "decoder" else "layer_norm"
                add(f"{theirs}.{norm}", f"{ours}/residuals/{k}/norm", NORM)
            for linear, part in (("w_1", "expand"), ("w_3", "gate"), ("w_2", "contract")):
                add(f"{theirs}.feed_forward.{linear}", f"{ours}/feed_forward/{part}", LINEAR)
            last = f"{ours}/residuals/{len(attentions)}/norm"
            add(f"{theirs}.feed_forward.layer_norm", last, NORM)
        add(f"{stack}.layer_norm", f"{stack}/final_norm", NORM)
    table = "{}.embeddings.make_embedding.emb_luts.0.weight".format
    out[table("encoder")] = ("embedding/embedding",)
    if config.tie_embeddings in ("target_output", "none"):
        out[table("decoder")] = ("target_embedding/embedding",)
    if config.tie_embeddings in ("inputs", "none"):
        out[LOGITS] = ("output_embedding/embedding",)
    return out | {"generator.bias": ("logits_bias",)}
