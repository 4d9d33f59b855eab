"""`read`, a model folder of CTranslate2 in the words of this code; needs no CTranslate2."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from transformer.errors import UserError, explained
from transformer.interop.ctranslate2 import SIDES, layout, position_table
from transformer.interop.layout import TABLES, check_names, to_ours
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

Variables = dict[str, np.ndarray]
Values = dict[str, Any]

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
NEVER = -1e9  # the logit of a token that the softmax leaves out
# Variables that say what a knob says, or nothing that outputs depend on.
SCALARS = (
    "num_heads num_heads_kv head_dim multi_query_attention pre_norm activation embeddings_merge "
    "scale_embeddings scale_outputs queries_scale rotary_dim rotary_base rotary_interleave "
    "relative_attention_max_distance start_from_zero_embedding alignment_layer alignment_heads "
    "with_source_bos with_source_eos with_target_bos alibi_use_positive_positions scale_alibi alibi"
)
NEUTRAL = {"rotary_interleave": 0, "alibi": 0}  # those in which another value is refused
# What Translator does unless it is told otherwise.
DECODING = {
    "beam_size": 2,
    "penalty": "length",
    "length_penalty": 1.0,
    "early_stopping": "true",
    "unfinished": "equal",
    "decode_margin": 2**16,
    "max_length": 256,
    "min_length": 1,
}
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class CTranslate2Model:
    """A folder's model in our terms; token ids are theirs."""

    knobs: Values  # of ModelConfig
    decoding: Values  # knobs of DecodingConfig
    pieces: dict[str, list[str]]  # of source and target, by id
    ids: dict[str, Values]  # the fields of `TokenIds` for source and target
    source_eos: bool  # whether Translator adds EOS to a source; if not, its tokens may have one
    variables: Variables = field(repr=False)

    def params(
        self, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the names and values of our parameters.

        `shapes` are theirs, and `rows` maps source and target to their id of each of our ids.
        """
        done = set()
        for theirs, ours in layout(ModelConfig(**self.knobs)).items():
            if ours[0] not in shapes or ours[0] in done or theirs not in self.variables:
                continue
            sizes = [_rows(name, shapes[name]) for name in ours]
            value = as_float(self.variables, theirs)
            if len(value) != sum(sizes):
                raise UserError(f"{theirs} has {len(value)} rows, not {sum(sizes)}: convert again")
            parts = np.split(value, np.cumsum(sizes)[:-1])
            for name, part in zip(ours, parts, strict=True):
                side = TABLES.get(name)
                yield name, to_ours(part, name, shapes[name], rows[side] if side else None)
            done |= {*ours}


def _rows(name: str, shape: tuple[int, ...]) -> int:
    """The length of a tensor's first axis there."""
    if name.endswith("/kernel"):
        return shape[-1] if name.endswith("/out/kernel") else int(np.prod(shape[1:]))
    return int(np.prod(shape)) if name.endswith("/bias") else shape[0]


def read_variables(path: Path) -> Variables:
    """Returns the variables of `model.bin`, mapped from the file; aliases are the same arrays."""
    with explained(f"{path} cannot be read ({{reason}})", OSError, ValueError):
        data, place = np.memmap(path, np.uint8, "r"), 0

    def take(size: int) -> np.ndarray:
        nonlocal place
        if place + size > len(data):
            raise UserError(f"{path} is truncated; copy it again")
        place += size
        return data[place - size : place]

    def number(kind: str) -> int:
        return int(take(np.dtype(kind).itemsize).view(kind)[0])

    def text() -> str:
        with explained(f"{path} is damaged; copy it again", UnicodeDecodeError):
            return bytes(take(number("<u2"))).rstrip(b"\0").decode()

    if (version := number("<u4")) not in VERSIONS:
        raise UserError(f"{path} has version {version}, not {VERSIONS}: convert again")
    kind, _ = text(), number("<u4")
    if kind != "TransformerSpec":
        raise UserError(f"{path} holds a {kind}, not a TransformerSpec: an encoder-decoder")
    found: Variables = {}
    for _ in range(number("<u4")):
        name = text()
        shape = tuple(number("<u4") for _ in range(number("u1")))
        if (dtype := DTYPES.get(number("u1"))) is None:
            raise UserError(f"{path} is damaged at {name}; copy it again")
        raw = take(number("<u4"))
        if raw.nbytes != np.prod(shape, dtype=int) * np.dtype(dtype).itemsize:
            raise UserError(f"{path} is damaged at {name}; copy it again")
        if shape and dtype == "<i2":
            raise UserError(f"{path} has int16 weights: convert again with int8 or float32")
        found[name] = raw.view(dtype).reshape(shape)
    for _ in range(number("<u4")):
        alias, name = text(), text()
        found[alias] = found[name]
    return found


def as_float(variables: Variables, name: str) -> np.ndarray:
    """The float32 array of a weight; int8 ones have a scale for each row."""
    value = variables[name]
    if value.dtype == np.int8:
        return value.astype(np.float32) / variables[f"{name}_scale"].astype(np.float32)[:, None]
    return np.asarray(value, np.float32)


def read(path: Path) -> CTranslate2Model:
    """Returns the model in a folder, or of its `model.bin`.

    Raises:
      UserError: the folder is incomplete or damaged, or our model has no such part.
    """
    folder = path if path.is_dir() else path.parent
    variables, config = read_variables(folder / "model.bin"), dict(DEFAULTS)
    if (file := folder / "config.json").is_file():
        with explained(f"{file} is damaged ({{reason}})", ValueError):
            config |= json.loads(file.read_text(encoding="utf-8"))
    pieces = _vocabularies(folder)
    ids = {side: _ids(own, config) for side, own in pieces.items()}
    start = config.get("decoder_start_token") or config["bos_token"]
    ids["target"]["start"] = _index(pieces["target"], start, "decoder_start_token")
    knobs = _knobs(variables, config)
    if any(each["pad"] is None for each in ids.values()) or _flag(variables, "decoder", ZERO):
        _add_padding(variables, pieces, ids, _flag(variables, "decoder", ZERO))
        knobs["logits_bias"] = True
    for side, each in ids.items():
        each["start"] = each["pad"] if side == "source" else each["start"]
        each["banned"] = tuple(sorted({each["pad"], each["bos"]} - {None}))
    model = Model(ModelConfig(**knobs), len(pieces["source"]), len(pieces["target"]))
    named = layout(model.config)
    held = {name: ours for name, ours in named.items() if ours[0] in model.shapes}
    weights = [name for name in variables if not name.endswith("weight_scale")]
    found = {name: None for name in weights if name.rpartition("/")[2] not in SCALARS.split()}
    tables = {f"{stack}/position_encodings/encodings" for stack in SIDES}
    check_names(found, held, frozenset(tables))
    eos = bool(config.get("add_source_eos", _flag(variables, "encoder", "with_source_eos")))
    return CTranslate2Model(knobs, dict(DECODING), pieces, ids, eos, variables)


ZERO = "start_from_zero_embedding"


def _flag(variables: Variables, stack: str, name: str) -> bool:
    return bool(np.any(variables.get(f"{stack}/{name}", 0)))


def _vocabularies(folder: Path) -> dict[str, list[str]]:
    """The pieces of source and target, the same list if they share one."""

    def load(name: str) -> list[str] | None:
        if (path := folder / f"{name}_vocabulary.json").is_file():
            with explained(f"{path} is damaged ({{reason}})", ValueError):
                return json.loads(path.read_text(encoding="utf-8"))
        if (path := folder / f"{name}_vocabulary.txt").is_file():  # of version 5
            return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        return None

    shared = load("shared")
    source, target = shared or load("source"), shared or load("target")
    if source is None or target is None:
        raise UserError(f"{folder} lacks its vocabulary files; copy the whole folder")
    return {"source": source, "target": source if source == target else target}


def _index(pieces: list[str], token: str, key: str) -> int:
    if token not in pieces:
        raise UserError(f"config.json: {key} {token} is not in the vocabulary: convert again")
    return pieces.index(token)


def _ids(pieces: list[str], config: Values) -> Values:
    """The fields of `TokenIds`, except `start` and `banned`; `pad` is None if there is none."""
    places = {piece: number for number, piece in enumerate(pieces)}
    return {
        "pad": next((places[each] for each in PADS if each in places), None),
        "eos": _index(pieces, config["eos_token"], "eos_token"),
        "bos": places.get(config["bos_token"]),
        "unk": places.get(config["unk_token"]),
        "forced_first": None,
        "forced_last": None,
    }


def _add_padding(
    variables: Variables, pieces: dict[str, list[str]], ids: dict[str, Values], starts: bool
) -> None:
    """Appends a row of zeros for padding to all tables, which the logits' bias rules out.

    Where the first embedding is zeros, outputs start with it.
    """
    name = "decoder/projection/bias"
    rows = len(variables["decoder/projection/weight"])
    variables[name] = np.append(variables.get(name, np.zeros(rows, np.float32)), np.float32(NEVER))
    pairs = ("encoder/embeddings_0", "decoder/embeddings", "decoder/projection")
    tables = {id(variables[f"{each}/weight"]): f"{each}/weight" for each in pairs}
    for same, name in tables.items():  # tied ones once
        value = as_float(variables, name)
        value = np.concatenate([value, np.zeros_like(value[:1])])
        for each in pairs:
            if id(variables[f"{each}/weight"]) == same:
                variables[f"{each}/weight"] = value
    padding = "<padding>"
    for own in {id(own): own for own in pieces.values()}.values():
        own.append(padding)
    for side, own in ids.items():
        own["pad"] = len(pieces[side]) - 1
    if starts:
        ids["target"]["start"] = ids["target"]["pad"]


def _knobs(variables: Variables, config: Values) -> Values:
    """The knobs of `ModelConfig`."""

    def has(name: str) -> bool:
        return f"{name}" in variables

    def number(name: str, default: int) -> float:
        values = {float(variables.get(f"{stack}/{name}", default)) for stack in SIDES}
        if len(values) > 1:
            raise UserError(f"encoder and decoder differ in {name}: one knob holds both")
        return values.pop()

    for name, value in variables.items():
        last = name.rpartition("/")[2]
        if value.size == 1 and last in NEUTRAL and float(value) != NEUTRAL[last]:
            raise UserError(f"{name} is {value}: a Transformer here cannot have it")
    depths = [_depth(variables, stack) for stack in SIDES]
    heads, first = int(number("num_heads", 8)), "encoder/layer_0"
    expand = variables[f"{first}/ffn/linear_0/weight"]
    width = variables["encoder/embeddings_0/weight"].shape[1]
    inner = variables[f"{first}/self_attention/linear_1/weight"].shape[1] // heads
    queries = variables[f"{first}/self_attention/linear_0/weight"].shape[0] // inner
    gated, both = has(f"{first}/ffn/linear_0_noact/weight"), has(f"{first}/input_layer_norm/gamma")
    placement = "both" if both else "pre" if number("pre_norm", 1) else "post"
    final = has("encoder/layer_norm/gamma")
    norm = f"{first}/input_layer_norm" if both else f"{first}/ffn/layer_norm"
    rms = not has(f"{norm}/beta")
    activation = int(number("activation", 0))
    if (kind := ACTIVATIONS.get(activation, (None, None))[gated]) is None:
        raise UserError(f"activation {activation} of the feed-forward is not supported")
    scale = number("scale_embeddings", 1)
    float_scale = variables.get("encoder/scale_embeddings", np.int8(1)).dtype == np.float32
    attention = variables.get(f"{first}/self_attention/queries_scale")
    epsilon = config.get("layer_norm_epsilon")
    return {
        "num_layers": depths[0],
        "decoder_layers": None if depths[0] == depths[1] else depths[1],
        "d_model": width,
        "num_heads": heads,
        "d_k": None if inner * heads == width else inner,
        "num_kv_heads": None if queries == 3 * heads else (queries - heads) // 2,
        "d_ff": expand.shape[0],
        "scale_gated": False,
        "feed_forward": kind,
        "ff_bias": has(f"{first}/ffn/linear_0/bias"),
        "attention_bias": has(f"{first}/self_attention/linear_0/bias"),
        "attention_scale": None if attention is None else float(attention),
        "norm": "rms" if rms else "layer",
        "norm_placement": placement,
        "final_norm": None if final == (placement != "post") else final,
        "norm_epsilon": epsilon or (1e-6 if rms else 1e-5),
        "embedding_scale": scale if float_scale else None if scale else 1.0,
        "embedding_norm": has("encoder/layernorm_embedding/gamma"),
        "logits_scale": float(variables.get("decoder/scale_outputs", 0.0)) or 1.0,
        "logits_bias": has("decoder/projection/bias"),
        "tie_embeddings": _ties(variables),
    } | _positions(variables)


def _depth(variables: Variables, stack: str) -> int:
    depth = 0
    while f"{stack}/layer_{depth}/ffn/linear_0/weight" in variables:
        depth += 1
    if not depth:
        raise UserError(f"model.bin has no layers of the {stack}: convert again")
    return depth


def _ties(variables: Variables) -> str:
    """The `tie_embeddings` of the tables that are the same array, or equal ones."""
    names = ("encoder/embeddings_0", "decoder/embeddings", "decoder/projection")
    source, target, logits = (variables[f"{name}/weight"] for name in names)
    inputs = source is target or np.array_equal(source, target)
    outputs = target is logits or np.array_equal(target, logits)
    ties = {(True, True): "all", (True, False): "inputs", (False, True): "target_output"}
    return ties.get((inputs, outputs), "none")


def _positions(variables: Variables) -> Values:
    """The knobs of the position encoding."""
    own = "encoder/layer_0/self_attention"
    if f"{own}/relative_attention_bias" in variables:
        layers = [
            [v for k, v in variables.items() if k.startswith(stack) and k.endswith("_bias")]
            for stack in SIDES
        ]
        layers = [[v for v in each if v.ndim == 2] for each in layers]
        same = all(np.array_equal(each[0], v) for each in layers for v in each)
        return {
            "position_encoding": "relative",
            "relative_buckets": layers[0][0].shape[0],
            "relative_distance": int(variables[f"{own}/relative_attention_max_distance"]),
            "relative_per_layer": not same,
        }
    if f"{own}/rotary_dim" in variables:
        base = float(variables.get(f"{own}/rotary_base", 10_000.0))
        return {"position_encoding": "rotary", "rotary_base": base}
    tables = [variables.get(f"{stack}/position_encodings/encodings") for stack in SIDES]
    if tables[0] is None or tables[1] is None:  # Translator computes these
        return SINUSOIDS[-1]
    rows, width = tables[0].shape
    for knobs in SINUSOIDS:
        like = position_table(ModelConfig(d_model=width, num_heads=1, **knobs), rows)
        if all(np.allclose(np.asarray(each, np.float32), like, atol=1e-5) for each in tables):
            return knobs
    return {"position_encoding": "learned", "max_length": rows}


def _sinusoidal(layout: str, rates: str, offset: int) -> Values:
    knobs = {"sinusoid_layout": layout, "sinusoid_rates": rates, "position_offset": offset}
    return {"position_encoding": "sinusoidal"} | knobs


SINUSOIDS: tuple[Values, ...] = (
    {"position_encoding": "none"},
    _sinusoidal("neighbours", "paper", 0),
    _sinusoidal("halves", "paper", 0),
    _sinusoidal("halves", "tensor2tensor", 2),
    _sinusoidal("halves", "tensor2tensor", 1),
)
