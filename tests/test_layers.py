import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.attention import MultiHeadAttention
from transformer.dropout import Training
from transformer.layers import (
    FEED_FORWARDS,
    INITIALIZERS,
    Embedding,
    FeedForward,
    Residual,
)

FLOAT32 = jnp.dtype("float32")


def test_embedding_has_unit_variance_and_shares_its_table_with_the_logits():
    embedding = Embedding(1000, 64, dtype=FLOAT32, rngs=nnx.Rngs(0))
    tokens = jnp.arange(1000).reshape(10, 100)
    embedded = embedding(tokens)
    np.testing.assert_allclose(embedded.var(), 1.0, rtol=0.05)
    np.testing.assert_allclose(embedded[0, 7], embedding.table[7] * 8.0, rtol=1e-6)
    logits = embedding.logits(embedded)
    np.testing.assert_allclose(logits, embedded @ embedding.table[...].T, rtol=1e-3, atol=1e-3)


def test_a_token_outside_the_vocabulary_is_nan_and_not_the_last_row():
    embedding = Embedding(5, 4, dtype=FLOAT32, rngs=nnx.Rngs(0))
    assert jnp.isnan(embedding(jnp.array([[5]]))).all()


def make_feed_forward(width, ff_width, kind, init="glorot_uniform"):
    return FeedForward(
        width, ff_width, kind=kind, init=INITIALIZERS[init], dtype=FLOAT32, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_feed_forward_is_its_equation_at_each_position(kind, rng):
    """Equation 2, or that of Shazeer 2020 where a second product gates the first."""
    activation, gated = FEED_FORWARDS[kind]
    layer = make_feed_forward(4, 12, kind)
    weights = {"expand": layer.expand, "contract": layer.contract}
    weights |= {"gate": layer.gate} if gated else {}
    assert gated == (layer.gate is not None)
    for linear in weights.values():
        linear.bias[...] = jnp.asarray(rng.normal(size=linear.bias.shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)

    def product(name, inputs):
        return np.asarray(inputs) @ weights[name].kernel[...] + weights[name].bias[...]

    for b, t in np.ndindex(2, 3):
        hidden = activation(product("expand", x[b, t]))
        hidden = hidden * product("gate", x[b, t]) if gated else hidden
        expected = product("contract", hidden)
        np.testing.assert_allclose(layer(x)[b, t], expected, rtol=1e-5, atol=1e-6)


def test_activations_are_what_their_papers_say():
    x = np.linspace(-4, 4, 81)
    sigmoid = 1 / (1 + np.exp(-x))
    erf = np.vectorize(math.erf)
    expected = {
        "relu": np.where(x > 0, x, 0),
        "gelu": x * (1 + erf(x / math.sqrt(2))) / 2,  # Hendrycks and Gimpel 2016
        "swish": x * sigmoid,  # Ramachandran et al. 2017
        "glu": sigmoid,  # Dauphin et al. 2017
    }
    expected |= {"reglu": expected["relu"], "geglu": expected["gelu"], "swiglu": expected["swish"]}
    for name, values in expected.items():
        activation, gated = FEED_FORWARDS[name]
        # JAX's GELU is its approximation by tanh, off by up to 5e-4.
        tolerance = 1e-3 if values is expected["gelu"] else 1e-6
        np.testing.assert_allclose(activation(x.astype(np.float32)), values, atol=tolerance)
        assert gated == name.endswith("glu")


def count(layer):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer)))


@pytest.mark.parametrize("kind", FEED_FORWARDS)
@pytest.mark.parametrize(("width", "ff_width"), [(512, 2048), (64, 256), (16, 32), (10, 100)])
def test_every_kind_has_as_many_parameters(kind, width, ff_width):
    kinds = (
        nnx.eval_shape(lambda k=k: make_feed_forward(width, ff_width, k)) for k in (kind, "relu")
    )
    ours, relus = map(count, kinds)
    # The hidden width is rounded by at most 4, in three matrices and two biases; and two
    # biases of 2/3 are a third more than one.
    assert abs(ours - relus) <= 4 * (3 * width + 2) + ff_width / 3
    if width == 512:
        np.testing.assert_allclose(ours, relus, rtol=0.02)


def deviations(init, width, shape):
    """Standard deviation of the matrices of attention with heads of that shape; feed-forward's."""
    attention = MultiHeadAttention(
        width,
        *shape,
        value_width=shape[1],
        kv_heads=shape[0],
        use_bias=False,
        qk_norm=False,
        fused=False,
        init=INITIALIZERS[init],
        backend="einsum",
        dtype=FLOAT32,
        rngs=nnx.Rngs(0),
    )
    feed_forward = make_feed_forward(width, 2 * width, "relu", init)
    linears = (attention.query, attention.out, feed_forward.expand, feed_forward.contract)
    return [float(linear.kernel[...].std()) for linear in linears]


@pytest.mark.parametrize("init", INITIALIZERS)
def test_the_division_into_heads_does_not_matter_to_initialisation(init):
    np.testing.assert_allclose(
        deviations(init, 64, (2, 32)), deviations(init, 64, (16, 4)), rtol=0.05
    )


@pytest.mark.parametrize(
    ("init", "deviation"),
    [
        ("glorot_uniform", lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out))),
        ("glorot_normal", lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out))),
        ("lecun_normal", lambda fan_in, fan_out: math.sqrt(1 / fan_in)),
        ("he_normal", lambda fan_in, fan_out: math.sqrt(2 / fan_in)),
        ("normal", lambda fan_in, fan_out: 0.02),
    ],
)
def test_matrices_begin_with_the_variance_of_their_initialisers_paper(init, deviation):
    fans = [(64, 96), (96, 64), (64, 128), (128, 64)]  # of heads 2 · 48; of ff_width 128
    expected = [deviation(*fan) for fan in fans]
    np.testing.assert_allclose(deviations(init, 64, (2, 48)), expected, rtol=0.05)


def make_residual(placement):
    """With a gain for each norm, so that they can be told apart."""
    residual = Residual(8, norm="layer", epsilon=1e-6, placement=placement)
    residual.norm.gain[...] = jnp.full(8, 2.0)
    if placement == "both":
        residual.output_norm.gain[...] = jnp.full(8, 5.0)
    return residual


def test_residual_puts_the_norm_where_its_placement_says(rng):
    x, y = (jnp.asarray(rng.normal(2, 3, size=(2, 3, 8)), jnp.float32) for _ in range(2))
    pre, post, both = map(make_residual, ("pre", "post", "both"))
    norm = pre.norm
    np.testing.assert_array_equal(pre.input(x), norm(x))
    np.testing.assert_array_equal(post.input(x), x)
    np.testing.assert_array_equal(both.input(x), norm(x))
    np.testing.assert_array_equal(pre.add(x, y), x + y)
    np.testing.assert_array_equal(post.add(x, y), norm(x + y))
    np.testing.assert_allclose(both.add(x, y), x + norm(y) / 2 * 5, rtol=1e-5, atol=1e-5)


def test_residual_drops_the_output_of_the_sublayer_alone():
    residual = make_residual("pre")
    x, y = jnp.ones((4, 5, 8)), jnp.ones((4, 5, 8))
    out = residual.add(x, y, Training(nnx.Rngs(dropout=0), 0.5))
    assert set(np.unique(out)) == {1.0, 3.0}


def test_with_both_norms_what_is_dropped_is_what_the_second_gives(rng):
    residual = make_residual("both")
    y = jnp.asarray(rng.normal(size=(4, 5, 8)), jnp.float32)
    out = residual.add(jnp.zeros_like(y), y, Training(nnx.Rngs(dropout=0), 0.5))
    dropped = out == 0
    assert 0.3 < dropped.mean() < 0.7
    np.testing.assert_allclose(out[~dropped], 2 * residual.output_norm(y)[~dropped], rtol=1e-5)
