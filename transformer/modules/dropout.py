"""Dropout, and the RNG streams that a training step draws from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

CallRngs = nnx.Rngs | nnx.RngStream | None  # the type of `rngs` in calls


def training_rngs(key: Array) -> nnx.Rngs:
    """A stream for each use of randomness in training.

    Drawing from one does not advance the others: a replica whose traced rate is 0 is bit-identical
    to a single run without dropout, which draws nothing.
    """
    names = ("dropout", "attention", "positions", "layers")
    return nnx.Rngs(**{name: jax.random.fold_in(key, i) for i, name in enumerate(names)})


def stream_of(name: str, *given: CallRngs) -> nnx.RngStream | None:
    """The stream `name` of the first of `given` that is not None, or else its stream `dropout`."""
    rngs = next((each for each in given if each is not None), None)
    return rngs[name if name in rngs else "dropout"] if isinstance(rngs, nnx.Rngs) else rngs


def kept_stream(rngs: CallRngs, rate: float) -> nnx.RngStream | None:
    """The stream, if there is one, that a module keeps for calls without `rngs`, as in Flax."""
    without = isinstance(rngs, nnx.Rngs) and "dropout" not in rngs and "default" not in rngs
    stream = None if rate == 0.0 or without else stream_of("dropout", rngs)
    return None if stream is None else stream.fork()


class Moded(nnx.Module):
    """A module whose mode is set by `train()`, `eval()` and `nnx.view(…, deterministic=…)`."""

    deterministic: bool | None = False

    def is_deterministic(self, at_call: bool | None) -> bool:
        """The argument of the call if given, else the module's attribute."""
        mode = self.deterministic if at_call is None else at_call
        if mode is None:
            raise ValueError("dropout needs a mode: pass deterministic=, or call train() or eval()")
        return mode

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode, for `nnx.view`."""
        self.deterministic = self.deterministic if deterministic is None else deterministic


def dropout(
    x: Float[Array, "*B"], rate: float | Float[Array, ""], stream: Callable[[], Array] | None
) -> Float[Array, "*B"]:
    """Sets elements to 0 with probability `rate` and scales the others by 1 / (1 - rate).

    The numbers 0 and 1 draw no key; a traced rate always does. (Srivastava et al. 2014.)
    """
    if not isinstance(rate, jax.Array) and rate in (0.0, 1.0):
        return jnp.zeros_like(x) if rate else x
    if stream is None:
        raise ValueError("dropout needs random keys: pass rngs= to the constructor or the call")
    keep = jax.random.bernoulli(stream(), 1.0 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros_like(x))


class Dropout(Moded):
    """`nnx.Dropout`, whose rate may also be set to a traced scalar."""

    def __init__(self, rate: float, *, deterministic: bool | None = False, rngs: CallRngs = None):
        self.rate, self.deterministic = rate, deterministic
        self.rngs = nnx.data(kept_stream(rngs, rate))

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: CallRngs = None
    ) -> Array:
        if self.is_deterministic(deterministic):
            return inputs
        return dropout(inputs, self.rate, stream_of("dropout", rngs, self.rngs))
