"""Export to Hugging Face Transformers: `find_class`, which can hold a model, and `export`."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import jax
import numpy as np

from transformer.data.imported import ImportedTokenizer
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.errors import UserError, explained
from transformer.inference.generation import TrainedModel
from transformer.interop import tokenizer_files
from transformer.interop.huggingface import (
    BART,
    FAMILIES,
    POSITIONS,
    SEARCH_KEYS,
    T5,
    Family,
    knobs_of,
    table_names,
    words_of,
)
from transformer.interop.layout import (
    SIDES,
    TABLES,
    Layout,
    Naming,
    Values,
    expand,
    position_table,
    to_theirs,
)
from transformer.modules.config import ModelConfig
from transformer.modules.layers import FEED_FORWARDS
from transformer.modules.model import Model
from transformer.modules.transformer import POSITION_KNOBS
from transformer.workdir import write_json

T5GEMMA = Naming(
    both="""
    model.*.layers.#.self_attn.{q,k,v,o}_proj  */layers/#/self_attention/{query,key,value,out}
    model.*.layers.#.{pre,post}_self_attn_layernorm    */layers/#/residuals/0/{norm,output_norm}
    model.*.layers.#.mlp.{gate,up,down}_proj   */layers/#/feed_forward/{expand,gate,contract}
    model.*.norm                               */final_norm
    """,
    encoder="""
    model.*.layers.#.{pre,post}_feedforward_layernorm  */layers/#/residuals/1/{norm,output_norm}
    """,
    decoder="""
    model.*.layers.#.cross_attn.{q,k,v,o}_proj */layers/#/cross_attention/{query,key,value,out}
    model.*.layers.#.{pre,post}_cross_attn_layernorm   */layers/#/residuals/1/{norm,output_norm}
    model.*.layers.#.{pre,post}_feedforward_layernorm  */layers/#/residuals/2/{norm,output_norm}
    """,
)
T5GEMMA_KEYS = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "head_dim": "d_k"}
T5GEMMA_KEYS |= {"num_key_value_heads": "num_kv_heads", "intermediate_size": "d_ff"}
T5GEMMA_KEYS |= {"hidden_activation": "feed_forward", "rms_norm_eps": "norm_epsilon"}
T5GEMMA_KEYS |= {"attention_bias": "attention_bias", "encoder": "num_layers"}
T5GEMMA_KEYS |= {"decoder": "decoder_layers", "rope_parameters": "rotary_base"}  # see `_nested`
T5GEMMA_KEYS |= {"dropout_rate": "dropout_rate", "attention_dropout": "attention_dropout_rate"}
SANDWICH = {"norm": "rms", "norm_placement": "both", "position_encoding": "rotary"}
SANDWICH |= {"ff_bias": False, "scale_gated": False}
GLU = {"gelu_pytorch_tanh": "geglu", "silu": "swiglu", "relu": "reglu"}
CLASSES = FAMILIES | {
    "t5gemma": Family("T5GemmaForConditionalGeneration", T5GEMMA, T5GEMMA_KEYS, GLU, SANDWICH)
}
Weights = dict[str, np.ndarray]  # our names
BIASES = ("attention_bias", "ff_bias", "logits_bias")  # a class that has them gets zeros
# Knobs that say nothing about what a trained model computes, or that are in the others.
UNSEEN = {"cell", "kernel_init", "scale_gated", "max_length", "separate_vocabularies", "dtype"}
UNSEEN |= {"qk_norm_epsilon", "attention_backend", "scan_layers", "remat", "dropout_rate"}
UNSEEN |= {"attention_dropout_rate", "ff_dropout_rate"}
PLACES = {*chain.from_iterable(each.values() for each in POSITION_KNOBS.values())}


def find_class(model: Model, pad: int = PAD) -> tuple[str, Values]:
    """Returns the name of the family whose class holds a model, and the values of config.json.

    A class holds what comes back when its config.json is written and read. `pad` is the id of
    padding there.

    Raises:
      UserError: no class does; it names the knobs that the nearest one has otherwise.
    """
    if model.config.architecture != "transformer":
        problem = f"Hugging Face has no class for model.architecture={model.config.architecture}"
        raise UserError(f"{problem}: train a transformer, or export with --to=stablehlo")
    hidden = model.shapes["encoder/layers/0/feed_forward/expand/kernel"].shape[1]
    own, found = _resolved(vars(model.config) | {"d_ff": hidden}), []
    for name, family in CLASSES.items():
        values = _values(family, own) | {"pad_token_id": pad}
        found.append((_faults(name, own, values), name, values))
    faults, name, values = min(found, key=lambda each: len(each[0]))
    if faults:
        problem = f"{CLASSES[name].head}, the nearest class, cannot hold {', '.join(faults)}"
        raise UserError(f"{problem}: train with what it has, or export with --to=stablehlo")
    return name, values


def _values(family: Family, own: Values) -> Values:
    """The values of config.json that are nearest to the knobs of a model."""
    words, values = words_of(family, own), {}
    for key, knob in family.keys.items():
        theirs = {ours: word for word, ours in reversed(words.get(knob, {}).items())}
        other = next(iter(words[knob])) if knob in words else own[knob]
        values[key] = theirs.get(own[knob], other)
    return values


def _faults(name: str, own: Values, values: Values) -> list[str]:
    """The knobs that are other ones when the class reads `values` and the tensors of a file."""
    held = vars(ModelConfig()) | {"tie_embeddings": own["tie_embeddings"]}
    held = _resolved(held | knobs_of(CLASSES[name], values))
    if CLASSES[name].naming is T5 and own["tie_embeddings"] != "all":  # one table for both sides
        held["tie_embeddings"] = "inputs"
    encoding = own["position_encoding"]
    unseen = UNSEEN | (PLACES - {*POSITION_KNOBS.get(encoding, {}).values()})
    unseen |= {knob for knob in BIASES if held[knob]}
    if encoding in POSITIONS.get(name, ()):
        unseen |= {"position_encoding", *PLACES}
    if name == "marian":  # the channels are permuted
        unseen.add("sinusoid_layout")
    names = [knob for knob in own if knob not in unseen and own[knob] != held[knob]]
    return [f"model.{knob}={own[knob]} (it has {held[knob]})" for knob in names]


def _resolved(knobs: Values) -> Values:
    """The knobs with what None stands for."""
    width = knobs["d_k"] or knobs["d_model"] // knobs["num_heads"]
    meaning = {
        "decoder_layers": knobs["num_layers"],
        "d_k": width,
        "d_v": width,
        "num_kv_heads": knobs["num_heads"],
        "final_norm": knobs["norm_placement"] != "post",
        "embedding_scale": knobs["d_model"] ** 0.5,
        "attention_scale": width**-0.5,
    }
    return knobs | {knob: value for knob, value in meaning.items() if knobs[knob] is None}


def export(model: TrainedModel, out: Path) -> None:
    """Writes the folder `out` for `AutoModelForSeq2SeqLM` and `AutoTokenizer`.

    Raises:
      UserError: no class can hold the model.
    """
    with explained("export to Hugging Face: pip install safetensors", ImportError):
        from safetensors.numpy import save_file
    ids, config = _token_ids(model), model.model.config
    name, values = find_class(model.model, ids["pad_token_id"])
    family, ties = CLASSES[name], config.tie_embeddings
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(_tensors(name, model)), out / "model.safetensors", metadata={"format": "pt"})
    values |= {"model_type": name, "architectures": [family.head], "is_encoder_decoder": True}
    values |= {"dtype": "float32", "vocab_size": model.model.vocab_size} | ids
    if family.naming is T5:  # of old, the key said whether logits are scaled; tensors tell ties
        values["tie_word_embeddings"] = values.get("scale_decoder_outputs", False)
    elif family.naming is BART:  # CTranslate2's converter needs the last two
        values["tie_word_embeddings"] = ties == "all"
        values["normalize_before"] = config.norm_placement == "pre"
        values["normalize_embedding"] = config.embedding_norm
    if name in ("marian", "t5gemma"):
        values["tie_word_embeddings"] = ties in ("all", "target_output")
        values["share_encoder_decoder_embeddings"] = ties == "all"
        values["decoder_vocab_size"] = model.model.target_vocab_size
    write_json(out / "config.json", _nested(values) if name == "t5gemma" else values)
    write_json(out / "generation_config.json", ids | _search(model))
    tokenizer_files.write(model.tokenizers, name, out)


def _nested(values: Values) -> Values:
    """The values of T5Gemma, which has a config for each stack."""
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values["rope_parameters"]}
    values |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    values["query_pre_attn_scalar"] = values["head_dim"]
    sizes = {"encoder": values["vocab_size"], "decoder": values.pop("decoder_vocab_size")}
    stacks: Values = {stack: (values.pop(stack), size) for stack, size in sizes.items()}
    for stack, (depth, size) in stacks.items():
        own = {"model_type": "t5_gemma_module", "vocab_size": size, "num_hidden_layers": depth}
        stacks[stack] = values | own | {"layer_types": ["full_attention"] * depth}
    return values | stacks


def _tensors(name: str, model: TrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, contiguous, by their names."""
    config, rows = model.model.config, {}
    sizes = model.model.vocab_size, model.model.target_vocab_size
    for side, tokenizer, size in zip(SIDES.values(), model.tokenizers, sizes, strict=True):
        theirs = tokenizer.theirs
        rows[side] = theirs if len(theirs) == size else np.arange(size)
    weights, naming = _weights(name, model), CLASSES[name].naming
    depths = {"encoder": config.num_layers, "decoder": config.decoder_depth()}
    unused = ".wi." if FEED_FORWARDS[config.feed_forward][1] else ".wi_0."
    layout = {x: y for x, y in expand(naming, depths, weights).items() if unused not in x}
    for theirs, (ours,) in (layout | _tables(name, config.tie_embeddings)).items():
        side = TABLES.get(ours)
        tensor = to_theirs(weights[ours], ours, None if side is None else rows[side])
        yield theirs, tensor[None] if ours == "logits_bias" else tensor


def _tables(name: str, ties: str) -> Layout:
    """The layout of tables of embeddings."""
    source, target, shared, logits = table_names(CLASSES[name])
    inputs, outputs, last = list(TABLES)[:3]
    logits = "lm_head.out_proj.weight" if name == "t5gemma" else logits
    if ties == "all" and name != "t5gemma":
        return {shared: (inputs,)}
    outputs = inputs if ties in ("all", "inputs") else outputs
    last = outputs if ties in ("all", "target_output") else last
    if CLASSES[name].naming is T5:
        return {shared: (inputs,), logits: (last,)}
    layout = {source: (inputs,), target: (outputs,)}
    if name not in ("marian", "t5gemma"):
        return layout | {shared: (inputs,), logits: (last,)}
    return layout if last == outputs else layout | {logits: (last,)}


def _weights(name: str, model: TrainedModel) -> Weights:
    """Our weights as the class needs them: with all its biases and tables of positions."""
    config, fixed = model.model.config, CLASSES[name].knobs
    biases = {knob: bool(fixed.get(knob, getattr(ModelConfig, knob))) for knob in BIASES}
    sizes = model.model.vocab_size, model.model.target_vocab_size
    like = Model(replace(config, **biases), *sizes)
    weights = {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in like.shapes.items()}
    weights |= {key: np.asarray(jax.device_get(x)) for key, x in model.variables.items()}
    if name == "t5gemma":  # its norms multiply by 1 + w
        weights |= {key: x - 1 for key, x in weights.items() if key.endswith("norm/scale")}
    if config.position_encoding in POSITIONS.get(name, ()):
        start, table = config.position_offset, position_table(config, config.max_length)
        for key in (f"{side}_position/embedding" for side in SIDES.values()):
            weights[key] = weights[key][start:] if key in weights else table
    positions = config.position_encoding, config.sinusoid_layout
    if name == "marian" and positions == ("sinusoidal", "neighbours"):
        width = config.d_model  # sines first
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        return {key: _permuted(x, like.axes[key], order) for key, x in weights.items()}
    return weights


def _permuted(value: np.ndarray, axes: tuple, order: np.ndarray) -> np.ndarray:
    """`value` with the channels of the residual stream in another order."""
    for number, axis in enumerate(axes):
        if axis in ("embed", "norm") and value.shape[number] == len(order):
            value = value.take(order, axis=number)
    return value


def _token_ids(model: TrainedModel) -> Values:
    """The ids of tokens with a role, as config.json and generation_config.json have them."""
    target = model.tokenizers.target
    theirs = target.theirs.tolist()
    roles = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": target.start}
    roles |= {"forced_bos_token_id": target.forced_first, "forced_eos_token_id": target.forced_last}
    ids = {key: None if own is None else theirs[own] for key, own in roles.items()}
    bos = target.roles.bos if isinstance(target, ImportedTokenizer) else BOS
    return ids | {"bos_token_id": bos}


def _search(model: TrainedModel) -> Values:
    """What generation_config.json says about decoding."""
    target, decoding = model.tokenizers.target, model.config.decoding
    longest = decoding.max_length or model.model.config.max_length
    values = {key: getattr(decoding, knob) for key, knob in SEARCH_KEYS.items()}
    stopping = {"true": True, "false": False}.get(decoding.early_stopping, "never")
    values["early_stopping"] = stopping if decoding.beam_size > 1 else False
    if decoding.penalty != "length" and decoding.length_penalty:  # there is no such penalty there
        for key in ("num_beams", "length_penalty", "early_stopping"):
            del values[key]
    values["max_length"] = longest + 1  # with the start token
    values["min_length"] = decoding.min_length + 1 if decoding.min_length else 0
    banned = [[int(target.theirs[own])] for own in target.banned]
    # The rows that pad the vocabulary are never outputs here.
    banned += [[row] for row in range(model.model.tokens, model.model.target_vocab_size)]
    return values | ({"bad_words_ids": banned} if banned else {})
