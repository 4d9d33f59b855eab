"""Export to Hugging Face Transformers: the class that can hold a model, its files, its tensors."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer.data.imported import ImportedTokenizer
from transformer.errors import UserError, explained
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import TrainedModel
from transformer.interop.families import (
    ACTIVATIONS,
    BART_KEYS,
    FAMILIES,
    T5_KEYS,
    absolute_tables,
    embedding_norms,
    relative_tables,
    sinusoids,
)
from transformer.interop.layout import TABLES, Layout, bart_layout, t5_layout, to_theirs
from transformer.interop.tokenizer_files import write_tokenizers
from transformer.modules.config import ModelConfig
from transformer.modules.layers import FEED_FORWARDS
from transformer.modules.model import Model
from transformer.workdir import write_json

Weights = dict[str, np.ndarray]  # our names
CLASSES = {
    "marian": "MarianMTModel",
    "m2m_100": "M2M100ForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
# What no class has. `final_norm` and `d_v` are compared with the widths and placement.
COMMON = {
    "architecture": "transformer",
    "random_positions": 0,
    "window": None,
    "normalize_qk": False,
}
# Knobs of a family that an export can fold into tensors or write as a table.
FOLDED = {
    "attention_bias",
    "ff_bias",
    "norm_epsilon",
    "scale_gated",
    "attention_scale",
    "embedding_scale",
    "position_offset",
    "sinusoid_layout",
    "sinusoid_rates",
}
NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}  # the first of each


def faults(name: str, config: ModelConfig, pad: int | None = None) -> Iterator[str]:
    """Yields each knob for which the class `name` cannot hold `config`, and what it can hold.

    `pad` is the id of padding there, if it is known: M2M100 counts positions from the next number.
    """
    family = FAMILIES[name]
    wanted = dict(COMMON)
    wanted |= {knob: value for knob, value in family.knobs.items() if knob not in FOLDED}
    wanted.setdefault("relative_per_layer", False)
    wanted.setdefault("embedding_norm", False)
    if family.is_t5:
        wanted["logits_bias"] = False
    for knob, value in wanted.items():
        found = getattr(config, knob)
        learned = knob == "position_encoding" and name in ("marian", "pegasus")
        if found != value and not (learned and found == "learned"):
            yield f"model.{knob}={found} (it has {value})"
    if config.final_norm not in (None, config.norm_placement != "post"):
        yield f"model.final_norm={config.final_norm} (set it to None)"
    if config.values_width() != config.attention_width():
        yield f"model.d_v={config.d_v} (set it to None)"
    if config.num_kv_heads not in (None, config.num_heads):
        yield f"model.num_kv_heads={config.num_kv_heads} (set it to None)"
    gated = FEED_FORWARDS[config.feed_forward][1]
    if config.feed_forward not in NAMES or (gated and not family.is_t5):
        yield f"model.feed_forward={config.feed_forward} (it has relu, gelu, gelu_erf or swish)"
    if family.is_t5:
        if config.tie_embeddings not in ("all", "inputs"):
            yield f"model.tie_embeddings={config.tie_embeddings} (it has all or inputs)"
        return
    if name == "m2m_100":
        if config.logits_bias:
            yield "model.logits_bias=True (it has none)"
        if pad is not None and config.position_offset != pad + 1:
            yield f"model.position_offset={config.position_offset} (it has {pad + 1})"
    yield from _bart_faults(name, config)


def _bart_faults(name: str, config: ModelConfig) -> Iterator[str]:
    if config.attention_width() * config.num_heads != config.d_model:
        yield f"model.d_k={config.d_k} (set it to None)"
    if config.logits_scale != 1.0:
        yield f"model.logits_scale={config.logits_scale} (it has 1.0)"
    if config.attention_scale not in (None, config.attention_width() ** -0.5):
        yield f"model.attention_scale={config.attention_scale} (set it to None)"
    if config.embedding_scale not in (None, 1.0, config.d_model**0.5):
        yield f"model.embedding_scale={config.embedding_scale} (it has None or 1.0)"
    if name in ("bart", "mbart") and config.position_offset != 2:
        yield f"model.position_offset={config.position_offset} (it has 2)"
    if config.position_encoding == "sinusoidal" and name in ("marian", "m2m_100"):
        paper = name == "marian"
        if (config.sinusoid_rates == "paper") != paper:
            yield f"model.sinusoid_rates={config.sinusoid_rates}"
        if paper and config.position_offset:
            yield f"model.position_offset={config.position_offset} (it has 0)"
        if not paper and config.sinusoid_layout != "halves":
            yield f"model.sinusoid_layout={config.sinusoid_layout} (it has halves)"


def find_class(config: ModelConfig, pad: int | None = None) -> str:
    """The name of the family whose class holds `config`; a UserError if none does."""
    found = {name: list(faults(name, config, pad)) for name in CLASSES}
    name = min(found, key=lambda each: len(found[each]))
    if found[name]:
        knobs = f"{CLASSES[name]}, the nearest class, cannot hold {', '.join(found[name])}"
        raise UserError(f"{knobs}: change these and train again, or export with --to=stablehlo")
    return name


def export(model: TrainedModel, out: Path) -> None:
    """Writes the folder `out` for `AutoModelForSeq2SeqLM`."""
    with explained("export to Hugging Face: pip install safetensors", ImportError):
        from safetensors.numpy import save_file
    name = find_class(model.model.config, int(model.tokenizers.source.theirs[0]))
    weights = {key: np.asarray(jax.device_get(x)) for key, x in model.variables.items()}
    weights = _folded(name, model.model, weights)
    tensors = dict(_tensors(name, model, weights))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", _config(name, model, weights))
    write_json(out / "generation_config.json", _generation(model))
    write_tokenizers(model.tokenizers, name, out)


def _folded(name: str, model: Model, weights: Weights) -> Weights:
    """Weights with which the class computes what `weights` do here."""
    config, family = model.config, FAMILIES[name]
    if family.is_t5:
        return _t5_weights(config, weights)
    width = config.d_model
    positions = config.position_encoding, config.sinusoid_layout
    if name != "marian" or positions != ("sinusoidal", "neighbours"):
        return weights
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])  # sines first
    return {key: _permuted(value, model.axes[key], order, width) for key, value in weights.items()}


def _permuted(value: np.ndarray, axes: tuple, order: np.ndarray, width: int) -> np.ndarray:
    """`value` with the channels of the residual stream in another order."""
    for number, axis in enumerate(axes):
        if axis in ("embed", "norm") and value.shape[number] == width:
            value = value.take(order, axis=number)
    return value


def _t5_weights(config: ModelConfig, weights: Weights) -> Weights:
    """T5 has no scale of embeddings and scores, no biases, and one of two scales of logits."""
    weights = dict(weights)
    for key in [key for key in weights if key.endswith("/bias")]:
        if np.any(weights.pop(key)):
            knob = "ff_bias" if "feed_forward" in key else "attention_bias"
            raise UserError(
                f"T5ForConditionalGeneration has no biases, and {key} is not zero: train with "
                f"model.{knob}=False, or export with --to=stablehlo"
            )
    scale = config.attention_scale or config.attention_width() ** -0.5
    if scale != 1.0:
        for key in [key for key in weights if key.endswith("/query/kernel")]:
            weights[key] = weights[key] * np.float32(scale)
    embedding = config.d_model**0.5 if config.embedding_scale is None else config.embedding_scale
    table = "embedding/embedding"
    if embedding != 1.0:
        weights[table] = weights[table] * np.float32(embedding)
    tied = config.tie_embeddings == "all"
    ratio = config.logits_scale / (_t5_scale(config) * (embedding if tied else 1.0))
    if not math.isclose(ratio, 1.0, rel_tol=1e-12):
        key = "decoder/final_norm/scale"
        weights[key] = weights[key] * np.float32(ratio)
    return weights


def _t5_scale(config: ModelConfig) -> float:
    """The scale of logits that the class is told to have: that of T5 1.0, or none."""
    own = config.d_model**-0.5
    if config.embedding_scale is None and config.tie_embeddings == "all":
        return own  # our tied table times √D, and its logits divided by it
    return own if config.logits_scale == own else 1.0


def _tensors(name: str, model: TrainedModel, weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, contiguous, by their names."""
    config, family = model.model.config, FAMILIES[name]
    rows = {}
    for side, size in (("source", model.model.vocab_size), ("target", _target_rows(model))):
        theirs = getattr(model.tokenizers, side).theirs
        rows[side] = theirs if len(theirs) == size else np.arange(size)
    for theirs, (ours,) in _layout(name, config, weights).items():
        if ours in weights:
            side = TABLES.get(ours)
            tensor = to_theirs(weights[ours], ours, None if side is None else rows[side])
            yield theirs, tensor[None] if ours == "logits_bias" else tensor
        else:  # a bias that the class has
            yield theirs, np.zeros(_bias_shape(ours, weights), np.float32)
    if not family.is_t5:
        if "logits_bias" not in weights and name != "m2m_100":
            yield "final_logits_bias", np.zeros((1, _target_rows(model)), np.float32)
        if name in ("marian", "pegasus"):
            yield from _positions(name, config, weights)


def _target_rows(model: TrainedModel) -> int:
    return model.model.target_vocab_size


def _bias_shape(name: str, weights: Weights) -> int:
    kernel = weights[name.removesuffix("/bias") + "/kernel"]
    inputs = kernel.ndim - 1 if "/out/" in name else 1
    return math.prod(kernel.shape[inputs:])


def _layout(name: str, config: ModelConfig, weights: Weights) -> Layout:
    """Their tensors and our parameters; positions of Marian and PEGASUS are apart."""
    depths, knobs = (config.num_layers, config.decoder_depth()), vars(config)
    source, target = "embedding/embedding", "target_embedding/embedding"
    output = "output_embedding/embedding"
    target = target if target in weights else source
    output = output if output in weights else target
    if FAMILIES[name].is_t5:
        layout = t5_layout(*depths, gated=FEED_FORWARDS[config.feed_forward][1])
        layout |= relative_tables(knobs) | {"shared.weight": (source,)}
        return layout | ({} if output == source else {"lm_head.weight": (output,)})
    layout = bart_layout(*depths, final_norm=config.norm_placement == "pre")
    layout |= embedding_norms() if config.embedding_norm else {}
    layout |= absolute_tables() if name in ("bart", "mbart") else {}
    if "logits_bias" in weights:
        layout["final_logits_bias"] = ("logits_bias",)
    if output == source:
        return layout | {"model.shared.weight": (source,)}
    layout |= {"model.encoder.embed_tokens.weight": (source,)}
    layout |= {"model.decoder.embed_tokens.weight": (target,)}
    if not (name == "marian" and output == target):
        layout["lm_head.weight"] = (output,)
    return layout | ({} if name == "marian" else {"model.shared.weight": (source,)})


def _positions(
    name: str, config: ModelConfig, weights: Weights
) -> Iterator[tuple[str, np.ndarray]]:
    """The tables of positions that the class reads; none if it computes the same."""
    for stack, side in (("encoder", "source"), ("decoder", "target")):
        key = f"model.{stack}.embed_positions.weight"
        if config.position_encoding == "learned":
            table = weights[f"{side}_position/embedding"][config.position_offset :]
            yield key, np.ascontiguousarray(table)
        elif name == "pegasus":
            yield key, _sinusoids(config)


def _sinusoids(config: ModelConfig) -> np.ndarray:
    """The table of sinusoidal positions in the layout of `config`."""
    length, offset = config.max_length, config.position_offset
    table = sinusoids(length + offset, config.d_model, config.sinusoid_rates)[offset:]
    if config.sinusoid_layout == "neighbours":
        half = config.d_model // 2
        table = np.stack([table[:, :half], table[:, half:]], axis=-1).reshape(length, -1)
    return np.ascontiguousarray(table)


def _config(name: str, model: TrainedModel, weights: Weights) -> dict[str, Any]:
    """Their config.json."""
    config, family = model.model.config, FAMILIES[name]
    keys = T5_KEYS if family.is_t5 else BART_KEYS
    values = {key: getattr(config, knob) for key, knob in keys.items()}
    hidden = weights["encoder/layers/0/feed_forward/expand/kernel"].shape[1]
    values |= _family_values(name, config, hidden)
    tied = config.tie_embeddings == "all"
    values |= {"vocab_size": model.model.vocab_size, "tie_word_embeddings": tied}
    if family.is_t5:
        scaled = _t5_scale(config) != 1.0
        # The old rule reads the ties for the scale; files say the tie by their tensors.
        values |= {"scale_decoder_outputs": scaled, "tie_word_embeddings": scaled}
    elif name == "marian":
        values |= _marian_values(model)
    values |= {key: _generation(model).get(key) for key in IDS}
    own = {"model_type": name, "architectures": [CLASSES[name]], "is_encoder_decoder": True}
    return own | {"dtype": "float32"} | values


IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
IDS += ("forced_bos_token_id", "forced_eos_token_id")


def _family_values(name: str, config: ModelConfig, hidden: int) -> dict[str, Any]:
    activation, depth = NAMES[config.feed_forward], config.decoder_depth()
    if FAMILIES[name].is_t5:
        values = {"feed_forward_proj": activation, "d_ff": hidden, "num_decoder_layers": depth}
        return values | {"d_kv": config.attention_width()}
    return {
        "activation_function": activation,
        "decoder_layers": depth,
        "encoder_ffn_dim": hidden,
        "decoder_ffn_dim": hidden,
        "decoder_attention_heads": config.num_heads,
        "scale_embedding": config.embedding_scale != 1.0,
        # CTranslate2's converter reads these.
        "normalize_before": config.norm_placement == "pre",
        "add_final_layer_norm": config.norm_placement == "pre",
        "normalize_embedding": config.embedding_norm,
        "static_position_embeddings": config.position_encoding == "sinusoidal",
    }


def _marian_values(model: TrainedModel) -> dict[str, Any]:
    ties = model.model.config.tie_embeddings
    return {
        "decoder_vocab_size": model.model.target_vocab_size,
        "share_encoder_decoder_embeddings": ties == "all",
        "tie_word_embeddings": ties in ("all", "target_output"),
    }


def _generation(model: TrainedModel) -> dict[str, Any]:
    """Their generation_config.json: token ids and the run's decoding defaults."""
    target, decoding = model.tokenizers.target, model.config.decoding
    theirs = target.theirs.tolist()
    bos = 1 if not isinstance(target, ImportedTokenizer) else target.roles.bos
    optional = {
        "forced_bos_token_id": target.forced_first,
        "forced_eos_token_id": target.forced_last,
    }
    values: dict[str, Any] = {
        "pad_token_id": theirs[0],
        "bos_token_id": bos,
        "eos_token_id": theirs[2],
        "decoder_start_token_id": theirs[target.start],
    }
    values |= {k: None if own is None else theirs[own] for k, own in optional.items()}
    if target.banned:
        values["bad_words_ids"] = [[theirs[own]] for own in target.banned]
    return values | _search(model, decoding)


def _search(model: TrainedModel, decoding: DecodingConfig) -> dict[str, Any]:
    longest = decoding.max_length or model.model.config.max_length
    stopping = {"true": True, "false": False}.get(decoding.early_stopping, "never")
    return {
        "num_beams": decoding.beam_size,
        "length_penalty": decoding.length_penalty,
        "early_stopping": stopping if decoding.beam_size > 1 else False,
        "max_length": longest + 1,  # with the start token
        "min_length": decoding.min_length + 1 if decoding.min_length else 0,
        "no_repeat_ngram_size": decoding.no_repeat_ngram_size,
        "repetition_penalty": decoding.repetition_penalty,
    }
