import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.normalization import NORMS, LayerNorm, RMSNorm

WIDTH = 64


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_layer_norm_has_mean_0_and_variance_1_for_any_weights(seed, scale):
    key = jax.random.key(seed)
    x = jax.random.normal(key, (4, 5, 16))
    weights = scale * jax.random.normal(jax.random.fold_in(key, 1), (16, WIDTH))
    bias = scale * jax.random.normal(jax.random.fold_in(key, 2), (WIDTH,))
    out = LayerNorm(WIDTH, epsilon=1e-6)(x @ weights + bias)
    np.testing.assert_allclose(out.mean(-1), np.zeros((4, 5)), atol=1e-5)
    np.testing.assert_allclose(out.var(-1), np.ones((4, 5)), rtol=2e-2 if scale < 1 else 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_is_right_where_the_one_pass_variance_is_wrong(dtype):
    x = (1e4 + jax.random.normal(jax.random.key(0), (8, WIDTH))).astype(dtype)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    out = np.asarray(LayerNorm(WIDTH, epsilon=1e-6)(x).astype(jnp.float32))
    assert np.abs(out - exact).max() < (5e-3 if dtype == "float32" else 2e-2)
    if dtype == "float32":
        wide = x.astype(jnp.float32)
        one_pass = jnp.square(wide).mean(-1) - jnp.square(wide.mean(-1))
        assert np.abs(one_pass - exact.var(-1)).max() > 0.5  # the form that is not used


def test_epsilon_stands_inside_the_root():
    x = jnp.full((1, WIDTH), 3.0).at[0, ::2].set(-3.0)
    out = LayerNorm(WIDTH, epsilon=7.0)(x)
    np.testing.assert_allclose(jnp.abs(out), 3 / np.sqrt(9 + 7), rtol=1e-6)
    out = RMSNorm(WIDTH, epsilon=7.0)(x)
    np.testing.assert_allclose(jnp.abs(out), 3 / np.sqrt(9 + 7), rtol=1e-6)


def test_gain_and_bias():
    norm = LayerNorm(WIDTH, epsilon=1e-6)
    x = jax.random.normal(jax.random.key(0), (3, WIDTH))
    plain = norm(x)
    norm.gain[...] = jnp.full(WIDTH, 2.0)
    norm.bias[...] = jnp.full(WIDTH, 5.0)
    np.testing.assert_allclose(norm(x), 2 * plain + 5, rtol=1e-5)


def test_rms_norm_has_mean_square_1():
    out = RMSNorm(WIDTH, epsilon=1e-6)(3 + jax.random.normal(jax.random.key(0), (5, WIDTH)))
    np.testing.assert_allclose(jnp.square(out).mean(-1), np.ones(5), rtol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_batch_mates_and_other_positions_do_not_matter(name):
    norm = NORMS[name](WIDTH, epsilon=1e-6)
    x = jax.random.normal(jax.random.key(0), (4, 3, WIDTH))
    changed = x.at[1:].mul(100.0).at[0, 1:].add(7.0)
    np.testing.assert_array_equal(norm(x)[0, 0], norm(changed)[0, 0])
    np.testing.assert_array_equal(norm(x)[:1], norm(x[:1]))


@pytest.mark.parametrize("name", NORMS)
def test_dtype_is_kept_and_gradients_of_a_constant_row_are_finite(name):
    norm = NORMS[name](WIDTH, epsilon=1e-6)
    assert norm(jnp.ones((2, WIDTH), jnp.bfloat16)).dtype == jnp.bfloat16
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((2, WIDTH)))
    assert jnp.isfinite(gradient).all()
