"""`read`, a model folder of CTranslate2 in the words of this code; needs no CTranslate2."""

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from transformer.errors import UserError, explained
from transformer.interop.ctranslate2 import NAMING
from transformer.interop.layout import (
    BEAMS,
    COMPUTED,
    SIDES,
    Imported,
    Tensors,
    Values,
    count_layers,
    expand,
    find,
    infer_knobs,
    position_knobs,
    tied,
)
from transformer.interop.readers import LazyTensors, plain_tokenizers, read_json, token_ids
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

Reads = dict[str, Callable[[], np.ndarray]]  # of variables, by name

VERSIONS = (5, 6)  # of the file format
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: jnp.bfloat16}
# Their activation, ungated and gated, as `feed_forward`.
ACTIVATIONS = {
    0: ("relu", "reglu"),
    1: ("gelu", "geglu"),
    2: ("swish", "swiglu"),
    3: ("gelu_erf", None),
    6: (None, "glu"),
}
PADS = ("<pad>", "<blank>", "[PAD]")
PADDING = "<padding>"  # added where a vocabulary has none
NEVER = -1e9  # the logit of a token that the softmax leaves out
TABLES = ["encoder/embeddings_0/weight", "decoder/embeddings/weight", "decoder/projection/weight"]
BIAS = "decoder/projection/bias"
POSITIONS = [f"{stack}/position_encodings/encodings" for stack in SIDES]
# Variables that say what a knob says, or nothing that outputs depend on.
SCALARS = re.compile(
    "(num_heads|num_heads_kv|head_dim|multi_query_attention|pre_norm|activation|embeddings_merge|"
    "scale_embeddings|scale_outputs|queries_scale|rotary_dim|rotary_base|rotary_interleave|"
    "relative_attention_max_distance|start_from_zero_embedding|alignment_layer|alignment_heads|"
    "with_source_bos|with_source_eos|with_target_bos|alibi_use_positive_positions|scale_alibi|alibi"
    "|weight_scale)"
)
NEUTRAL = {"rotary_interleave": 0, "alibi": 0}  # those in which another value is refused
# What Translator does unless it is told otherwise.
DECODING: Values = BEAMS | {"beam_size": 2, "length_penalty": 1.0, "early_stopping": "true"}
DECODING |= {"max_length": 256, "min_length": 1}
DEFAULTS: Values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def read_variables(path: Path) -> Reads:
    """Returns what maps each variable of `model.bin` from the file when it is called."""
    with explained(f"{path} cannot be read ({{reason}})", OSError):
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read_variables(file, path, size)


def _read_variables(file: BinaryIO, path: Path, size: int) -> Reads:
    def take(length: int) -> bytes:
        if len(raw := file.read(length)) < length:
            raise UserError(f"{path} is truncated; copy it again")
        return raw

    def number(kind: str) -> int:
        return int(np.frombuffer(take(np.dtype(kind).itemsize), kind)[0])

    def text() -> str:
        with explained(f"{path} is damaged; copy it again", UnicodeDecodeError):
            return take(number("<u2")).rstrip(b"\0").decode()

    if (version := number("<u4")) not in VERSIONS:
        raise UserError(f"{path} has version {version}, not {VERSIONS}: convert again")
    kind, _ = text(), number("<u4")
    if kind != "TransformerSpec":
        raise UserError(f"{path} holds a {kind}, not a TransformerSpec: an encoder-decoder")
    found: Reads = {}
    for _ in range(number("<u4")):
        name = text()
        shape = tuple(number("<u4") for _ in range(number("u1")))
        dtype, length = DTYPES.get(number("u1")), number("<u4")
        if dtype is None or length != math.prod(shape) * np.dtype(dtype).itemsize:
            raise UserError(f"{path} is damaged at {name}; copy it again")
        if shape and dtype == "<i2":
            raise UserError(f"{path} has int16 weights: convert again with int8 or float32")
        found[name] = partial(np.memmap, path, dtype, "r", file.tell(), shape)
        if file.seek(length, 1) > size:
            raise UserError(f"{path} is truncated; copy it again")
    for _ in range(number("<u4")):
        alias, name = text(), text()
        found[alias] = found[name]
    return found


def _float(raw: Reads, name: str) -> np.ndarray:
    """The float32 array of a weight; int8 ones have a scale for each row."""
    value = raw[name]()
    if value.dtype != np.int8:
        return value
    return value.astype(np.float32) / raw[f"{name}_scale"]()[:, None]


def read(folder: Path, tokenizer: Path | None) -> Imported:
    """Returns the model in `folder`; `tokenizer` is a SentencePiece model, see `plain_tokenizers`.

    Raises:
      UserError: the folder is incomplete or damaged, or our model has no such part.
    """
    raw, config = read_variables(folder / "model.bin"), dict(DEFAULTS)
    if (file := folder / "config.json").is_file():
        config |= read_json(file)
    pieces = {side: _vocabulary(folder, side) for side in SIDES.values()}
    last = {name: name.rpartition("/")[2] for name in raw}
    scalars = {name: raw[name]() for name in raw if SCALARS.fullmatch(last[name])}
    reads: Reads = {name: partial(_float, raw, name) for name in raw if name not in scalars}
    zero = bool(np.any(scalars.get("decoder/start_from_zero_embedding", 0)))
    pads = [next((each for each in PADS if each in own), None) for own in pieces.values()]
    if zero or None in pads:
        reads = {name: partial(_padded, read, name) for name, read in reads.items()}
        rows = len(pieces["target"])
        reads.setdefault(BIAS, lambda: np.append(np.zeros(rows, np.float32), NEVER))
        pads = [PADDING, PADDING]
        pieces = {side: [*own, PADDING] for side, own in pieces.items()}
    tensors = LazyTensors(reads)
    knobs = _knobs(tensors, scalars, config)
    model = Model(ModelConfig(**knobs), len(pieces["source"]), len(pieces["target"]))
    depths = count_layers(NAMING, tensors)
    layout = find(expand(NAMING, depths, model.shapes), tensors, {*TABLES, *POSITIONS})
    start = config.get("decoder_start_token") or config["bos_token"]
    others = config["bos_token"], config["unk_token"]
    ids = {}
    for (side, own), pad in zip(pieces.items(), map(str, pads), strict=True):
        first = pad if zero or side == "source" else start  # a source has none
        ids[side] = token_ids(own, pad, config["eos_token"], first, *others)
    eos = config.get("add_source_eos", np.any(scalars.get("encoder/with_source_eos", 0)))
    tokenizers = plain_tokenizers(pieces, ids, tokenizer, source_eos=bool(eos))
    return Imported("Transformer", knobs, dict(DECODING), tokenizers, layout, tensors)


def _padded(read: Callable[[], np.ndarray], name: str) -> np.ndarray:
    """A variable with a row for padding: zeros in tables, and a bias that rules it out."""
    value = read()
    if name in TABLES:
        return np.concatenate([value, np.zeros_like(value[:1])])
    return np.append(value, np.float32(NEVER)) if name == BIAS else value


def _vocabulary(folder: Path, side: str) -> list[str]:
    """The pieces of a side by id."""
    for name in ("shared", side):
        if (path := folder / f"{name}_vocabulary.json").is_file():
            with explained(f"{path} is damaged ({{reason}})", ValueError):
                return json.loads(path.read_text(encoding="utf-8"))
        if (path := folder / f"{name}_vocabulary.txt").is_file():  # of version 5
            return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    raise UserError(f"{folder} lacks its vocabulary files; copy the whole folder")


def _knobs(tensors: LazyTensors, scalars: Tensors, config: Mapping[str, Any]) -> Values:
    """The knobs of `ModelConfig`."""

    def number(name: str, default: int) -> float:
        values = {float(scalars.get(f"{stack}/{name}", default)) for stack in SIDES}
        if len(values) > 1:
            raise UserError(f"encoder and decoder differ in {name}: one knob holds both")
        return values.pop()

    for name, value in scalars.items():
        last = name.rpartition("/")[2]
        if value.size == 1 and last in NEUTRAL and float(value) != NEUTRAL[last]:
            raise UserError(f"{name} is {value}: a Transformer here cannot have it")
    first, depths = "encoder/layer_0", count_layers(NAMING, tensors)
    heads, pre = int(number("num_heads", 8)), bool(number("pre_norm", 1))
    knobs = infer_knobs(tensors, expand(NAMING, depths), heads, pre=pre)
    activation = int(number("activation", 0))
    gated = f"{first}/ffn/linear_0_noact/weight" in tensors
    if (kind := ACTIVATIONS.get(activation, (None, None))[gated]) is None:
        raise UserError(f"activation {activation} of the feed-forward is not supported")
    scale = number("scale_embeddings", 1)
    exact = scalars.get("encoder/scale_embeddings", np.int8(1)).dtype == np.float32
    attention = scalars.get(f"{first}/self_attention/queries_scale")
    epsilon = 1e-6 if knobs["norm"] == "rms" else 1e-5
    return knobs | {
        "num_layers": depths["encoder"],
        "decoder_layers": depths["decoder"],
        "feed_forward": kind,
        "attention_scale": None if attention is None else float(attention),
        "norm_epsilon": config.get("layer_norm_epsilon") or epsilon,
        "embedding_scale": scale if exact else None if scale else 1.0,
        "logits_scale": float(scalars.get("decoder/scale_outputs", 0.0)) or 1.0,
        "tie_embeddings": tied(*(tensors[name] for name in TABLES)),
        **_positions(tensors, scalars, depths),
    }


def _positions(tensors: LazyTensors, scalars: Tensors, depths: Mapping[str, int]) -> Values:
    """The knobs of the position encoding."""
    own = "/layer_{}/self_attention/"
    if (first := f"encoder{own.format(0)}relative_attention_bias") in tensors:
        one_table = all(
            np.array_equal(tensors[first.replace("encoder", stack)], tensors[name])
            for stack, depth in depths.items()
            for layer in range(depth)
            if (name := f"{stack}{own.format(layer)}relative_attention_bias") in tensors
        )
        distance = scalars[first.replace("bias", "max_distance")]
        return {
            "position_encoding": "relative",
            "relative_buckets": len(tensors[first]),
            "relative_distance": int(distance),
            "relative_per_layer": not one_table,
        }
    if f"encoder{own.format(0)}rotary_dim" in scalars:
        base = scalars.get(f"encoder{own.format(0)}rotary_base", 10_000.0)
        return {"position_encoding": "rotary", "rotary_base": float(base)}
    if not all(name in tensors for name in POSITIONS):  # Translator computes these
        return COMPUTED[-1]
    return position_knobs(*(tensors[name] for name in POSITIONS))
