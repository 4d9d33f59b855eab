"""Normalisation of the residual stream, and `NORMS`, the table of its kinds."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.Module):
    """Layer normalisation: mean 0 and variance 1 over the width, then gain and bias.

        y = g · (x - μ) / √(σ² + ε) + b,    μ = mean(x),  σ² = mean((x - μ)²)

    Each position of each example is normalised by itself: before gain and bias the
    output has mean 0 and variance 1 whatever weights made x, and neither the batch
    nor its size matters, in training as in use, unlike batch normalisation.
    (Ba, Kiros and Hinton 2016, section 3.)

    Statistics are taken in float32 whatever the dtype of x, and in two passes: the
    one-pass form mean(x²) - mean(x)² loses every digit where the mean is large.
    """

    def __init__(self, width: int, *, epsilon: float):
        self.epsilon = epsilon
        self.gain = nnx.Param(jnp.ones(width), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normalised = centred / jnp.sqrt(variance + self.epsilon)
        return (normalised * self.gain[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Layer normalisation without the centring: y = g · x / √(mean(x²) + ε).

    Statistics in float32. (Zhang and Sennrich 2019, equation 4.)
    """

    def __init__(self, width: int, *, epsilon: float):
        self.epsilon = epsilon
        self.gain = nnx.Param(jnp.ones(width), axes=("norm",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        return (wide / jnp.sqrt(mean_square + self.epsilon) * self.gain[...]).astype(x.dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
