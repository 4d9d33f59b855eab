import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.modules.attention import MultiHeadAttention
from transformer.modules.dropout import Training
from transformer.modules.layers import FEED_FORWARDS, INITIALIZERS, Embedding, FeedForward, Residual

FLOAT32 = jnp.dtype("float32")
each_kind = pytest.mark.parametrize("kind", FEED_FORWARDS)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_embedding_has_unit_variance_and_shares_its_table_with_the_logits():
    embedding = Embedding(1000, 64, dtype=FLOAT32, rngs=nnx.Rngs(0))
    embedded = embedding(jnp.arange(1000).reshape(10, 100))
    np.testing.assert_allclose(embedded.var(), 1.0, rtol=0.05)
    np.testing.assert_allclose(embedded[0, 7], embedding.table[7] * 8.0, rtol=1e-6)
    logits = embedding.logits(embedded)
    np.testing.assert_allclose(logits, embedded @ embedding.table[...].T, rtol=1e-3, atol=1e-3)
    assert jnp.isnan(embedding(jnp.array([[1000]]))).all()  # and not the last row


def make_feed_forward(width, ff_width, kind, init="glorot_uniform"):
    options = {"init": INITIALIZERS[init], "dtype": FLOAT32, "rngs": nnx.Rngs(0)}
    return FeedForward(width, ff_width, kind=kind, **options)


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
    sigmoid = 1 / (1 + np.exp(-x))
    gelu = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    expected = {"relu": np.where(x > 0, x, 0), "gelu": gelu, "swish": x * sigmoid, "glu": sigmoid}
    expected |= {"reglu": expected["relu"], "geglu": gelu, "swiglu": expected["swish"]}
    for name, values in expected.items():
        activation, gated = FEED_FORWARDS[name]
        # JAX's GELU is its approximation by tanh, off by up to 5e-4.
        tolerance = 1e-3 if values is gelu else 1e-6
        np.testing.assert_allclose(activation(x.astype(np.float32)), values, atol=tolerance)
        assert gated == name.endswith("glu")


@each_kind
@pytest.mark.parametrize(("width", "ff_width"), [(512, 2048), (64, 256), (16, 32), (10, 100)])
def test_every_kind_has_as_many_parameters(kind, width, ff_width):
    def count(kind):
        layer = nnx.eval_shape(lambda: make_feed_forward(width, ff_width, kind))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer)))

    ours, relus = count(kind), count("relu")
    # The hidden width is rounded by at most 4, in three matrices and two biases; and two
    # biases of 2/3 are a third more than one.
    assert abs(ours - relus) <= 4 * (3 * width + 2) + ff_width / 3
    if width == 512:
        np.testing.assert_allclose(ours, relus, rtol=0.02)


VARIANCES = {
    "glorot_uniform": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "glorot_normal": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "lecun_normal": lambda fan_in, fan_out: 1 / fan_in,
    "he_normal": lambda fan_in, fan_out: 2 / fan_in,
    "normal": lambda fan_in, fan_out: 0.02**2,
}


@pytest.mark.parametrize("init", INITIALIZERS)
def test_matrices_begin_with_the_variance_of_their_initialisers_paper(init):
    """Whatever the division into heads."""
    fans = [(64, 96), (96, 64), (64, 128), (128, 64)]  # of heads 2 · 48; of ff_width 128
    expected = [math.sqrt(VARIANCES[init](*fan)) for fan in fans]
    options = {"use_bias": False, "qk_norm": False, "fused": False, "backend": "einsum"}
    options |= {"init": INITIALIZERS[init], "dtype": FLOAT32, "rngs": nnx.Rngs(0)}
    feed_forward = make_feed_forward(64, 128, "relu", init)
    for n, h in ((2, 48), (24, 4)):
        attention = MultiHeadAttention(64, n, h, value_width=h, kv_heads=n, **options)
        linears = (attention.query, attention.out, feed_forward.expand, feed_forward.contract)
        found = [float(linear.kernel[...].std()) for linear in linears]
        np.testing.assert_allclose(found, expected, rtol=0.05)


def make_residual(placement):
    """With a gain for each norm, so that they can be told apart."""
    residual = Residual(8, norm="layer", epsilon=1e-6, placement=placement)
    residual.norm.gain[...] = jnp.full(8, 2.0)
    if placement == "both":
        residual.output_norm.gain[...] = jnp.full(8, 5.0)
    return residual


def test_residual_puts_the_norm_where_its_placement_says(rng):
    x, y = 2 + 3 * normal(rng, 2, 3, 8), 2 + 3 * normal(rng, 2, 3, 8)
    pre, post, both = map(make_residual, ("pre", "post", "both"))
    norm, equal = pre.norm, np.testing.assert_array_equal
    equal(pre.input(x), norm(x))
    equal(post.input(x), x)
    equal(both.input(x), norm(x))
    equal(pre.add(x, y), x + y)
    equal(post.add(x, y), norm(x + y))
    np.testing.assert_allclose(both.add(x, y), x + norm(y) / 2 * 5, rtol=1e-5, atol=1e-5)


def test_residual_drops_the_output_of_the_sublayer_alone_after_a_second_norm(rng):
    x, y = jnp.ones((4, 5, 8)), normal(rng, 4, 5, 8)
    out = make_residual("pre").add(x, x, Training(nnx.Rngs(dropout=0), 0.5))
    assert set(np.unique(out)) == {1.0, 3.0}
    both = make_residual("both")
    out = both.add(jnp.zeros_like(y), y, Training(nnx.Rngs(dropout=0), 0.5))
    dropped = out == 0
    assert 0.3 < dropped.mean() < 0.7
    np.testing.assert_allclose(out[~dropped], 2 * both.output_norm(y)[~dropped], rtol=1e-5)
