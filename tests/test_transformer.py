"""Knobs of the Transformer against models without them, whose parameters make up for it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import logits_of, maps_of, normal, random_params, refused, small_model, strings
from transformer.config import RunConfig
from transformer.data.batches import Dataset
from transformer.data.tokenizer import PAD
from transformer.inference.evaluation import score
from transformer.loss import cross_entropy
from transformer.modules.config import TIES, ModelConfig
from transformer.modules.model import Model
from transformer.modules.normalization import LayerNorm
from transformer.training.optimizer import OptimizerConfig
from transformer.training.step import init_state, make_train_step

BATCH = strings(("abcde", "edcba"), ("xyz", "zyx"), ("q", "q"))
DATA = Dataset(np.asarray(BATCH.source), np.asarray(BATCH.target_out), 3)
CONSTANT = {"schedule": "constant", "learning_rate": 1.0, "warmup_steps": 0}
D, H = 16, 8
TABLES = ("embedding/embedding", "target_embedding/embedding", "output_embedding/embedding")


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def check_equal(changes, params, plain, folded):
    """The logits of a model with some options, and of one with other options and parameters."""
    expected = logits_of(small_model(**plain), folded, BATCH)
    close(logits_of(small_model(**changes), params, BATCH), expected)


@pytest.mark.parametrize("backend", ["einsum", "xla", "chunked", "splash", "auto"])
def test_scales_equal_scaled_tables_and_queries(backend):
    plain = {"tie_embeddings": "none", "attention_bias": True, "attention_backend": backend}
    scales = {"embedding_scale": 3.0, "logits_scale": 0.5, "attention_scale": 0.7}
    params = random_params(small_model(**plain), 0)
    folded = {name: 0.7 * H**0.5 * x if "/query/" in name else x for name, x in params.items()}
    folded |= {name: params[name] * 3.0 / D**0.5 for name in TABLES[:2]}
    folded[TABLES[2]] *= 0.5
    with jax.numpy_dtype_promotion("standard"):
        check_equal(plain | scales, params, plain, folded)


@pytest.mark.parametrize(
    ("ties", "read"), [*zip(TIES, [(0, 0, 0), (0, 0, 2), (0, 1, 1), (0, 1, 2)], strict=True)]
)
def test_sides_that_are_tied_read_one_table(ties, read):
    model = small_model(tie_embeddings=ties)
    params = random_params(model, 0)
    tables = {TABLES[side]: params[TABLES[number]] for side, number in enumerate(read)}
    assert {TABLES[i] for i in read} == {name for name in params if name in TABLES}
    check_equal({"tie_embeddings": ties}, params, {"tie_embeddings": "none"}, params | tables)


@pytest.mark.parametrize("ties", ["all", "inputs"])
def test_sides_of_two_vocabularies_share_no_table(ties):
    model = Model(ModelConfig(tie_embeddings="target_output"), 9, 7)
    assert model.shapes[TABLES[1]].shape == (7, 64)
    refused(f"tie_embeddings={ties}: 9 .* 7 of the", Model, ModelConfig(tie_embeddings=ties), 9, 7)


def test_scale_and_bias_of_the_logits_reach_scoring_and_training(rng):
    changes = {"logits_bias": True, "logits_scale": 0.5, "tie_embeddings": "target_output"}
    model = small_model(**changes)
    config = RunConfig(optimizer=OptimizerConfig(name="sgd", clip_norm=0.0, **CONSTANT))
    params = random_params(model, 0) | {"logits_bias": normal(rng, model.vocab_size)}
    plain, halved = {"tie_embeddings": "none"}, params | {TABLES[2]: 0.5 * params[TABLES[1]]}
    del halved["logits_bias"]
    expected = logits_of(small_model(**plain), halved, BATCH) + params["logits_bias"]
    close(logits_of(model, params, BATCH), expected)
    assert model.axes["logits_bias"] == ("vocab",)

    def loss(params):
        nll = cross_entropy(logits_of(model, params, BATCH), BATCH.target_out).nll
        return (nll * BATCH.weights).sum() / BATCH.weights.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    totals = jax.jit(score, static_argnums=0)(model, params, DATA)
    close(totals["nll"].sum() / BATCH.weights.sum(), value)
    init = jax.jit(partial(init_state, model, config))
    state = init(jnp.uint32(0), {})._replace(params=params)
    after, sums = jax.jit(make_train_step(model, config))(state, BATCH)
    close(sums["train/loss"] / sums["tokens"], value)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(params[name] - after.params[name], gradient, atol=2e-5)
        assert np.abs(gradient).max() > 1e-3, name


def test_a_norm_of_embedded_tokens_follows_their_positions():
    """By a table whose rows are normalised with their positions, read by a model without both."""
    model, plain = small_model(embedding_norm=True), small_model(position_encoding="none")
    tokens, params = jnp.arange(3, 9)[None], random_params(model, 0)
    module = model.bind(params)
    x = module.source_position(module.embed(tokens))
    norm = LayerNorm(D, rngs=nnx.Rngs(0))
    rows = params["source_embedding_norm/scale"] * norm(x)[0] + params["source_embedding_norm/bias"]
    table = params[TABLES[0]].at[3:9].set(rows / D**0.5)
    folded = {name: params[name] for name in plain.shapes} | {TABLES[0]: table}
    close(module.encode(tokens), plain.bind(folded).encode(tokens))
    moved = params | {"target_embedding_norm/bias": params["target_embedding_norm/bias"] + 1.0}
    assert (logits_of(model, moved, BATCH) != logits_of(model, params, BATCH)).any()


@pytest.mark.parametrize(("placement", "usual"), [("pre", True), ("post", False), ("both", True)])
def test_a_final_norm_is_as_the_config_says_or_as_the_placement_needs(placement, usual):
    models = [small_model(norm_placement=placement, final_norm=last) for last in (False, True)]
    assert small_model(norm_placement=placement).shapes.keys() == models[usual].shapes.keys()
    params = random_params(models[1], 0)
    last = LayerNorm(D, rngs=nnx.Rngs(0))
    own = ({name: params[name] for name in model.shapes} for model in models)
    without, whole = (
        model.bind(own).encode(BATCH.source) for model, own in zip(models, own, strict=True)
    )
    scale, bias = (params[f"encoder/final_norm/{name}"] for name in ("scale", "bias"))
    close(whole, last(without) * scale + bias)


def test_a_relative_bias_per_layer_is_that_of_its_layer():
    """Equal tables give the shared one; a table of distance 0 alone makes its layer see itself."""
    shared = {"position_encoding": "relative", "num_layers": 2, "decoder_layers": 3}
    changes, depths = shared | {"relative_per_layer": True}, {"source": 2, "target": 3}
    params = random_params(small_model(**changes), 0)
    names = [f"{side}_position/{i}/embedding" for side in depths for i in range(depths[side])]
    assert set(names) == {name for name in params if "position" in name}
    for run in ({"scan_layers": True}, {"remat": "dots"}):
        check_equal(changes | run, params, changes, params)
    tables = {f"{x}_position/embedding": params[f"{x}_position/1/embedding"] for x in depths}
    alike = params | {name: tables[re.sub(r"/\d", "", name)] for name in names}
    check_equal(
        changes, alike, shared, {k: x for k, x in params.items() if k not in names} | tables
    )

    alone = jnp.full((32, 2), -1e4).at[0].set(0.0)
    for side, kind in (("source", "encoder"), ("target", "decoder")):
        own = params | {f"{side}_position/1/embedding": alone}
        maps = maps_of(small_model(**changes), own, DATA)
        assert [len(maps[x]) for x in ("encoder", "decoder", "cross")] == [2, 3, 3]
        assert [bool((each[0] == np.eye(6)).all()) for each in maps[kind]] == [
            i == 1 for i in range(depths[side])
        ]


def test_feed_forward_has_no_bias_and_its_whole_width_if_the_config_says_so():
    plain, whole = {"feed_forward": "swiglu", "d_ff": 48}, {"d_ff": 32, "scale_gated": False}
    params = random_params(small_model(**plain), 0)
    assert small_model(**plain | whole).shapes == small_model(**plain).shapes
    check_equal(plain | whole, params, plain, params)
    changes, unbiased = plain | whole | {"ff_bias": False}, {}
    for name, leaf in params.items():
        unbiased[name] = 0.0 * leaf if re.search("feed_forward/.*bias", name) else leaf
    kept = {name: params[name] for name in small_model(**changes).shapes}
    assert len(params) - len(kept) == 2 * 3
    check_equal(changes, kept, plain, unbiased)


def test_the_start_token_may_have_the_number_of_padding():
    model = small_model()
    params = random_params(model, 0)
    start = BATCH.target_in.at[:, 0].set(PAD)
    module, segments = model.bind(params), BATCH.target_segments
    expected = module(BATCH.source, start, target_segments=segments)
    found = module(BATCH.source, start)
    close(found[segments == 1], expected[segments == 1])
