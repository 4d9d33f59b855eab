from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.modules.layers import apply_norm
from transformer.modules.normalization import NORMS, BatchNorm, LayerNorm

WIDTH = 64
SEGMENTS = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
each_norm = pytest.mark.parametrize("name", NORMS)


def make(norm, epsilon=1e-6, **options):
    return norm(WIDTH, epsilon=epsilon, rngs=nnx.Rngs(0), **options)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_is_right_where_the_one_pass_variance_is_wrong(dtype):
    x = (1e4 + jax.random.normal(jax.random.key(0), (8, WIDTH))).astype(dtype)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    out = np.asarray(make(LayerNorm, dtype=x.dtype)(x).astype(jnp.float32))
    assert np.abs(out - exact).max() < (5e-3 if dtype == "float32" else 2e-2)


@each_norm
def test_batch_mates_and_other_positions_matter_to_batch_norm_in_training_alone(name, rng):
    norm, x = make(NORMS[name]), normal(rng, 4, 5)
    changed = x.at[1:].mul(100.0).at[0, 1:].add(7.0)
    evaluate = partial(apply_norm, norm, deterministic=True)
    np.testing.assert_array_equal(evaluate(x)[0, 0], evaluate(changed)[0, 0])
    np.testing.assert_array_equal(evaluate(x)[:1], evaluate(x[:1]))
    one, other = (apply_norm(norm, each, SEGMENTS > 0) for each in (x, changed))
    assert (one[0, 0] == other[0, 0]).all() == (name != "batch")


def test_no_norm_is_the_identity():
    x = jnp.ones((2, WIDTH))
    assert make(NORMS["none"])(x) is x


@each_norm
def test_dtype_is_kept_and_gradients_of_a_constant_row_are_finite(name):
    def total(x, deterministic):
        norm = make(NORMS[name], dtype=x.dtype)
        return apply_norm(norm, x, deterministic=deterministic).sum()

    for mode in (True, False):
        assert total(jnp.ones((1, 2, WIDTH), jnp.bfloat16), mode).dtype == jnp.bfloat16
        assert jnp.isfinite(jax.grad(total)(jnp.zeros((1, 2, WIDTH)), mode)).all()


def test_batch_norm_normalises_over_tokens_and_does_not_see_padding(rng):
    x = 3 + 5 * normal(rng, 4, 5)
    other = jnp.where(SEGMENTS[..., None] > 0, x, 1e6)
    wider = jnp.pad(x, ((0, 2), (0, 3), (0, 0)), constant_values=7.0)
    results = []
    for each in (x, other, wider):
        norm = make(BatchNorm)
        segments = jnp.zeros(each.shape[:2], jnp.int32).at[:4, :5].set(SEGMENTS)
        out = norm(each, mask=segments[..., None] > 0)[:4, :5][SEGMENTS > 0]
        results.append((out, norm.mean[...], norm.var[...]))
    np.testing.assert_allclose(results[0][0].mean(0), np.zeros(WIDTH), atol=1e-5)
    np.testing.assert_allclose(results[0][0].var(0), np.ones(WIDTH), rtol=1e-4)
    for one, *others in zip(*results, strict=True):
        np.testing.assert_allclose(np.stack(others), np.stack([one] * 2), rtol=1e-5, atol=1e-6)


def test_batch_norm_evaluates_with_running_averages(rng):
    norm, mean, variance = make(NORMS["batch"]), 0.0, 1.0
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
