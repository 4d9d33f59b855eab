"""Normalisation of the residual stream, and `NORMS`, the table of its kinds.

A norm is made from `(width, *, epsilon)` and called with x and with what training brings
(`dropout.Training`; None in evaluation), which batch norm alone looks at.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer.modules.dropout import Training


class Statistic(nnx.Variable):
    """What a module has seen in training: carried in the train state, not trained."""


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

    def __call__(
        self, x: Float[Array, "*B D"], training: Training | None = None
    ) -> Float[Array, "*B D"]:
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

    def __call__(
        self, x: Float[Array, "*B D"], training: Training | None = None
    ) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        return (wide / jnp.sqrt(mean_square + self.epsilon) * self.gain[...]).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation: mean 0 and variance 1 of each feature over the tokens of the batch.

        y = g · (x - μ) / √(σ² + ε) + b,    μ, σ² over all real tokens of the batch

    In training an output therefore depends on the other examples, and on later
    positions of its own; padding has no part in it. Evaluation uses running averages
    of μ and of the unbiased σ², old · 0.9 + new · 0.1, which begin at 0 and 1. On a
    mesh the batch is the whole one, over all devices. (Ioffe and Szegedy 2015,
    algorithms 1 and 2.)
    """

    momentum = 0.9

    def __init__(self, width: int, *, epsilon: float):
        self.epsilon = epsilon
        self.gain = nnx.Param(jnp.ones(width), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.mean = Statistic(jnp.zeros(width), axes=("norm",))
        self.variance = Statistic(jnp.ones(width), axes=("norm",))

    def __call__(
        self, x: Float[Array, "B T D"], training: Training | None = None
    ) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        if training is None:
            mean, variance = self.mean[...], self.variance[...]
        else:
            assert training.real is not None
            real = training.real[..., None]
            count = jnp.maximum(real.sum().astype(jnp.float32), 1.0)
            mean = jnp.where(real, wide, 0.0).sum((0, 1)) / count
            variance = jnp.where(real, jnp.square(wide - mean), 0.0).sum((0, 1)) / count
            self.remember(mean, variance * count / jnp.maximum(count - 1.0, 1.0))
        normalised = (wide - mean) / jnp.sqrt(variance + self.epsilon)
        return (normalised * self.gain[...] + self.bias[...]).astype(x.dtype)

    def remember(self, mean: Float[Array, "D"], variance: Float[Array, "D"]) -> None:
        """Moves the running averages towards a batch's."""
        for running, new in ((self.mean, mean), (self.variance, variance)):
            running[...] = self.momentum * running[...] + (1.0 - self.momentum) * new


class NoNorm(nnx.Module):
    """No normalisation: y = x."""

    def __init__(self, width: int, *, epsilon: float):
        pass

    def __call__(
        self, x: Float[Array, "*B D"], training: Training | None = None
    ) -> Float[Array, "*B D"]:
        return x


NORMS = {"layer": LayerNorm, "rms": RMSNorm, "batch": BatchNorm, "none": NoNorm}
