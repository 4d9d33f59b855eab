"""`read_model`, what the config files of a Hugging Face folder say, in the words of this code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transformer.errors import UserError
from transformer.interop.families import (
    ACTIVATIONS,
    BART_KEYS,
    EQUAL,
    FAMILIES,
    HALVES,
    T5_KEYS,
    Family,
    Values,
    absolute_tables,
    embedding_norms,
    relative_tables,
    sinusoids,
)
from transformer.interop.layout import Layout, bart_layout, t5_layout
from transformer.interop.readers import open_tensors, read_json

Tensors = Mapping[str, np.ndarray]

# Values of generation_config.json that change outputs and that decoding here cannot do.
UNSUPPORTED = {
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "begin_suppress_tokens": None,
    "forced_decoder_ids": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
    "dola_layers": None,
}


@dataclass(frozen=True)
class HuggingFaceModel:
    """A folder's model in our terms; token ids are theirs."""

    family: str
    knobs: Values  # of ModelConfig
    layout: Layout
    ignored: frozenset[str]  # tensors that may be in the file and hold nothing of their own
    vocab_size: int
    target_vocab_size: int
    ids: Values  # the fields of `TokenIds`
    decoding: Values  # of DecodingConfig
    tokenizer_class: str | None
    tensors: Tensors = field(repr=False)


def read_model(folder: Path) -> HuggingFaceModel:
    """Returns the model that `config.json` of `folder` describes, its tensors not yet read."""
    config = read_json(folder / "config.json")
    name = config.get("model_type")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{folder}: model_type {name} is not supported; these are: {known}")
    family, tensors = FAMILIES[name], open_tensors(folder)
    config = family.defaults | config
    generation = config
    if (path := folder / "generation_config.json").is_file():
        ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        generation = {key: config.get(key) for key in ids}
        generation |= {k: v for k, v in read_json(path).items() if v is not None}
    knobs = _knobs(family, config)
    prefix = "" if family.is_t5 else "model."
    ties, tables = _tables(prefix, tensors, config)
    knobs["tie_embeddings"], vocab = ties, _required(config, "vocab_size")
    if family.is_t5:
        positions = relative_tables(knobs)
        depths = knobs["num_layers"], knobs["decoder_layers"] or knobs["num_layers"]
        gated = knobs["feed_forward"] in ("geglu", "swiglu", "reglu")
        layout = t5_layout(*depths, gated=gated) | positions
        knobs["logits_scale"] = _t5_logits_scale(name, config)
    else:
        positions = _position_tables(knobs, tensors, config)
        depths = knobs["num_layers"], knobs["decoder_layers"] or knobs["num_layers"]
        layout = bart_layout(*depths, final_norm=knobs["norm_placement"] == "pre") | positions
        layout |= embedding_norms() if knobs.get("embedding_norm") else {}
        if "final_logits_bias" in tensors and np.any(tensors["final_logits_bias"]):
            knobs["logits_bias"], layout["final_logits_bias"] = True, ("logits_bias",)
    return HuggingFaceModel(
        family=name,
        knobs=knobs,
        layout=layout | tables,
        ignored=frozenset(_ignored(prefix)),
        vocab_size=vocab,
        target_vocab_size=config.get("decoder_vocab_size") or vocab,
        ids=_token_ids(generation),
        decoding=_decoding(generation),
        tokenizer_class=config.get("tokenizer_class"),
        tensors=tensors,
    )


def _knobs(family: Family, config: Values) -> Values:
    """The knobs that do not depend on tensors."""
    for one, other in EQUAL:
        if one in config and config[one] != _required(config, other):
            both = f"{one}={config[one]} and {other}={config[other]}"
            raise UserError(f"config.json has {both}: one knob holds both; they must be equal")
    keys = T5_KEYS if family.is_t5 else BART_KEYS
    optional = {"num_decoder_layers"}
    knobs = dict(family.knobs)
    for key, knob in keys.items():
        knobs[knob] = config.get(key) if key in optional else _required(config, key)
    if knobs["decoder_layers"] == knobs["num_layers"]:
        knobs["decoder_layers"] = None
    key = "feed_forward_proj" if family.is_t5 else "activation_function"
    if (activation := config[key]) not in ACTIVATIONS:
        raise UserError(f"config.json: {key}={activation} is none of {', '.join(ACTIVATIONS)}")
    knobs["feed_forward"] = ACTIVATIONS[activation]
    if not family.is_t5:
        knobs["embedding_scale"] = None if config["scale_embedding"] else 1.0
    if knobs.get("sinusoid_rates") == "tensor2tensor":
        knobs["position_offset"] = config["pad_token_id"] + 1
    return knobs


def _required(config: Values, key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"config.json lacks {key}: take that of the original model")
    return config[key]


def _t5_logits_scale(name: str, config: Values) -> float:
    """1/√D for T5 1.0; later ones, known by their separate logits table, are not scaled."""
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return config["d_model"] ** -0.5 if scaled and name != "mt5" else 1.0


def _names(prefix: str) -> dict[str, str]:
    """The names that a file may give to the tables of embeddings."""
    return {
        "encoder": f"{prefix}encoder.embed_tokens.weight",
        "decoder": f"{prefix}decoder.embed_tokens.weight",
        "shared": f"{prefix}shared.weight",
        "output": "lm_head.weight",
    }


def _tables(prefix: str, tensors: Tensors, config: Values) -> tuple[str, Layout]:
    """The ties of the embeddings, and the layout of their tables.

    A file holds a tied table once, under any of its names, or several times.
    """
    names = _names(prefix)
    orders: dict[str, tuple[str, ...]] = {
        "embedding": ("encoder", "shared", "decoder", "output"),
        "target_embedding": ("decoder", "shared", "encoder", "output"),
        "output_embedding": ("output", "decoder", "shared", "encoder"),
    }
    if config.get("share_encoder_decoder_embeddings") is False:
        orders["embedding"] = ("encoder",)
        orders["target_embedding"] = ("decoder", "output")
        orders["output_embedding"] = ("output", "decoder")
    found = {}
    for ours, order in orders.items():
        present = [names[key] for key in order if names[key] in tensors]
        found[ours] = (present or [names[order[min(1, len(order) - 1)]]])[0]

    def same(one: str, other: str) -> bool:
        one, other = found[one], found[other]
        return one == other or np.array_equal(tensors[one], tensors[other])

    inputs = same("embedding", "target_embedding")
    outputs = same("target_embedding", "output_embedding")
    ties = {(True, True): "all", (True, False): "inputs", (False, True): "target_output"}
    held = ["embedding"] + ["target_embedding"] * (not inputs)
    held += ["output_embedding"] * (not outputs)
    layout = {found[ours]: (f"{ours}/embedding",) for ours in held}
    return ties.get((inputs, outputs), "none"), layout


def _ignored(prefix: str) -> Iterator[str]:
    yield from _names(prefix).values()
    yield "final_logits_bias"
    for stack in ("encoder", "decoder"):
        yield f"model.{stack}.embed_positions.weight"
        yield f"model.{stack}.embed_positions.weights"  # of old M2M100 files
        yield f"model.{stack}.version"
    yield "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def _position_tables(knobs: Values, tensors: Tensors, config: Values) -> Layout:
    """The tables of positions; if they are sinusoids, there is none. Sets the knobs of it."""
    names = absolute_tables()
    if knobs["position_encoding"] == "learned":
        return names
    stored = [name for name in names if name in tensors]
    if not stored or knobs.get("sinusoid_rates"):  # M2M100 computes them
        return {}
    if all(is_sinusoid(tensors[name]) for name in stored):
        return {}
    for knob in HALVES:
        del knobs[knob]
    knobs["position_encoding"] = "learned"
    return names


def is_sinusoid(table: np.ndarray) -> bool:
    """Whether `table` holds `sinusoids`; a rounded one is read as a learned table."""
    return table.shape[1] % 2 == 0 and np.allclose(table, sinusoids(*table.shape), atol=1e-5)


def _token_ids(generation: Values) -> Values:
    """The fields of `TokenIds`, their numbers; `unk` is the tokenizer's."""
    eos = _required(generation, "eos_token_id")
    start = generation.get("decoder_start_token_id")
    banned = set(generation.get("suppress_tokens") or ())
    for word in generation.get("bad_words_ids") or ():
        if len(word) != 1:
            raise UserError(f"bad_words_ids has {word}, not a single token: remove it")
        banned |= set(word)
    return {
        "pad": _required(generation, "pad_token_id"),
        "eos": one_id(eos, "eos_token_id"),
        "start": _required(generation, "bos_token_id") if start is None else start,
        "bos": generation.get("bos_token_id"),
        "forced_first": one_id(generation.get("forced_bos_token_id"), "forced_bos_token_id"),
        "forced_last": one_id(generation.get("forced_eos_token_id"), "forced_eos_token_id"),
        "banned": tuple(sorted(banned)),
    }


def one_id(value: Any, key: str) -> Any:
    """The only id of `value`, which may be a list."""
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"{key}={value}: outputs end in one way here; keep one of them")
        return value[0]
    return value


def _decoding(generation: Values) -> Values:
    """The knobs of `DecodingConfig` with which decoding gives the outputs of `generate`."""
    for key, neutral in UNSUPPORTED.items():
        if generation.get(key, neutral) not in (neutral, None, [], {}):
            value = f"{key}={generation[key]}"
            raise UserError(f"generation_config.json: {value} is not supported; remove it")
    get = lambda key, default: generation.get(key) or default  # noqa: E731  null: the default
    # Their lengths count the start token, except max_new_tokens.
    longest = get("max_new_tokens", 0) or get("max_length", 20) - 1
    length_penalty = generation.get("length_penalty")
    return {
        "beam_size": get("num_beams", 1),
        "penalty": "length",
        "length_penalty": 1.0 if length_penalty is None else float(length_penalty),
        "early_stopping": str(get("early_stopping", False)).lower(),
        "unfinished": "equal",
        "decode_margin": 2**16,  # no limit: max_length alone
        "max_length": longest,
        "min_length": max(0, get("min_length", 0) - 1),
        "no_repeat_ngram_size": get("no_repeat_ngram_size", 0),
        "repetition_penalty": float(get("repetition_penalty", 1.0)),
    }
