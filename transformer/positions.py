"""Where a token stands, told to the model; `POSITIONS` is the table of the ways."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Position(nnx.Module):
    """How positions enter the model. A new way overrides the hook that it needs."""

    # Whether there are only `max_length` positions.
    limited = False

    def __init__(self, width: int, *, max_length: int, rngs: nnx.Rngs):
        """Makes what it needs for a model of `width` and up to `max_length` positions."""

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The embedded tokens `x`, told that they stand at `positions`."""
        raise NotImplementedError


class Sinusoidal(Position):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(p / 10000^(2i/D)), added.

    Computed in float32 from the positions themselves, so any length will do.
    (Vaswani et al. 2017, section 3.5.)
    """

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        rate = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angle = positions[..., None].astype(jnp.float32) * rate
        encoding = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return x + encoding.reshape(*angle.shape[:-1], width).astype(x.dtype)


class Learned(Position):
    """A trained vector for each position, added.

    Begins as small as the embedding of a token before scaling. (Vaswani et al.
    2017, Table 3, row E; Gehring et al. 2017.)
    """

    limited = True

    def __init__(self, width: int, *, max_length: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (max_length, width)), axes=("position", "embed"))

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        # Past the table the answer is NaN, not the last row.
        return x + self.table[...].at[positions].get(mode="fill").astype(x.dtype)


POSITIONS = {"sinusoidal": Sinusoidal, "learned": Learned}
