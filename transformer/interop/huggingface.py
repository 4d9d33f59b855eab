"""Models of Hugging Face Transformers: their classes in our terms, and `read`, for folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer.data.imported import TokenIds
from transformer.errors import UserError
from transformer.inference.decoding import GREEDY
from transformer.interop import tokenizer_files
from transformer.interop.layout import (
    BEAMS,
    SIDES,
    TABLES,
    Imported,
    Naming,
    Tensors,
    Values,
    expand,
    find,
    position_knobs,
    tied,
)
from transformer.interop.readers import open_tensors, read_json
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

BART = Naming(
    both="""
    model.*.layers.#.self_attn.{q,k,v,out}_proj  */layers/#/self_attention/{query,key,value,out}
    model.*.layers.#.self_attn_layer_norm        */layers/#/residuals/0/norm
    model.*.layers.#.{fc1,fc2}                   */layers/#/feed_forward/{expand,contract}
    model.*.layer_norm                           */final_norm
    model.*.layernorm_embedding                  @_embedding_norm
    model.*.embed_positions.weight               @_position/embedding
    final_logits_bias                            logits_bias
    """,
    encoder="model.*.layers.#.final_layer_norm */layers/#/residuals/1/norm",
    decoder="""
    model.*.layers.#.encoder_attn.{q,k,v,out}_proj */layers/#/cross_attention/{query,key,value,out}
    model.*.layers.#.encoder_attn_layer_norm       */layers/#/residuals/1/norm
    model.*.layers.#.final_layer_norm              */layers/#/residuals/2/norm
    """,
)
FF = "{expand,expand,gate,contract}"  # without a gate, the first is wi
T5 = Naming(
    both="""
    *.block.#.layer.0.SelfAttention.{q,k,v,o}    */layers/#/self_attention/{query,key,value,out}
    *.block.#.layer.0.SelfAttention.relative_attention_bias.weight  @_position/#/embedding
    *.block.0.layer.0.SelfAttention.relative_attention_bias.weight  @_position/embedding
    *.block.#.layer.{0,1}.layer_norm             */layers/#/residuals/{0,1}/norm
    *.final_layer_norm                           */final_norm
    """,
    encoder=f"*.block.#.layer.1.DenseReluDense.{{wi,wi_0,wi_1,wo}} */layers/#/feed_forward/{FF}",
    decoder=f"""
    *.block.#.layer.1.EncDecAttention.{{q,k,v,o}} */layers/#/cross_attention/{{query,key,value,out}}
    *.block.#.layer.2.layer_norm                  */layers/#/residuals/2/norm
    *.block.#.layer.2.DenseReluDense.{{wi,wi_0,wi_1,wo}}  */layers/#/feed_forward/{FF}
    """,
)
# Keys of config.json, and the knobs of `ModelConfig` that hold their values.
BART_KEYS = {"d_model": "d_model", "encoder_layers": "num_layers"}
BART_KEYS |= {"decoder_layers": "decoder_layers", "encoder_attention_heads": "num_heads"}
BART_KEYS |= {"decoder_attention_heads": "num_heads", "encoder_ffn_dim": "d_ff"}
BART_KEYS |= {"decoder_ffn_dim": "d_ff", "activation_function": "feed_forward"}
BART_KEYS |= {"scale_embedding": "embedding_scale", "max_position_embeddings": "max_length"}
BART_KEYS |= {"dropout": "dropout_rate", "attention_dropout": "attention_dropout_rate"}
BART_KEYS |= {"activation_dropout": "ff_dropout_rate"}
MT5_KEYS = {"d_model": "d_model", "d_kv": "d_k", "d_ff": "d_ff", "num_layers": "num_layers"}
MT5_KEYS |= {"num_decoder_layers": "decoder_layers", "num_heads": "num_heads"}
MT5_KEYS |= {"feed_forward_proj": "feed_forward", "dropout_rate": "dropout_rate"}
MT5_KEYS |= {"relative_attention_num_buckets": "relative_buckets"}
MT5_KEYS |= {"relative_attention_max_distance": "relative_distance"}
MT5_KEYS |= {"layer_norm_epsilon": "norm_epsilon"}
T5_KEYS = MT5_KEYS | {"scale_decoder_outputs": "logits_scale"}
# Keys of generation_config.json, and knobs of `DecodingConfig`.
SEARCH_KEYS = {"num_beams": "beam_size", "length_penalty": "length_penalty"}
SEARCH_KEYS |= {"renormalize_logits": "renormalize"}
SEARCH_KEYS |= {key: key for key in ("no_repeat_ngram_size", "repetition_penalty")}
# The same for what changes outputs and decoding here cannot do; the value that changes nothing.
UNSUPPORTED = {"num_beam_groups": 1, "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0}
UNSUPPORTED |= {"encoder_no_repeat_ngram_size": 0, "begin_suppress_tokens": None}
UNSUPPORTED |= {"forced_decoder_ids": None, "sequence_bias": None, "guidance_scale": None}
UNSUPPORTED |= {"exponential_decay_length_penalty": None, "penalty_alpha": None}
UNSUPPORTED |= {"dola_layers": None}
# Tensors of a file that may hold nothing of their own; those of position tables may be computed.
IGNORED = {"final_logits_bias", "model.encoder.version", "model.decoder.version"}
IGNORED |= {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
IGNORED |= {f"model.{stack}.embed_positions.weight{s}" for stack in SIDES for s in ("", "s")}
# Names of activations; the first of several with the same value is written.
PLAIN = {"relu": "relu", "gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
PLAIN |= {"swish": "swish", "silu": "swish"}
GATED = PLAIN | {"gated-gelu": "geglu", "gated-gelu_new": "geglu", "gated-silu": "swiglu"}
GATED |= {"gated-relu": "reglu"}


class Family(NamedTuple):
    """A class of models: its tensors' names, its config's keys, the knobs that it fixes."""

    head: str  # the name of the class
    naming: Naming
    keys: Mapping[str, str]
    activations: Mapping[str, str]
    knobs: Values
    forced_eos: int | None = None  # the default of `forced_eos_token_id`


LAYER = {"norm": "layer", "norm_epsilon": 1e-5, "attention_bias": True, "logits_bias": True}
POST, PRE = LAYER | {"norm_placement": "post"}, LAYER | {"norm_placement": "pre"}
SINUSOIDS = {"position_encoding": "sinusoidal", "sinusoid_layout": "halves"}
LEARNED = {"position_encoding": "learned", "position_offset": 2, "embedding_norm": True}
M2M100 = PRE | SINUSOIDS | {"sinusoid_rates": "tensor2tensor", "logits_bias": False}
RMS = {"norm": "rms", "position_encoding": "relative", "ff_bias": False, "scale_gated": False}
RMS |= {"attention_scale": 1.0, "embedding_scale": 1.0}
HEAD = "ForConditionalGeneration"
# Several may hold a model here; the first is exported, so PEGASUS follows M2M100.
FAMILIES = {
    "marian": Family("MarianMTModel", BART, BART_KEYS, PLAIN, POST | SINUSOIDS),
    "m2m_100": Family(f"M2M100{HEAD}", BART, BART_KEYS, PLAIN, M2M100),
    "pegasus": Family(f"Pegasus{HEAD}", BART, BART_KEYS, PLAIN, PRE | SINUSOIDS, 1),
    "bart": Family(f"Bart{HEAD}", BART, BART_KEYS, PLAIN, POST | LEARNED, 2),
    "mbart": Family(f"MBart{HEAD}", BART, BART_KEYS, PLAIN, PRE | LEARNED, 2),
    "t5": Family(f"T5{HEAD}", T5, T5_KEYS, GATED, RMS),
    "mt5": Family(f"MT5{HEAD}", T5, MT5_KEYS, GATED, RMS),
    "umt5": Family(f"UMT5{HEAD}", T5, T5_KEYS, GATED, RMS | {"relative_per_layer": True}),
}
# The position encodings that a file may hold as a table.
POSITIONS = {"marian": ("learned",), "pegasus": ("none", "sinusoidal", "learned")}


def read(folder: Path, tokenizer: Path | None) -> Imported:
    """Returns the model in `folder`; `tokenizer` is a SentencePiece model that it lacks.

    Raises:
      UserError: the class or a setting is not supported, or a file lacks something.
    """
    config = read_json(folder / "config.json")
    name = config.get("model_type")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{folder}: model_type {name} is not supported; these are: {known}")
    family, tensors = FAMILIES[name], open_tensors(folder)
    # What old files leave out. Of T5 only 1.0 scales its logits, and its tables are tied.
    old: Values = {"feed_forward_proj": "relu", "relative_attention_max_distance": 128}
    old |= {"dropout": 0.1, "dropout_rate": 0.1, "attention_dropout": 0.0}
    old |= {"activation_dropout": 0.0}
    old["scale_decoder_outputs"] = config.get("tie_word_embeddings") is not False
    config = generation = old | {"forced_eos_token_id": family.forced_eos} | config
    if (path := folder / "generation_config.json").is_file():
        ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        generation = {key: config.get(key) for key in ids}
        generation |= {key: value for key, value in read_json(path).items() if value is not None}
    tables = _tables(family, tensors, config)
    values = {table: tensors[table] for table in tables}  # each is read once
    knobs: Values = knobs_of(family, config) | _knobs_of_tensors(name, tensors)
    knobs["tie_embeddings"] = tied(*(values[each] for each in tables))
    size = required(config, "vocab_size")
    sizes = size, config.get("decoder_vocab_size") or size
    shapes = Model(ModelConfig(**knobs), *sizes).shapes
    depths = dict(zip(SIDES, (knobs["num_layers"], knobs["decoder_layers"]), strict=True))
    layout = expand(family.naming, depths, shapes)
    layout |= {name: (ours,) for name, ours in zip(tables, TABLES, strict=False) if ours in shapes}
    layout = find(layout, tensors, {*IGNORED, *table_names(family)})
    tokenizers = tokenizer_files.read(folder, config, _token_ids(generation), sizes, tokenizer)
    return Imported(name, knobs, _decoding(generation), tokenizers, layout, tensors)


def knobs_of(family: Family, config: Values) -> Values:
    """The knobs that the class and config.json tell; tensors tell the others."""
    knobs, words = dict(family.knobs), words_of(family, config)
    for key, knob in family.keys.items():
        value = config.get(key)
        if value is None:
            value = knobs["num_layers"] if knob == "decoder_layers" else required(config, key)
        if knob in words and value not in words[knob]:
            known = ", ".join(map(str, words[knob]))
            raise UserError(f"config.json: {key}={value} is none of {known}")
        value = words[knob][value] if knob in words else value
        if knobs.setdefault(knob, value) != value:
            problem = f"config.json has {key}={value}, and {knobs[knob]} in the other stack"
            raise UserError(f"{problem}: model.{knob} holds both, which must be equal")
    if "sinusoid_rates" in knobs:  # M2M100
        knobs["position_offset"] = required(config, "pad_token_id") + 1
    return knobs


def words_of(family: Family, config: Values) -> dict[str, dict[Any, Any]]:
    """The values of some keys of config.json as those of the knobs that hold them."""
    words: dict[str, dict[Any, Any]] = {"feed_forward": {**family.activations}}
    words["embedding_scale"] = {True: None, False: 1.0}
    if "scale_decoder_outputs" in family.keys:
        words["logits_scale"] = {True: required(config, "d_model") ** -0.5, False: 1.0}
    return words


def required(config: Values, key: str) -> Any:
    """The value of a key."""
    if config.get(key) is None:
        raise UserError(f"config.json lacks {key}: take that of the original model")
    return config[key]


def table_names(family: Family) -> tuple[str, str, str, str]:
    """The names of tables of embeddings: of the source, the target, both, and the logits."""
    prefix = "" if family.naming is T5 else "model."
    source, target = (f"{prefix}{stack}.embed_tokens.weight" for stack in SIDES)
    return source, target, f"{prefix}shared.weight", "lm_head.weight"


def _tables(family: Family, tensors: Tensors, config: Values) -> list[str]:
    """The names of the tables of source, target and logits in a file.

    The file holds a tied table once, under any of its names, or several times.
    """
    source, target, shared, logits = table_names(family)
    both = [] if config.get("share_encoder_decoder_embeddings") is False else [shared, source]
    orders = [source, shared, target, logits], [target, *both, logits], [logits, target, *both]
    found = [next((each for each in order if each in tensors), None) for order in orders]
    if None in found:
        raise UserError(f"the weights lack {shared}: take the files of one whole model")
    return [name for name in found if name]


def _knobs_of_tensors(name: str, tensors: Tensors) -> Values:
    """The knobs that depend on what is in a tensor."""
    bias, knobs = "final_logits_bias", {}
    if FAMILIES[name].naming is BART:
        knobs["logits_bias"] = bias in tensors and bool(np.any(tensors[bias]))
    names = [f"model.{stack}.embed_positions.weight" for stack in SIDES]
    stored = [tensors[each] for each in names if each in tensors and name in POSITIONS]
    return knobs | (position_knobs(*stored) if stored else {})


def _token_ids(generation: Values) -> TokenIds:
    """The ids of tokens with a role; that of unknown tokens is the tokenizer's."""

    def one(key: str) -> Any:
        value = generation.get(key)
        if isinstance(value, list) and len(value) != 1:
            raise UserError(f"{key}={value}: outputs begin and end in one way here; keep one")
        return value[0] if isinstance(value, list) else value

    words = generation.get("bad_words_ids") or ()
    if long := [word for word in words if len(word) != 1]:
        raise UserError(f"bad_words_ids has {long[0]}, not a single token: remove it")
    banned = {*(generation.get("suppress_tokens") or ()), *(word[0] for word in words)}
    pad, _ = (required(generation, key) for key in ("pad_token_id", "eos_token_id"))
    bos, eos = generation.get("bos_token_id"), one("eos_token_id")
    start = generation.get("decoder_start_token_id")
    start = required(generation, "bos_token_id") if start is None else start
    forced = one("forced_bos_token_id"), one("forced_eos_token_id"), tuple(sorted(banned))
    # Models that have no BOS, such as those of OPUS-MT, may call another token so.
    return TokenIds(pad, eos, start, None if bos in (pad, eos) else bos, None, *forced)


def _decoding(generation: Values) -> Values:
    """The knobs of `DecodingConfig` with which decoding gives the outputs of `generate`."""
    for key, neutral in UNSUPPORTED.items():
        if generation.get(key, neutral) not in (neutral, None, [], {}):
            value = f"{key}={generation[key]}"
            raise UserError(f"generation_config.json: {value} is not supported; remove it")
    given = {"length_penalty": 1.0} | {k: v for k, v in generation.items() if v is not None}
    said = [(key, knob) for key, knob in SEARCH_KEYS.items() if key in given]
    knobs: Values = {knob: type(getattr(GREEDY, knob))(given[key]) for key, knob in said}
    knobs["early_stopping"] = str(given.get("early_stopping", False)).lower()
    # Their lengths count the start token, except max_new_tokens.
    knobs["max_length"] = given.get("max_new_tokens") or given.get("max_length", 20) - 1
    knobs["min_length"] = max(0, given.get("min_length", 0) - 1)
    return BEAMS | knobs
