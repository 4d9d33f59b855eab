import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.dropout import Training
from transformer.normalization import NORMS, BatchNorm, LayerNorm, NoNorm, RMSNorm

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
    def total(x, training):
        return NORMS[name](WIDTH, epsilon=1e-6)(x, training).sum()

    for training in (None, training_over(jnp.ones((1, 2), jnp.int32))):
        assert total(jnp.ones((1, 2, WIDTH), jnp.bfloat16), training).dtype == jnp.bfloat16
        gradient = jax.grad(total)(jnp.zeros((1, 2, WIDTH)), training)
        assert jnp.isfinite(gradient).all()


def training_over(segments):
    return Training(nnx.Rngs(dropout=0), 0.0).over(segments)


SEGMENTS = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


def test_batch_norm_has_mean_0_and_variance_1_over_the_tokens_of_the_batch(rng):
    x = jnp.asarray(rng.normal(3.0, 5.0, size=(4, 5, WIDTH)), jnp.float32)
    out = BatchNorm(WIDTH, epsilon=1e-6)(x, training_over(SEGMENTS))[SEGMENTS > 0]
    np.testing.assert_allclose(out.mean(0), np.zeros(WIDTH), atol=1e-5)
    np.testing.assert_allclose(out.var(0), np.ones(WIDTH), rtol=1e-4)


def test_batch_norm_does_not_see_padding(rng):
    """Neither what stands in it nor how much there is, in outputs and in running averages."""
    x = jnp.asarray(rng.normal(size=(4, 5, WIDTH)), jnp.float32)
    other = jnp.where(SEGMENTS[..., None] > 0, x, 1e6)
    wider = jnp.pad(x, ((0, 2), (0, 3), (0, 0)), constant_values=7.0)
    real = SEGMENTS > 0
    results = []
    for each in (x, other, wider):
        norm, shape = BatchNorm(WIDTH, epsilon=1e-6), each.shape
        segments = jnp.zeros(shape[:2], jnp.int32).at[:4, :5].set(SEGMENTS)
        out = norm(each, training_over(segments))[:4, :5][real]
        results.append((out, norm.mean[...], norm.variance[...]))
    for result in results[1:]:
        for one, same in zip(results[0], result, strict=True):
            np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-6)


def test_batch_norm_evaluates_with_running_averages(rng):
    norm, mean, variance = BatchNorm(WIDTH, epsilon=1e-6), 0.0, 1.0
    for _ in range(2):
        x = rng.normal(2.0, 3.0, size=(4, 5, WIDTH)).astype(np.float32)
        norm(jnp.asarray(x), training_over(SEGMENTS))
        tokens = x[np.asarray(SEGMENTS) > 0]
        mean = 0.9 * mean + 0.1 * tokens.mean(0)
        variance = 0.9 * variance + 0.1 * tokens.var(0, ddof=1)
    before = jax.tree.map(jnp.copy, nnx.state(norm))
    out = norm(jnp.asarray(x))
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(variance + 1e-6), rtol=1e-4, atol=1e-5)
    for one, same in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(norm)), strict=True):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("name", NORMS)
def test_in_training_batch_mates_matter_to_batch_norm_alone(name, rng):
    norm = NORMS[name](WIDTH, epsilon=1e-6)
    x = jnp.asarray(rng.normal(size=(4, 5, WIDTH)), jnp.float32)
    training = training_over(SEGMENTS)
    one, other = norm(x, training), norm(x.at[1:].mul(100.0), training)
    assert (one[0, 0] == other[0, 0]).all() == (name != "batch")


def test_no_norm_is_nothing(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, WIDTH)), jnp.float32)
    assert NoNorm(WIDTH, epsilon=1e-6)(x) is x
