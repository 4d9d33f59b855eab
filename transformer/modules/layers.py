"""The parts of a layer that are not attention: embedding, feed-forward, residual connection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.modules.dropout import Training, drop
from transformer.modules.normalization import NORMS
from transformer.parallel.mesh import constrain

# How the matrices of attention and feed-forward begin.
INITIALIZERS = {
    "glorot_uniform": nnx.initializers.glorot_uniform(),  # Glorot and Bengio 2010
    "glorot_normal": nnx.initializers.glorot_normal(),
    "lecun_normal": nnx.initializers.lecun_normal(),
    "he_normal": nnx.initializers.he_normal(),  # He et al. 2015
    "normal": nnx.initializers.normal(0.02),  # Radford et al. 2019 (GPT-2)
}

# The kinds of feed-forward: activation, and whether it gates a second product (Shazeer 2020).
FEED_FORWARDS = {
    "relu": (jax.nn.relu, False),
    "gelu": (jax.nn.gelu, False),
    "swish": (jax.nn.swish, False),
    "glu": (jax.nn.sigmoid, True),
    "reglu": (jax.nn.relu, True),
    "geglu": (jax.nn.gelu, True),
    "swiglu": (jax.nn.swish, True),
}

NORM_PLACEMENTS = ("pre", "post", "both")


class Embedding(nnx.Module):
    """One vector a token, times √D; its transpose gives the logits where they are tied.

    Initialised with variance 1/D, so that embedded tokens have variance 1 and tied
    logits begin with about that too. (Vaswani et al. 2017, section 3.4.)
    """

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (vocab_size, width)), axes=("vocab", "embed"))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds `tokens`; one outside the vocabulary becomes NaN."""
        # Gathered over fsdp first: a lookup in a table split along D would come out
        # split along D, and XLA could only make it whole again on every device.
        table = constrain(self.table[...], "vocab", "width")
        # Cast afterwards: the gradient sums over a token's occurrences in the table's dtype.
        embedded = table.at[tokens].get(mode="fill").astype(self.dtype) * table.shape[-1] ** 0.5
        return constrain(embedded, "batch", "length", "width")

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """x Eᵀ, summed in float32."""
        table = self.table[...].astype(self.dtype)
        logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "length", "vocab")


class Linear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` whose bias has a gradient summed in float32, whatever the dtype."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:  # pyright: ignore
        kernel = self.kernel[...].astype(self.dtype)
        product = jnp.tensordot(x.astype(self.dtype), kernel, axes=len(self.axis))
        return product if self.bias is None else add_bias(product, self.bias[...])


def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + bias. Cast after it is broadcast: the gradient's sum is then in the bias's dtype."""
    return x + jnp.broadcast_to(bias, x.shape).astype(x.dtype)


class FeedForward(nnx.Module):
    """FFN(x) = activation(x W₁ + b₁) W₂ + b₂, at each position alike. (Section 3.3, equation 2.)

    The gated kinds have FFN(x) = (activation(x W₁ + b₁) ⊙ (x W₃ + b₃)) W₂ + b₂ (Shazeer
    2020, with biases as here): a third matrix, so that their hidden width is 2/3 of
    `ff_width`, rounded to a multiple of 8, and the parameters are as many.
    """

    def __init__(
        self,
        width: int,
        ff_width: int,
        *,
        kind: str,
        init: Callable[..., Array],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation, gated = FEED_FORWARDS[kind]
        hidden = max(8, round(ff_width * 2 / 3 / 8) * 8) if gated else ff_width

        def expand():
            return Linear(
                width,
                hidden,
                kernel_init=init,
                kernel_metadata={"axes": ("embed", "mlp")},
                bias_metadata={"axes": ("mlp",)},
                dtype=dtype,
                rngs=rngs,
            )

        self.expand = expand()
        self.gate = expand() if gated else None
        self.contract = Linear(
            hidden,
            width,
            kernel_init=init,
            kernel_metadata={"axes": ("mlp", "embed")},
            bias_metadata={"axes": ("norm",)},
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = self.activation(self.expand(x))
        hidden = hidden if self.gate is None else hidden * self.gate(x)
        return self.contract(constrain(hidden, "batch", "length", "mlp"))


class Residual(nnx.Module):
    """The connection around a sublayer, which owns the place of the norm and the dropout.

        post:  x ← norm(x + dropout(sublayer(x)))       (Vaswani et al. 2017, section 3.1)
        pre:   x ← x + dropout(sublayer(norm(x)))       (Xiong et al. 2020)
        both:  x ← x + dropout(norm₂(sublayer(norm(x))))  (Ding et al. 2021, "sandwich")

    A sublayer f is written `x = residual.add(x, f(residual.input(x, …)), …)`.
    """

    def __init__(self, width: int, *, norm: str, epsilon: float, placement: str):
        self.norm = NORMS[norm](width, epsilon=epsilon)
        self.output_norm = NORMS[norm](width, epsilon=epsilon) if placement == "both" else None
        self.placement = placement

    def input(
        self, x: Float[Array, "B T D"], training: Training | None = None
    ) -> Float[Array, "B T D"]:
        """What the sublayer reads."""
        return x if self.placement == "post" else self.norm(x, training)

    def add(
        self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], training: Training | None = None
    ) -> Float[Array, "B T D"]:
        """The stream `x` with the sublayer's output `y` added."""
        y = y if self.output_norm is None else self.output_norm(y, training)
        x = constrain(x + drop(y, training), "batch", "length", "width")
        return self.norm(x, training) if self.placement == "post" else x
