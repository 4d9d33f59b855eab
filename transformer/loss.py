"""Cross-entropy with label smoothing, token by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    smoothing: float | Float[Array, ""] = 0.0,
) -> Float[Array, "B T"]:
    """Cross-entropy against (1 - ε) · one_hot(target) + ε / V, in nats, float32.

    Without smoothing it is -log p(target), of which exp is the perplexity. A target
    outside the vocabulary gives NaN. (Szegedy et al. 2016, section 7; Vaswani et al.
    2017, section 5.4, ε = 0.1.)
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1, mode="fill")[..., 0]
    if isinstance(smoothing, float) and smoothing == 0.0:
        return nll
    return (1.0 - smoothing) * nll - smoothing * log_p.mean(-1)
