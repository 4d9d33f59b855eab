import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import base
from transformer.model import Model, ModelConfig


def make(**changes):
    config = base.get_config().model
    config.update({"width": 16, "heads": 2, "ff_width": 32, "layers": 2} | changes)
    return Model(ModelConfig(**config), vocab_size=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite(dtype):
    model = make(dropout=0.1, dtype=dtype)
    tokens = jnp.ones((2, 5), jnp.int32)

    def loss(params):
        out = model.bind(params)(tokens, tokens, tokens, tokens, rngs=nnx.Rngs(dropout=1))
        return out.sum()

    gradients = jax.jit(jax.grad(loss))(model.init(jax.random.key(0)))
    assert all(jnp.isfinite(each).all() for each in gradients.values())
