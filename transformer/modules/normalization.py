"""Normalisation layers, with `nnx`'s arguments and parameter names, and `NORMS`, their table.

Entries are constructed with `(num_features, *, epsilon, dtype, param_dtype, rngs)`.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from jaxtyping import Array, Float

from transformer.modules.linear import Initializer, axis_names, zeros

ones = nnx.initializers.ones_init()


class Norm(nnx.Module):
    """Base class of norms: the arguments of `nnx.LayerNorm`, and the scale and bias that follow.

    These do not advance `rngs`: other parameters begin alike with every norm.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        rngs: nnx.Rngs,
    ):
        def parameter(init: Initializer) -> nnx.Param[Array]:
            value = init(rngs.params.key[...], (num_features,), param_dtype)
            return nnx.Param(value, **axis_names("norm"))

        self.num_features, self.epsilon, self.dtype = num_features, epsilon, dtype
        self.scale: nnx.Param[Array] | None = nnx.data(parameter(scale_init) if use_scale else None)
        self.bias: nnx.Param[Array] | None = nnx.data(parameter(bias_init) if use_bias else None)

    def scaled(self, normalised: Float[Array, "*B D"], x: Float[Array, "*B D"]) -> Array:
        """`normalised` (float32) times scale plus bias, in the dtype of the output for x."""
        scale, bias = (None if each is None else each[...] for each in (self.scale, self.bias))
        if scale is not None:
            normalised = normalised * scale.astype(jnp.float32)
        if bias is not None:
            normalised = normalised + bias.astype(jnp.float32)
        return normalised.astype(canonicalize_dtype(x, scale, bias, dtype=self.dtype))


class LayerNorm(Norm):
    """Layer normalisation of each position: mean 0 and variance 1, then scale and bias.

        y = g · (x - μ) / √(σ² + ε) + b,    μ = mean(x),  σ² = mean((x - μ)²)

    Arguments of `nnx.LayerNorm`. Computed in float32 and two passes: in Flax's single pass,
    mean(x²) - mean(x)², a large mean costs all precision. (Ba et al. 2016, section 3.)
    """

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return self.scaled(centred / jnp.sqrt(variance + self.epsilon), x)


class RMSNorm(Norm):
    """`nnx.RMSNorm`: y = g · x / √(mean(x²) + ε), in float32. (Zhang and Sennrich 2019.)"""

    def __init__(self, num_features: int, **options: Any):
        super().__init__(num_features, use_bias=False, bias_init=zeros, **options)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        return self.scaled(wide / jnp.sqrt(mean_square + self.epsilon), x)


class BatchNorm(Norm):
    """Batch normalisation: mean 0 and variance 1 of each feature over the tokens of the batch.

        y = g · (x - μ) / √(σ² + ε) + b,    μ, σ² over the positions where `mask` is True

    Arguments of `nnx.BatchNorm`. In training, an output depends on the whole batch, and on later
    positions of its example. Evaluation uses running averages of μ and of the unbiased σ² (Flax:
    biased), old · momentum + new · (1 - momentum). (Ioffe and Szegedy 2015, section 3.)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        **options: Any,
    ):
        super().__init__(num_features, epsilon=epsilon, **options)
        self.use_running_average, self.momentum = use_running_average, momentum
        self.mean = nnx.BatchStat(jnp.zeros(num_features), **axis_names("norm"))
        self.var = nnx.BatchStat(jnp.ones(num_features), **axis_names("norm"))

    def __call__(
        self, x: Float[Array, "*B D"], use_running_average: bool | None = None, *, mask: Any = None
    ) -> Float[Array, "*B D"]:
        """Normalises x by the positions where `mask` [B, T, 1] is True, or by running averages."""
        wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            mean, variance = self.mean[...], self.var[...]
        else:
            mask = jnp.atleast_1d(jnp.asarray(True if mask is None else mask, bool))
            real = jnp.broadcast_to(mask, (*x.shape[:-1], mask.shape[-1]))
            count = jnp.maximum(real.sum(axes).astype(jnp.float32), 1.0)
            mean = jnp.where(real, wide, 0.0).sum(axes) / count
            variance = jnp.where(real, jnp.square(wide - mean), 0.0).sum(axes) / count
            unbiased = variance * count / jnp.maximum(count - 1.0, 1.0)
            for running, new in ((self.mean, mean), (self.var, unbiased)):
                running[...] = self.momentum * running[...] + (1.0 - self.momentum) * new
        return self.scaled((wide - mean) / jnp.sqrt(variance + self.epsilon), x)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode, for `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class NoNorm(nnx.Module):
    """No normalisation: y = x."""

    def __init__(self, num_features: int, **options: Any): ...

    def __call__(self, x: Array) -> Array:
        return x


NORMS = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "batch": partial(BatchNorm, momentum=0.9),
    "none": NoNorm,
}
