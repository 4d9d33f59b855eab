import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.modules.dropout import Dropout, dropout, stream_of, training_rngs


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


def test_replicas_drop_each_at_its_own_rate():
    x, rates = jnp.ones((100, 100)), jnp.array([0.0, 0.2, 0.7])
    outs = jax.vmap(lambda rate: dropout(x, rate, nnx.Rngs(dropout=0).dropout))(rates)
    np.testing.assert_array_equal(outs[0], x)
    np.testing.assert_allclose((outs == 0).mean((1, 2)), rates, atol=0.02)


def test_what_one_stream_draws_moves_no_other():
    one, other = training_rngs(jax.random.key(0)), training_rngs(jax.random.key(0))
    one.dropout()
    names = ("attention", "positions", "dropout")
    drawn, expected = ([repr(rngs[name]()) for name in names] for rngs in (one, other))
    assert drawn[:2] == expected[:2]
    assert len({*drawn, *expected}) == 4
