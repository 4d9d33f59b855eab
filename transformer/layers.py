"""The parts of a layer that are not attention: embedding, feed-forward, residual, dropout."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.normalization import NORMS
from transformer.sharding import constrain

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swish": jax.nn.swish}
NORM_PLACEMENTS = ("pre", "post")


def dropout(x: Float[Array, "*B D"], rate: float, rngs: nnx.Rngs | None) -> Float[Array, "*B D"]:
    """Sets elements to 0 with probability `rate` and scales the others by 1 / (1 - rate).

    Without `rngs`, or at rate 0, it hands x back: that is what evaluation is. Each
    call draws a key of its own from the stream `dropout`.
    """
    if rngs is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rngs.dropout(), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


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
        table = constrain(self.table[...].astype(self.dtype), "vocab", "width")
        embedded = table.at[tokens].get(mode="fill") * table.shape[-1] ** 0.5
        return constrain(embedded, "batch", "length", "width")

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """x Eᵀ, summed in float32."""
        table = self.table[...].astype(self.dtype)
        logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "length", "vocab")


class FeedForward(nnx.Module):
    """FFN(x) = activation(x W₁ + b₁) W₂ + b₂, at each position alike. (Section 3.3, equation 2.)"""

    def __init__(
        self, width: int, ff_width: int, *, activation: str, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        init = nnx.initializers.glorot_uniform()
        self.expand = nnx.Linear(
            width,
            ff_width,
            kernel_init=init,
            kernel_metadata={"axes": ("embed", "mlp")},
            bias_metadata={"axes": ("mlp",)},
            dtype=dtype,
            rngs=rngs,
        )
        self.contract = nnx.Linear(
            ff_width,
            width,
            kernel_init=init,
            kernel_metadata={"axes": ("mlp", "embed")},
            bias_metadata={"axes": ("norm",)},
            dtype=dtype,
            rngs=rngs,
        )
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = constrain(self.activation(self.expand(x)), "batch", "length", "mlp")
        return self.contract(hidden)


class Residual(nnx.Module):
    """The connection around a sublayer, which owns the place of the norm and the dropout.

        post:  x ← norm(x + dropout(sublayer(x)))      (Vaswani et al. 2017, section 3.1)
        pre:   x ← x + dropout(sublayer(norm(x)))      (Xiong et al. 2020)

    A sublayer f is written `x = residual.add(x, f(residual.input(x)), rngs)`.
    """

    def __init__(self, width: int, *, norm: str, epsilon: float, placement: str, dropout: float):
        self.norm = NORMS[norm](width, epsilon=epsilon)
        self.placement = placement
        self.dropout = dropout

    def input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the sublayer reads."""
        return self.norm(x) if self.placement == "pre" else x

    def add(
        self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], rngs: nnx.Rngs | None
    ) -> Float[Array, "B T D"]:
        """The stream `x` with the sublayer's output `y` added."""
        x = constrain(x + dropout(y, self.dropout, rngs), "batch", "length", "width")
        return self.norm(x) if self.placement == "post" else x
