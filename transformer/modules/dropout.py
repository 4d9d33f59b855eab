"""Dropout, and what else a call of the model is given in training and not in evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key


class Training(NamedTuple):
    """What training brings to a call of the model; evaluation passes None in its place.

    Rates are numbers, or traced scalars where the replicas of a population differ.

    rngs: the streams of `streams`, of which each use draws a key of its own.
    dropout: rate on the embedded tokens and on each sublayer's output.
    attention_dropout: rate on the attention weights.
    real: which positions of the sequence at hand are tokens and not padding.
    """

    rngs: nnx.Rngs
    dropout: float | Float[Array, ""]
    attention_dropout: float | Float[Array, ""] = 0.0
    real: Bool[Array, "B T"] | None = None

    def of_each_layer(self, layers: int) -> Key[Array, "{layers}"]:
        """A key for each layer of a stack, see `of_layer`."""
        return jax.random.split(self.rngs.layers(), layers)

    def of_layer(self, key: Key[Array, ""]) -> "Training":
        """The same with streams of a layer's own, which draw alike however layers are run."""
        return self._replace(rngs=streams(key))

    def over(self, segments: Int[Array, "B T"]) -> "Training":
        """The same for the sequence whose segments these are."""
        return self._replace(real=segments > 0)


def streams(key: Array) -> nnx.Rngs:
    """A stream of keys for each thing that is random in training.

    One each, so that what one of them draws, or does not at rate 0, moves no other: a
    replica whose rate is a traced 0 is then the single run that drops nothing.
    """
    names = ("dropout", "attention", "positions", "layers")
    return nnx.Rngs(**{name: jax.random.fold_in(key, i) for i, name in enumerate(names)})


def dropout(
    x: Float[Array, "*B D"], rate: float | Float[Array, ""], stream: Callable[[], Array]
) -> Float[Array, "*B D"]:
    """Sets elements to 0 with probability `rate` and scales the others by 1 / (1 - rate).

    Each call draws a key of its own from `stream`; at rate 0.0, none is drawn and x comes
    back. (Srivastava et al. 2014.)
    """
    if isinstance(rate, float) and rate == 0.0:
        return x
    keep = jax.random.bernoulli(stream(), 1.0 - rate, x.shape)
    scale = jnp.asarray(1.0 / (1.0 - rate), x.dtype)
    return jnp.where(keep, x * scale, jnp.zeros_like(x))


def drop(x: Float[Array, "*B D"], training: Any) -> Float[Array, "*B D"]:
    """`x` with the dropout of a `Training`; in evaluation, when that is None, `x` itself."""
    return x if training is None else dropout(x, training.dropout, training.rngs.dropout)
