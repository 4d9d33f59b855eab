import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer import masking
from transformer.attention import (
    ATTENTION_BACKENDS,
    KeyValue,
    MultiHeadAttention,
    attention_weights,
    masked_softmax,
)

B, T, S, N, H = 2, 4, 5, 3, 6

MASKS = {
    "none": None,
    "padding": masking.padding(jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)),
    "causal": masking.causal(T, S),
    "nothing": jnp.zeros((B, 1, T, S), bool).at[0, 0, 1].set(True),
    "heads": jnp.arange(B * N * T * S).reshape(B, N, T, S) % 3 > 0,
}


@pytest.fixture
def qkv(rng):
    shapes = ((B, T, N, H), (B, S, N, H), (B, S, N, H))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def by_hand(query, key, value, mask, bias):
    """Equation 1, one query at a time, over the keys it may attend to, in float64."""
    query, key, value = (np.asarray(each, np.float64) for each in (query, key, value))
    mask = np.broadcast_to(True if mask is None else mask, (B, N, T, S))
    bias = np.broadcast_to(0.0 if bias is None else bias, (B, N, T, S))
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(mask[b, n, t])
        if len(keys):
            scores = key[b, keys, n] @ query[b, t, n] / np.sqrt(H) + bias[b, n, t, keys]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ value[b, keys, n]
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_backends_follow_the_equation(backend, mask, with_bias, qkv, rng):
    bias = jnp.asarray(rng.normal(size=(1, N, T, S)), jnp.float32) if with_bias else None
    out = ATTENTION_BACKENDS[backend](*qkv, MASKS[mask], bias)
    expected = by_hand(*qkv, MASKS[mask], bias)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_gradients_agree_with_the_reference_and_are_finite(backend, mask, qkv):
    def loss(attend):
        return lambda *qkv: jnp.sin(attend(*qkv, MASKS[mask])).sum()

    ours = jax.grad(loss(ATTENTION_BACKENDS[backend]), argnums=(0, 1, 2))(*qkv)
    reference = jax.grad(loss(ATTENTION_BACKENDS["einsum"]), argnums=(0, 1, 2))(*qkv)
    for mine, theirs in zip(ours, reference, strict=True):
        assert jnp.isfinite(mine).all()
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_a_query_with_nothing_to_attend_to_gives_zeros(backend, qkv):
    out = ATTENTION_BACKENDS[backend](*qkv, MASKS["nothing"])
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(out[0, [0, 2, 3]], 0.0)
    assert (out[0, 1] != 0).all()


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_masked_keys_have_no_influence_at_all(backend, qkv):
    attend, mask = ATTENTION_BACKENDS[backend], MASKS["padding"]
    key_gradient, value_gradient = jax.grad(
        lambda key, value: jnp.sin(attend(qkv[0], key, value, mask)).sum(), argnums=(0, 1)
    )(*qkv[1:])
    for gradient in (key_gradient, value_gradient):
        np.testing.assert_array_equal(gradient[0, 3:], 0.0)
        assert (jnp.abs(gradient[0, :3]).sum((1, 2)) > 0).all()


def test_weights_of_masked_keys_are_exactly_zero_and_the_others_sum_to_one(qkv):
    mask = MASKS["heads"]
    weights = attention_weights(*qkv[:2], mask)
    np.testing.assert_array_equal(weights[~mask], 0.0)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_scores_and_softmax_are_float32_under_bfloat16(backend, qkv):
    # Scores near 1000 that differ by less than bfloat16 can tell apart there (4).
    key = jnp.zeros((1, 2, 1, 2)).at[0, :, 0, 0].set(32.0).at[0, 1, 0, 1].set(1.0)
    query = jnp.zeros((1, 1, 1, 2)).at[..., 0].set(44.0).at[..., 1].set(1.0)
    value = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 2))
    query, key, value = (each.astype(jnp.bfloat16) for each in (query, key, value))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own function relies on it
        out = ATTENTION_BACKENDS[backend](query, key, value)
    assert out.dtype == jnp.bfloat16
    expected = 1 / (1 + np.exp(-1 / np.sqrt(2)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=1e-2)


def test_softmax_survives_large_scores():
    scores = jnp.array([[[[1e4, 1e4 - 1.0, -1e4]]]])
    weights = masked_softmax(scores, jnp.ones(scores.shape, bool))
    np.testing.assert_allclose(weights, jax.nn.softmax(scores), rtol=1e-6)


def make_attention(**changes):
    sizes = {"use_bias": False, "backend": "einsum", "dtype": jnp.dtype("float32")} | changes
    return MultiHeadAttention(8, 2, 3, rngs=nnx.Rngs(0), **sizes)


def test_multi_head_attention_is_its_definition(rng):
    attention = make_attention(use_bias=True)
    x = jnp.asarray(rng.normal(size=(B, T, 8)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(B, S, 8)), jnp.float32)

    def head(i):
        def project(linear, inputs):
            return inputs @ linear.kernel[...][:, i] + linear.bias[...][i]

        query, key, value = (
            project(linear, inputs)
            for linear, inputs in (
                (attention.query, x),
                (attention.key, y),
                (attention.value, y),
            )
        )
        return jax.nn.softmax(query @ key.swapaxes(1, 2) / jnp.sqrt(3.0)) @ value

    concatenated = jnp.concatenate([head(0), head(1)], axis=-1)
    expected = concatenated @ attention.out.kernel[...].reshape(6, 8) + attention.out.bias[...]
    np.testing.assert_allclose(attention(x, attention.project(y)), expected, rtol=1e-4, atol=1e-5)


def test_weights_come_out_when_asked_for_and_cost_nothing_when_not(rng):
    attention = make_attention()
    x = jnp.asarray(rng.normal(size=(B, T, 8)), jnp.float32)
    maps = []
    with_maps = attention(x, attention.project(x), maps=maps)
    np.testing.assert_array_equal(attention(x, attention.project(x)), with_maps)
    np.testing.assert_allclose(maps[0].sum(-1), np.ones((B, 2, T)), rtol=1e-6)

    def dots(maps):
        jaxpr = jax.make_jaxpr(lambda x: attention(x, attention.project(x), maps=maps))(x)
        return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)

    assert dots(None) < dots([])


def test_write_places_new_positions_at_the_index(rng):
    cache = KeyValue(jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 4, 1, 2)))
    new = KeyValue(jnp.ones((1, 2, 1, 2)), 2 * jnp.ones((1, 2, 1, 2)))
    written = cache.write(new, jnp.int32(1))
    np.testing.assert_array_equal(written.key[0, :, 0, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(written.value[0, :, 0, 0], [0, 2, 2, 0])
