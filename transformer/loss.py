"""The loss: cross-entropy of each target token, with label smoothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLosses(NamedTuple):
    """Cross-entropies of each token's prediction, in nats, float32."""

    nll: Float[Array, "*B"]  # -log p(target); exp of its mean is the perplexity
    uniform: Float[Array, "*B"]  # against the uniform distribution over the vocabulary

    def smoothed(self, smoothing: float | Float[Array, ""]) -> Float[Array, "*B"]:
        """The cross-entropy against (1 - ε) · one_hot(target) + ε / V, which training minimises.

        Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4, with ε = 0.1.
        """
        if isinstance(smoothing, float) and smoothing == 0.0:
            return self.nll
        return (1.0 - smoothing) * self.nll + smoothing * self.uniform


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> TokenLosses:
    """The losses of each token; NaN for a target outside the vocabulary."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1, mode="fill")[..., 0]
    return TokenLosses(nll, -log_p.mean(-1))
