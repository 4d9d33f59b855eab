import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TOKENIZER, random_params, refused, small_model
from tests.test_average import make_run
from transformer import load
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.interop import ctranslate2, from_ctranslate2
from transformer.interop.layout import parameters
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model

PIECES = [ctranslate2.SPECIAL.get(i, piece) for i, piece in enumerate(TOKENIZER.pieces)]
KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}


def write(folder, variables, aliases=(), version=6, kind="TransformerSpec", pieces=PIECES):
    """Writes model.bin by its specification, and the vocabulary and config beside it."""

    def text(value):
        raw = value.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    parts = [struct.pack("<I", version), text(kind), struct.pack("<II", 7, len(variables))]
    for name, value in sorted(variables.items()):
        value = np.asarray(value)
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        parts += [text(name), shape, struct.pack("<BI", KINDS[str(value.dtype)], value.nbytes)]
        parts += [value.tobytes()]
    parts += [struct.pack("<I", len(aliases)), *map(text, sum(aliases, ()))]
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(b"".join(parts))
    if version == 5:
        (folder / "shared_vocabulary.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    else:
        (folder / "shared_vocabulary.json").write_text(json.dumps(pieces), encoding="utf-8")
        (folder / "config.json").write_text(
            json.dumps({"layer_norm_epsilon": 1e-6}), encoding="utf-8"
        )


def variables_of(model, weights):
    found = ctranslate2.variables(model.config, weights)
    heads, tied = np.int16(model.config.num_heads), "encoder/embeddings_0/weight"
    del found["decoder/embeddings/weight"], found["decoder/projection/weight"]
    found |= {"encoder/num_heads": heads, "decoder/num_heads": heads}
    return found, [(f"decoder/{name}/weight", tied) for name in ("embeddings", "projection")]


def read(folder):
    return from_ctranslate2.read(folder, None)


def params_of(found):
    """The model, and its parameters with the rows of the file."""
    sizes = {name: side.vocab_size for name, side in found.tokenizers._asdict().items()}
    model = Model(ModelConfig(**found.knobs), *sizes.values())
    shapes = {name: leaf.shape for name, leaf in model.shapes.items()}
    rows = {side: np.arange(size) for side, size in sizes.items()}
    params = dict(parameters(found.tensors, found.layout, shapes, rows))
    assert {name: value.shape for name, value in params.items()} == shapes
    return model, params


def small():
    model = small_model()
    model = Model(model.config, len(PIECES))
    return model, {name: np.asarray(x) for name, x in random_params(model, 0).items()}


@pytest.mark.parametrize("version", [5, 6])
def test_weights_and_knobs_are_those_in_the_file(version, tmp_path):
    model, weights = small()
    write(tmp_path, *variables_of(model, weights), version)
    found = read(tmp_path)
    source, target = found.tokenizers
    assert found.tokenizers.shared()
    assert source.pieces == PIECES
    assert (target.start, target.banned) == (BOS, (PAD, BOS))
    assert list(source.end) == [] if version == 5 else [EOS]  # its default is not to add EOS
    read_model, params = params_of(found)
    np.testing.assert_equal(params, weights)
    wanted = "d_model num_heads num_layers position_encoding norm norm_placement tie_embeddings"
    for knob in wanted.split():
        assert getattr(read_model.config, knob) == getattr(model.config, knob)
    assert read_model.config.norm_epsilon == (1e-5 if version == 5 else 1e-6)


@pytest.mark.parametrize("kind", ["int8", "float16", "bfloat16"])
def test_narrow_weights_are_read_as_float32(kind, tmp_path):
    model, weights = small()
    variables, aliases = variables_of(model, weights)
    for name, value in list(variables.items()):
        if not name.endswith("/weight"):
            continue
        if kind == "int8":
            scale = 127 / np.abs(value).max(1)
            variables[f"{name}_scale"] = scale.astype(np.float32)
            variables[name] = np.rint(value * scale[:, None]).astype(np.int8)
            aliases += [(f"{x}_scale", f"{y}_scale") for x, y in aliases if y == name]
        else:
            variables[name] = value.astype(jnp.dtype(kind))
    write(tmp_path, variables, aliases)
    params = params_of(read(tmp_path))[1]
    for name, value in weights.items():
        atol = np.abs(value).max() / (254 if kind == "int8" else 256)
        np.testing.assert_allclose(params[name], value, atol=atol * 1.01)


def test_a_vocabulary_without_padding_gets_a_row_that_the_softmax_leaves_out(tmp_path):
    model, weights = small()
    write(tmp_path, *variables_of(model, weights))
    names = json.dumps(["x", *PIECES[1:]])
    (tmp_path / "shared_vocabulary.json").write_text(names, encoding="utf-8")
    found = read(tmp_path)
    _, params = params_of(found)
    assert found.tokenizers.target.theirs[PAD] == len(PIECES)
    assert found.tokenizers.target.pieces[PAD] == "<padding>"
    assert not params["embedding/embedding"][-1].any()
    np.testing.assert_array_equal(
        params["embedding/embedding"][:-1], weights["embedding/embedding"]
    )
    assert not params["logits_bias"][:-1].any()
    assert params["logits_bias"][-1] < -1e6


def test_what_cannot_be_read_is_refused_in_a_line(tmp_path):
    model, weights = small()
    variables, aliases = variables_of(model, weights)
    write(tmp_path, variables, aliases)
    whole = (tmp_path / "model.bin").read_bytes()
    for size in (0, 3, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.bin").write_bytes(whole[:size])
        refused("is truncated|cannot be read", read, tmp_path)
    write(tmp_path, variables, aliases, kind="WhisperSpec")
    refused("holds a WhisperSpec, not a TransformerSpec", read, tmp_path)
    write(tmp_path, variables, aliases, version=4)
    refused("has version 4", read, tmp_path)
    name = "encoder/layer_0/self_attention/linear_0/weight"
    write(tmp_path, variables | {name: variables[name].astype(np.int16)}, aliases)
    refused("int16 weights", read, tmp_path)
    name = "encoder/layer_0/self_attention/q_norm/gamma"
    write(tmp_path, variables | {name: np.ones(8, np.float32)}, aliases)
    refused(f"no parameter holds {name}", read, tmp_path)
    write(tmp_path, variables | {"decoder/num_heads": np.int16(4)}, aliases)
    refused("encoder and decoder differ in num_heads", read, tmp_path)
    (tmp_path / "shared_vocabulary.json").unlink()
    refused("lacks its vocabulary files", read, tmp_path)


CONFIGS = [
    {},
    {"norm_placement": "both", "norm": "rms", "position_encoding": "rotary", "rotary_base": 500.0},
    {"position_encoding": "relative", "num_layers": 2, "relative_per_layer": True},
    {"position_encoding": "relative", "num_layers": 2, "scan_layers": True},
    {"position_encoding": "learned", "embedding_norm": True, "norm_placement": "post"},
    {"sinusoid_layout": "halves", "attention_bias": True, "logits_bias": True},
    {"position_encoding": "none", "feed_forward": "glu", "ff_bias": False, "num_kv_heads": 1},
    {"embedding_scale": 3.0, "attention_scale": 1.0, "logits_scale": 0.3, "decoder_layers": 3},
    {"final_norm": True, "norm_placement": "post", "tie_embeddings": "none", "d_k": 16},
    {"tie_embeddings": "target_output", "feed_forward": "gelu_erf", "final_norm": False},
]


@pytest.mark.oracle
@pytest.mark.parametrize("changes", CONFIGS)
def test_an_exported_model_is_read_back_bit_for_bit(changes, tmp_path, rng):
    pytest.importorskip("ctranslate2")
    knobs = {f"model.{name}": value for name, value in changes.items()}
    workdir, *_ = make_run(tmp_path / "run", rng, steps=(10,), **knobs)
    model, out = load(str(workdir.path)), tmp_path / "out"
    out.mkdir()
    ctranslate2.export(model, out)
    found = read(out)
    np.testing.assert_equal(
        params_of(found)[1], {k: np.asarray(v) for k, v in model.variables.items()}
    )
    for name, value in changes.items():
        if name not in ("scan_layers", "final_norm"):
            assert found.knobs[name] == pytest.approx(value), name
    assert ModelConfig(**found.knobs).norm_epsilon == model.config.model.norm_epsilon
