"""The parts of a layer: embedding, feed-forward, residual connection, dropout and norms."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import normal, refused, small_model
from transformer.modules import layers
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.config import ModelConfig
from transformer.modules.dropout import Dropout, dropout, stream_of, training_rngs
from transformer.modules.layers import FEED_FORWARDS, NORM_PLACEMENTS, FeedForward, Residual
from transformer.modules.linear import INITIALIZERS
from transformer.modules.normalization import NORMS, LayerNorm
from transformer.modules.stacks import Encoder
from transformer.modules.transformer import Transformer

FLOAT32 = jnp.dtype("float32")
each_kind = pytest.mark.parametrize("kind", FEED_FORWARDS)


def make_feed_forward(width, ff_width, kind, init="glorot_uniform"):
    options = {"kernel_init": INITIALIZERS[init], "dtype": FLOAT32, "rngs": nnx.Rngs(0)}
    return FeedForward(width, ff_width, activation=kind, **options)


def test_embedding_has_unit_variance_and_shares_its_table_with_the_logits():
    model = Transformer(ModelConfig(d_model=64), 1000, rngs=nnx.Rngs(0))
    embedded = model.embed(jnp.arange(1000).reshape(10, 100))
    np.testing.assert_allclose(embedded.var(), 1.0, rtol=0.05)
    table = model.embedding.embedding[...]
    np.testing.assert_allclose(embedded[0, 7], table[7] * 8.0, rtol=1e-6)
    logits = model.logits(embedded)
    np.testing.assert_allclose(logits, embedded @ table.T, rtol=1e-3, atol=1e-3)
    assert jnp.isnan(model.embed(jnp.array([[1000]]))).all()  # and not the last row


@each_kind
def test_feed_forward_is_its_equation_at_each_position(kind, rng):
    """Equation 2, or that of Shazeer 2020 where a second product gates the first."""
    activation, gated = FEED_FORWARDS[kind]
    layer, x = make_feed_forward(4, 12, kind), normal(rng, 2, 3, 4)
    assert gated == (layer.gate is not None)
    for linear in filter(None, (layer.expand, layer.contract, layer.gate)):
        linear.bias[...] = normal(rng, *linear.bias.shape)

    def product(linear, inputs):
        return np.asarray(inputs) @ linear.kernel[...] + linear.bias[...]

    for b, t in np.ndindex(2, 3):
        hidden = activation(product(layer.expand, x[b, t]))
        hidden = hidden * product(layer.gate, x[b, t]) if gated else hidden
        expected = product(layer.contract, hidden)
        np.testing.assert_allclose(layer(x)[b, t], expected, rtol=1e-5, atol=1e-6)


def test_activations_are_what_their_papers_say():
    """Hendrycks and Gimpel 2016, Ramachandran et al. 2017, Dauphin et al. 2017."""
    x = np.linspace(-4, 4, 81)
    relu, sigmoid = np.where(x > 0, x, 0), 1 / (1 + np.exp(-x))
    gelu = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    expected = {"relu": relu, "gelu": gelu, "swish": x * sigmoid, "glu": sigmoid}
    expected["gelu_erf"] = gelu
    expected |= {"reglu": relu, "geglu": gelu, "swiglu": x * sigmoid}
    for name, values in expected.items():
        activation, gated = FEED_FORWARDS[name]
        # JAX's GELU is its approximation by tanh, off by up to 5e-4.
        tolerance = 1e-3 if values is gelu and name != "gelu_erf" else 1e-6
        np.testing.assert_allclose(activation(x.astype(np.float32)), values, atol=tolerance)
        assert gated == name.endswith("glu")


@each_kind
@pytest.mark.parametrize(("width", "ff_width"), [(512, None), (64, 256), (16, 32), (10, 100)])
def test_every_kind_has_as_many_parameters(kind, width, ff_width):
    def count(kind):
        layer = nnx.eval_shape(lambda: make_feed_forward(width, ff_width, kind))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer)))

    ours, hidden = count(kind), ff_width or 4 * width
    expected = 2 * width * hidden + hidden + width
    # The hidden width is rounded by at most 4, in three matrices and two biases; and two
    # biases of 2/3 are a third more than one.
    assert abs(ours - expected) <= (4 * (3 * width + 2) + hidden / 3) * FEED_FORWARDS[kind][1]


@pytest.mark.parametrize("init", INITIALIZERS)
def test_matrices_begin_with_the_variance_of_their_initialisers_paper(init):
    fans = [(64, 96), (96, 64), (64, 128), (128, 64)]  # of heads 2 · 48; of ff_width 128
    variances = {"lecun_normal": lambda fan_in, _: 1 / fan_in, "normal": lambda *_: 0.02**2}
    variances["he_normal"] = lambda fan_in, _: 2 / fan_in
    variance = variances.get(init, lambda *fans: 2 / sum(fans))
    expected = [math.sqrt(variance(*fan)) for fan in fans]
    options = {"kernel_init": INITIALIZERS[init], "rngs": nnx.Rngs(0)}
    feed_forward = make_feed_forward(64, 128, "relu", init)
    for n, h in ((2, 48), (24, 4)):
        attention = MultiHeadAttention(n, 64, n * h, **options)
        linears = (attention.query, attention.out, feed_forward.expand, feed_forward.contract)
        found = [float(linear.kernel[...].std()) for linear in linears]
        np.testing.assert_allclose(found, expected, rtol=0.05)


def make_residual(placement, **options):
    """With a scale for each norm, so that they can be told apart."""
    residual = Residual(8, placement=placement, rngs=nnx.Rngs(0), **options)
    residual.norm.scale[...] = jnp.full(8, 2.0)
    if placement == "both":
        residual.output_norm.scale[...] = jnp.full(8, 5.0)
    return residual


def test_residual_puts_the_norm_where_its_placement_says(rng):
    x, y = 2 + 3 * normal(rng, 2, 3, 8), 2 + 3 * normal(rng, 2, 3, 8)
    norm = make_residual("pre").norm
    reads = {"pre": norm(x), "post": x, "both": norm(x)}
    outputs = {"pre": x + y, "post": norm(x + y), "both": x + norm(y) / 2 * 5}
    for placement in NORM_PLACEMENTS:
        read = []
        out = make_residual(placement)(x, lambda h, read=read: read.append(h) or y)
        np.testing.assert_array_equal(read[0], reads[placement])
        np.testing.assert_allclose(out, outputs[placement], rtol=1e-5, atol=1e-5)


def test_residual_drops_the_output_of_the_sublayer_alone_after_a_second_norm(rng):
    x, y = jnp.ones((4, 5, 8)), normal(rng, 4, 5, 8)
    out = make_residual("pre", dropout_rate=0.5)(x, lambda _: x)
    assert set(np.unique(out)) == {1.0, 3.0}
    both = make_residual("both", dropout_rate=0.5)
    out = both(jnp.zeros_like(y), lambda _: y)
    dropped = out == 0
    assert 0.3 < dropped.mean() < 0.7
    np.testing.assert_allclose(out[~dropped], 2 * both.output_norm(y)[~dropped], rtol=1e-5)
    np.testing.assert_allclose(both(x, lambda _: y, deterministic=True), x + both.output_norm(y))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_feed_forward_drops_hidden_units_in_training_alone_and_keeps_their_mean(kind, rng):
    x, options = normal(rng, 50, 40, 8), {"activation": kind, "scale_gated": False}
    layer = FeedForward(8, 8, dropout_rate=0.5, **options, rngs=nnx.Rngs(0))
    layer.contract.kernel[...] = jnp.eye(8)  # the output is the hidden units
    out, hidden = layer(x), layer(x, deterministic=True)
    dropped = out == 0
    assert 0.45 < dropped.mean() < 0.55
    np.testing.assert_allclose(out[~dropped], 2 * hidden[~dropped], rtol=1e-6)
    assert (layer(x) != out).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), hidden)
    plain = layer.activation(layer.expand(x))
    np.testing.assert_allclose(hidden, plain if layer.gate is None else plain * layer.gate(x))


def test_what_a_module_used_alone_does_not_know_is_named_with_its_choices():
    names = {"activation": "relux", "norm": "layr", "norm_placement": "pots", "remat": "half"}
    for name, wrong in names.items():
        argument = {"feed_forward" if name == "activation" else name: wrong}
        refused(f"{name}={wrong}: choose", Encoder, 1, 8, 2, **argument, rngs=nnx.Rngs(0))
    config = small_model(architecture="recurrent").config
    refused(r"model\.architecture=recurrent .*use Run", Transformer, config, 9, rngs=nnx.Rngs(0))


def test_dropout_drops_at_its_rate_keeps_the_mean_and_draws_another_mask_each_time():
    x, rngs = jnp.full((200, 500), 3.0), nnx.Rngs(dropout=0)
    out = dropout(x, 0.3, rngs.dropout)
    np.testing.assert_allclose((out == 0).mean(), 0.3, atol=0.005)
    np.testing.assert_allclose(out[out != 0], 3.0 / 0.7, rtol=1e-6)
    assert (dropout(x, 0.3, rngs.dropout) != out).any()


def test_in_evaluation_and_at_rate_0_nothing_is_dropped_and_no_key_is_drawn():
    rngs, x = nnx.Rngs(dropout=0), jnp.ones((3, 3))
    layer = Dropout(0.5)
    assert layer(x, deterministic=True, rngs=rngs) is x
    assert nnx.view(layer, deterministic=True)(x, rngs=rngs) is x
    layer.eval()
    assert layer(x, rngs=rngs) is dropout(x, 0.0, rngs.dropout) is Dropout(0.0)(x) is x
    assert int(rngs.dropout.count[...]) == 0
    assert (layer(x, deterministic=False, rngs=rngs) != x).any()


def test_a_module_keeps_a_stream_if_it_drops_and_there_is_one():
    x = jnp.ones((20, 20))
    layer = Dropout(0.5, rngs=nnx.Rngs(0))
    assert (layer(x) != layer(x)).any()
    assert stream_of("dropout", None, layer.rngs) is layer.rngs
    for without in (Dropout(0.0, rngs=nnx.Rngs(0)), Dropout(0.5, rngs=nnx.Rngs(params=0))):
        assert not jax.tree.leaves(nnx.state(without))
    with pytest.raises(ValueError, match="rngs="):
        Dropout(0.5)(x)
    with pytest.raises(ValueError, match="deterministic="):
        Dropout(0.5, deterministic=None)(x)
    assert (Dropout(1.0)(x, rngs=nnx.Rngs(0)) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_a_traced_rate_drops_the_same_elements(rate, dtype):
    x = jax.random.normal(jax.random.key(1), (100, 100), dtype)
    traced = jax.jit(lambda rate: dropout(x, rate, nnx.Rngs(dropout=0).dropout))(jnp.float32(rate))
    known = dropout(x, rate, nnx.Rngs(dropout=0).dropout)
    assert traced.dtype == known.dtype == dtype
    np.testing.assert_array_equal(traced == 0, known == 0)
    # Not to the last bit: the traced rate, and 1 less it, are rounded to float32.
    wide = (each.astype(jnp.float32) for each in (traced, known))
    np.testing.assert_allclose(*wide, rtol=4 * float(jnp.finfo(dtype).eps))


def test_what_one_stream_draws_moves_no_other():
    one, other = training_rngs(jax.random.key(0)), training_rngs(jax.random.key(0))
    one.dropout()
    names = ("attention", "positions", "dropout")
    drawn, expected = ([repr(rngs[name]()) for name in names] for rngs in (one, other))
    assert drawn[:2] == expected[:2]
    assert len({*drawn, *expected}) == 4


WIDTH = 64
SEGMENTS = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
each_norm = pytest.mark.parametrize("name", NORMS)


def make_norm(norm, epsilon=1e-6, **options):
    return norm(WIDTH, epsilon=epsilon, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_is_right_where_the_one_pass_variance_is_wrong(dtype):
    x = (1e4 + jax.random.normal(jax.random.key(0), (8, WIDTH))).astype(dtype)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    out = np.asarray(make_norm(LayerNorm, dtype=x.dtype)(x).astype(jnp.float32))
    assert np.abs(out - exact).max() < (5e-3 if dtype == "float32" else 2e-2)


@each_norm
def test_batch_mates_and_other_positions_matter_to_batch_norm_in_training_alone(name, rng):
    norm, x = make_norm(NORMS[name]), normal(rng, 4, 5, WIDTH)
    changed = x.at[1:].mul(100.0).at[0, 1:].add(7.0)
    evaluate = partial(layers.apply_norm, norm, deterministic=True)
    np.testing.assert_array_equal(evaluate(x)[0, 0], evaluate(changed)[0, 0])
    np.testing.assert_array_equal(evaluate(x)[:1], evaluate(x[:1]))
    littered = jnp.where(SEGMENTS[..., None] > 0, x, 7.0)  # where no tokens are
    inputs = (x, changed, littered)
    one, other, same = (layers.apply_norm(norm, each, SEGMENTS > 0)[0, 0] for each in inputs)
    assert (one == other).all() == (name != "batch")
    np.testing.assert_array_equal(one, same)
    assert name != "none" or norm(x) is x


@each_norm
def test_dtype_is_kept_and_gradients_of_a_constant_row_are_finite(name):
    def total(x, deterministic):
        norm = make_norm(NORMS[name], dtype=x.dtype)
        return layers.apply_norm(norm, x, deterministic=deterministic).sum()

    for mode in (True, False):
        assert total(jnp.ones((1, 2, WIDTH), jnp.bfloat16), mode).dtype == jnp.bfloat16
        assert jnp.isfinite(jax.grad(total)(jnp.zeros((1, 2, WIDTH)), mode)).all()


def test_batch_norm_evaluates_with_running_averages(rng):
    norm, mean, variance = make_norm(NORMS["batch"]), 0.0, 1.0
    for _ in range(2):
        x = rng.normal(2.0, 3.0, size=(4, 5, WIDTH)).astype(np.float32)
        norm(jnp.asarray(x), mask=SEGMENTS[..., None] > 0)
        tokens = x[np.asarray(SEGMENTS) > 0]
        mean = 0.9 * mean + 0.1 * tokens.mean(0)
        variance = 0.9 * variance + 0.1 * tokens.var(0, ddof=1)
    expected = (x - mean) / np.sqrt(variance + 1e-6)
    norm.eval()
    for _ in range(2):  # it leaves them as they are
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_dense_layers_need_no_transposes(monkeypatch):
    def transposes():
        stack = nnx.List(FeedForward(32, 64, rngs=nnx.Rngs(k)) for k in range(8))
        structure, state = nnx.split(stack)

        def loss(state, x):
            for each in nnx.merge(structure, state):
                x = each(x)
            return jnp.tanh(x).sum()

        gradient = jax.jit(jax.grad(loss)).lower(state, jnp.ones((8, 16, 32)))
        return len(re.findall(r" transpose\(", gradient.compile().as_text()))

    assert transposes() == 0
    monkeypatch.setattr("transformer.modules.linear.dot_general", jax.lax.dot_general)
    assert transposes() == 16
