import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.loss import TokenLosses, cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_against_the_smoothed_distribution(smoothing, rng):
    logits = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(7, size=(2, 3)))
    smoothed = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    expected = -(smoothed * np.log(jax.nn.softmax(logits))).sum(-1)
    losses = cross_entropy(logits, targets)
    np.testing.assert_allclose(losses.smoothed(smoothing), expected, rtol=1e-5)
    traced = jax.jit(TokenLosses.smoothed)(losses, jnp.float32(smoothing))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


def test_it_is_stable_in_float32_for_bfloat16_logits_and_nan_outside_the_vocabulary():
    loss = cross_entropy(jnp.array([[[3e4, 0.0]]], jnp.bfloat16), jnp.array([[1]])).nll
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [[3e4]], rtol=1e-2)
    assert jnp.isnan(cross_entropy(jnp.zeros((1, 1, 4)), jnp.array([[4]])).nll).all()
