import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.layers import Embedding, FeedForward, Residual, dropout
from transformer.positions import POSITIONS, Learned, Sinusoidal

FLOAT32 = jnp.dtype("float32")


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    x = jnp.full((200, 500), 3.0)
    out = dropout(x, 0.3, nnx.Rngs(dropout=0))
    np.testing.assert_allclose((out == 0).mean(), 0.3, atol=0.005)
    np.testing.assert_allclose(out[out != 0], 3.0 / 0.7, rtol=1e-6)


def test_each_call_of_dropout_draws_another_mask():
    rngs, x = nnx.Rngs(dropout=0), jnp.ones((10, 10))
    assert (dropout(x, 0.5, rngs) != dropout(x, 0.5, rngs)).any()


@pytest.mark.parametrize(("rate", "rngs"), [(0.5, None), (0.0, nnx.Rngs(dropout=0))])
def test_dropout_does_nothing_in_evaluation_or_at_rate_0(rate, rngs):
    x = jnp.ones((3, 3))
    assert dropout(x, rate, rngs) is x


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


def test_feed_forward_is_equation_2_at_each_position(rng):
    layer = FeedForward(4, 6, activation="relu", dtype=FLOAT32, rngs=nnx.Rngs(0))
    layer.expand.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    layer.contract.bias[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    hidden = np.maximum(0, x @ layer.expand.kernel[...] + layer.expand.bias[...])
    expected = hidden @ layer.contract.kernel[...] + layer.contract.bias[...]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def make_residual(placement):
    return Residual(8, norm="layer", epsilon=1e-6, placement=placement, dropout=0.0)


def test_residual_puts_the_norm_where_its_placement_says(rng):
    x = jnp.asarray(rng.normal(2, 3, size=(2, 3, 8)), jnp.float32)
    pre, post = make_residual("pre"), make_residual("post")
    norm = pre.norm
    np.testing.assert_array_equal(pre.input(x), norm(x))
    np.testing.assert_array_equal(post.input(x), x)
    np.testing.assert_array_equal(pre.add(x, 2 * x, None), 3 * x)
    np.testing.assert_array_equal(post.add(x, 2 * x, None), norm(3 * x))


def test_residual_drops_the_output_of_the_sublayer_alone():
    residual = Residual(8, norm="layer", epsilon=1e-6, placement="pre", dropout=0.5)
    x, y = jnp.ones((4, 5, 8)), jnp.ones((4, 5, 8))
    out = residual.add(x, y, nnx.Rngs(dropout=0))
    assert set(np.unique(out)) == {1.0, 3.0}


def test_sinusoidal_positions_are_the_papers():
    x = jnp.zeros((1, 50, 6))
    out = Sinusoidal(6, max_length=1, rngs=nnx.Rngs(0)).embed(x, jnp.arange(50)[None])
    for position in (0, 1, 17, 49):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(out[0, position, 2 * i], np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(out[0, position, 2 * i + 1], np.cos(angle), atol=1e-5)


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_depend_on_the_index_that_is_given(name, rng):
    position = POSITIONS[name](8, max_length=16, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    whole = position.embed(x, jnp.arange(5)[None])
    for t in range(5):
        one = position.embed(x[:, t : t + 1], jnp.array([[t]]))
        np.testing.assert_allclose(one[:, 0], whole[:, t], rtol=1e-6)


def test_learned_positions_end_in_nan():
    position = Learned(4, max_length=3, rngs=nnx.Rngs(0))
    out = position.embed(jnp.zeros((1, 4, 4)), jnp.arange(4)[None])
    assert jnp.isnan(out[0, 3]).all()
    assert jnp.isfinite(out[0, :3]).all()


def test_learned_positions_are_trained():
    position = Learned(4, max_length=3, rngs=nnx.Rngs(0))

    def loss(position):
        return position.embed(jnp.zeros((1, 2, 4)), jnp.arange(2)[None]).sum()

    gradient = nnx.grad(loss)(position).table[...]
    np.testing.assert_array_equal(gradient, jnp.ones((3, 4)).at[2].set(0.0))
    assert not jax.tree.leaves(nnx.state(Sinusoidal(4, max_length=3, rngs=nnx.Rngs(0))))
