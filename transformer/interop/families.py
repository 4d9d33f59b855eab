"""The families of models in Hugging Face Transformers: their config keys as knobs, their tables."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from transformer.interop.layout import Layout

Values = dict[str, Any]  # of a config file, or of knobs

# Key of config.json → knob.
BART_KEYS = {
    "d_model": "d_model",
    "encoder_layers": "num_layers",
    "decoder_layers": "decoder_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "d_ff",
    "max_position_embeddings": "max_length",
    "dropout": "dropout_rate",
    "attention_dropout": "attention_dropout_rate",
}
T5_KEYS = {
    "d_model": "d_model",
    "d_kv": "d_k",
    "d_ff": "d_ff",
    "num_layers": "num_layers",
    "num_decoder_layers": "decoder_layers",
    "num_heads": "num_heads",
    "relative_attention_num_buckets": "relative_buckets",
    "relative_attention_max_distance": "relative_distance",
    "layer_norm_epsilon": "norm_epsilon",
    "dropout_rate": "dropout_rate",
}
# Pairs of keys that must agree, since one knob holds both.
EQUAL = (
    ("encoder_attention_heads", "decoder_attention_heads"),
    ("encoder_ffn_dim", "decoder_ffn_dim"),
)
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "swish": "swish",
    "silu": "swish",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}

# Knobs that the class decides.
LAYER_NORM = {"norm": "layer", "norm_epsilon": 1e-5, "attention_bias": True}
HALVES = {"position_encoding": "sinusoidal", "sinusoid_layout": "halves"}
LEARNED = {"position_encoding": "learned", "position_offset": 2, "embedding_norm": True}
T5 = {
    "norm": "rms",
    "norm_placement": "pre",
    "position_encoding": "relative",
    "ff_bias": False,
    "scale_gated": False,
    "attention_scale": 1.0,
    "embedding_scale": 1.0,
}
# What old files leave out, because it is the default of the class.
BART_DEFAULTS = {"dropout": 0.1, "attention_dropout": 0.0, "scale_embedding": False}
T5_DEFAULTS = {
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
FAIRSEQ_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """A class of models: the knobs that it fixes, and what its config.json may leave out."""

    knobs: Values
    defaults: Values

    @property
    def is_t5(self) -> bool:
        return self.knobs["norm"] == "rms"


def _bart(placement: str, knobs: Values, **defaults: Any) -> Family:
    return Family(LAYER_NORM | {"norm_placement": placement} | knobs, BART_DEFAULTS | defaults)


FAMILIES = {
    "marian": _bart("post", HALVES, activation_function="gelu"),
    "pegasus": _bart(
        "pre",
        HALVES,
        activation_function="gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
    ),
    "m2m_100": _bart(
        "pre",
        HALVES | {"sinusoid_rates": "tensor2tensor"},
        activation_function="relu",
        scale_embedding=True,
        attention_dropout=0.1,
        decoder_start_token_id=2,
        **FAIRSEQ_IDS,
    ),
    "bart": _bart(
        "post",
        LEARNED,
        activation_function="gelu",
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        **FAIRSEQ_IDS,
    ),
    "mbart": _bart(
        "pre", LEARNED, activation_function="gelu", forced_eos_token_id=2, **FAIRSEQ_IDS
    ),
    "t5": Family(T5, T5_DEFAULTS | {"feed_forward_proj": "relu"}),
    "mt5": Family(T5, T5_DEFAULTS | {"feed_forward_proj": "gated-gelu"}),
    "umt5": Family(
        T5 | {"relative_per_layer": True}, T5_DEFAULTS | {"feed_forward_proj": "gated-gelu"}
    ),
}


def relative_tables(knobs: Values) -> Layout:
    """The relative biases of each stack, or of each of its layers."""
    layout: Layout = {}
    for stack, side, depth in (
        ("encoder", "source", knobs["num_layers"]),
        ("decoder", "target", knobs["decoder_layers"] or knobs["num_layers"]),
    ):
        for layer in range(depth) if knobs.get("relative_per_layer") else [None]:
            theirs = f"{stack}.block.{layer or 0}.layer.0.SelfAttention"
            place = "" if layer is None else f"/{layer}"
            ours = f"{side}_position{place}/embedding"
            layout[f"{theirs}.relative_attention_bias.weight"] = (ours,)
    return layout


def absolute_tables() -> Layout:
    """The learned tables of positions of both stacks."""
    return {
        f"model.{stack}.embed_positions.weight": (f"{side}_position/embedding",)
        for stack, side in (("encoder", "source"), ("decoder", "target"))
    }


def embedding_norms() -> Layout:
    """The norms of the embedded tokens of both stacks."""
    return {
        f"model.{stack}.layernorm_embedding.{theirs}": (f"{side}_embedding_norm/{ours}",)
        for stack, side in (("encoder", "source"), ("decoder", "target"))
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    }


def sinusoids(length: int, width: int, rates: str = "paper") -> np.ndarray:
    """Sinusoids, all sines before all cosines, computed in float64 as Transformers does."""
    half = width // 2
    divisor = half if rates == "paper" else max(half - 1, 1)
    angles = np.arange(length)[:, None] * np.power(10000.0, -np.arange(half) / divisor)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
