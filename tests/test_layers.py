import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import normal, refused, small_model
from transformer.modules.attention import MultiHeadAttention
from transformer.modules.layers import FEED_FORWARDS, NORM_PLACEMENTS, FeedForward, Residual
from transformer.modules.linear import INITIALIZERS, embed_scaled, logits_of, scaled_embedding
from transformer.modules.stacks import Encoder
from transformer.modules.transformer import Transformer

FLOAT32 = jnp.dtype("float32")
each_kind = pytest.mark.parametrize("kind", FEED_FORWARDS)


def make_feed_forward(width, ff_width, kind, init="glorot_uniform"):
    options = {"kernel_init": INITIALIZERS[init], "dtype": FLOAT32, "rngs": nnx.Rngs(0)}
    return FeedForward(width, ff_width, activation=kind, **options)


def test_embedding_has_unit_variance_and_shares_its_table_with_the_logits():
    embedding = scaled_embedding(1000, 64, FLOAT32, nnx.Rngs(0))
    embedded = embed_scaled(embedding, jnp.arange(1000).reshape(10, 100))
    np.testing.assert_allclose(embedded.var(), 1.0, rtol=0.05)
    table = embedding.embedding[...]
    np.testing.assert_allclose(embedded[0, 7], table[7] * 8.0, rtol=1e-6)
    logits = logits_of(embedding, embedded)
    np.testing.assert_allclose(logits, embedded @ table.T, rtol=1e-3, atol=1e-3)
    assert jnp.isnan(embedding(jnp.array([[1000]]))).all()  # and not the last row


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
    expected |= {"reglu": relu, "geglu": gelu, "swiglu": x * sigmoid}
    for name, values in expected.items():
        activation, gated = FEED_FORWARDS[name]
        # JAX's GELU is its approximation by tanh, off by up to 5e-4.
        tolerance = 1e-3 if values is gelu else 1e-6
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
    """Whatever the division into heads."""
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


def test_what_a_module_used_alone_does_not_know_is_named_with_its_choices():
    names = {"activation": "relux", "norm": "layr", "norm_placement": "pots", "remat": "half"}
    for name, wrong in names.items():
        argument = {"feed_forward" if name == "activation" else name: wrong}
        refused(f"{name}={wrong}: choose", Encoder, 1, 8, 2, **argument, rngs=nnx.Rngs(0))
    config = small_model(architecture="recurrent").config
    refused(r"model\.architecture=recurrent", Transformer, config, 9, rngs=nnx.Rngs(0))
