"""Our models, exported to Hugging Face's classes and imported again."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.hf_models import compare
from transformer.config import RunConfig, default_config
from transformer.data.corpus import Tokenizers
from transformer.data.tokenizer import SymbolTokenizer
from transformer.errors import UserError
from transformer.inference.generation import TrainedModel
from transformer.interop.huggingface_export import export, find_class
from transformer.interop.importing import import_run
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model
from transformer.parallel.mesh import one_device_mesh
from transformer.run import Run

SIZES = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 24, "max_length": 24}
SIZES["norm_epsilon"] = 1e-5
LEARNED = {"position_encoding": "learned"}
T5 = {"norm": "rms", "position_encoding": "relative", "ff_bias": False}
T5 |= {"attention_scale": 1.0, "embedding_scale": 1.0}
GEMMA = {"norm": "rms", "norm_placement": "both", "position_encoding": "rotary", "ff_bias": False}
POST = {"norm_placement": "post"}
MODELS = {
    "default": {},
    "bias": {"attention_bias": True, "logits_bias": True},
    "learned": {"feed_forward": "gelu", **LEARNED},
    "untied": {"tie_embeddings": "none", "decoder_layers": 3},
    "paper": {**POST, "attention_bias": True},
    "post learned": {**POST, **LEARNED, "tie_embeddings": "target_output"},
    "t5": {**T5, "d_k": 3, "logits_scale": 8**-0.5},
    "t5 gated": {**T5, "feed_forward": "geglu", "tie_embeddings": "inputs"},
    "t5gemma": {**GEMMA, "num_kv_heads": 1, "decoder_layers": 1, "feed_forward": "swiglu"},
    "t5gemma untied": {**GEMMA, "tie_embeddings": "none", "feed_forward": "geglu"},
}
CLASSES = ["Pegasus"] * 4 + ["Marian"] * 2 + ["T5For"] * 2 + ["T5Gemma"] * 2


def random_model(knobs, **sections) -> TrainedModel:
    """A model of characters with random variables, as if it were trained."""
    config = default_config()
    config.model.update(SIZES | knobs)
    for name, values in sections.items():
        config[name].update(values)
    run = Run(RunConfig.from_config_dict(config), mesh=one_device_mesh())
    run.tokenizers = Tokenizers(*[SymbolTokenizer("abcdefghij")] * 2)
    rng = np.random.default_rng(0)
    shapes = run.model.shapes
    values = {name: rng.normal(scale=0.3, size=leaf.shape) for name, leaf in shapes.items()}
    for name, value in values.items():
        if name.endswith("/scale"):
            value[...] = 1 + 0.3 * value
    return TrainedModel(run, {name: jnp.asarray(x, jnp.float32) for name, x in values.items()})


def logits_of(model: TrainedModel) -> np.ndarray:
    rng = np.random.default_rng(0)
    source, target = jnp.asarray(rng.integers(3, 13, (2, 3, 6)), jnp.int32)
    return np.asarray(model.module(source, target))


@pytest.mark.parametrize("name", [name for name in MODELS if "gemma" not in name])
def test_an_exported_model_comes_back(name, tmp_path):
    pytest.importorskip("safetensors")
    model = random_model(MODELS[name])
    export(model, tmp_path / "out")
    for file in tmp_path.glob("out/token*"):
        file.unlink()
    pieces = {piece: number for number, piece in enumerate(model.tokenizers.source.pieces)}
    (tmp_path / "out" / "vocab.json").write_text(json.dumps(pieces))
    again = import_run(tmp_path / "out", tmp_path / "run").trained_model()
    expected = logits_of(model)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits_of(again), expected, atol=1e-5 * scale)
    assert again.config.decoding.max_length == 24
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "length_penalty" not in generation  # there is no penalty as of GNMT
    assert generation["bad_words_ids"] == [[0], [1], [13], [14], [15]]  # 13 pieces of 16 rows


@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_the_class_computes_the_same(name, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = random_model(MODELS[name])
    export(model, tmp_path)
    there, info = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(there).__name__.startswith(CLASSES[list(MODELS).index(name)])
    rng = np.random.default_rng(0)
    source, target = torch.tensor(rng.integers(3, 13, (2, 3, 6)))
    with torch.no_grad():
        found = there.eval()(input_ids=source, decoder_input_ids=target).logits.numpy()
    expected = logits_of(model)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_outputs(name, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    decoding = {"penalty": "length", "unfinished": "equal", "max_length": 12, "decode_margin": 99}
    model, rng = random_model(MODELS[name], decoding=decoding), np.random.default_rng(0)
    export(model, tmp_path)
    there = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    texts = ["".join(rng.choice([*"abcdefghij"], k)) for k in rng.integers(1, 9, 200)]
    rows = [model.tokenizers.source.encode(text) for text in texts]
    ids = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    compare(there, model, texts, given, 1)
    compare(there, model, texts, given, 4, length_penalty=0.6, early_stopping="true")


def test_what_no_class_holds_is_named():
    find_class(Model(ModelConfig(norm_epsilon=1e-5), 8))
    for knobs, words in (
        ({"norm_epsilon": 1e-6}, "PegasusFor.*model.norm_epsilon=1e-06 \\(it has 1e-05\\): train"),
        *(
            ({"position_encoding": x}, f"position_encoding={x}")
            for x in ("alibi", "transformer_xl")
        ),
        ({"norm_placement": "both"}, "norm_placement=both"),
        ({"window": 4}, "window=4"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"d_k": 3, "num_heads": 5}, "d_k=3"),
        ({"feed_forward": "geglu"}, "feed_forward=geglu"),
        ({"embedding_scale": 3.0}, "embedding_scale=3.0"),
        ({"normalize_qk": True}, "normalize_qk=True"),
        ({"norm": "rms", "position_encoding": "rotary"}, "position_encoding=rotary"),
        (T5 | {"ff_bias": True}, "T5For.*hold model.ff_bias=True \\(it has False\\)"),
        (T5 | {"embedding_scale": None}, "T5For.*hold model.embedding_scale=8.0"),
        (T5 | {"tie_embeddings": "none"}, "hold model.tie_embeddings=none"),
        ({"architecture": "recurrent"}, "architecture=recurrent"),
    ):
        with pytest.raises(UserError, match=words):
            find_class(Model(ModelConfig(**{"norm_epsilon": 1e-5} | knobs), 8))
