"""Where a token stands, told to the model; `POSITIONS` is the table of the ways."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Position(nnx.Module):
    """How positions enter the model: three hooks, of which a way overrides those that it needs.

    Each stack has one of its own, which all of its layers share. `rotate` and `bias` act
    in self-attention alone: a source and its target have no common place to count from.
    As it stands here it tells nothing: order is then known only through the causal mask.

    Args:
      width: of the model, D.
      heads: of attention, N.
      causal: whether the stack's keys are never later than the query (the decoder).
      max_length: positions are below it where `limited`.
      rngs: for parameters.
    """

    # Whether there are only `max_length` positions.
    limited = False

    def __init__(self, width: int, heads: int, *, causal: bool, max_length: int, rngs: nnx.Rngs):
        pass

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The embedded tokens `x`, told that they stand at `positions`."""
        return x

    def rotate(
        self, x: Float[Array, "B T N H"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T N H"]:
        """The queries or keys `x`, told that they stand at `positions`."""
        return x

    def bias(
        self, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
    ) -> Float[Array, "#B N T S"] | None:
        """What is added to the scores between queries and keys that stand there."""
        return None


class Sinusoidal(Position):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(p / 10000^(2i/D)), added.

    Computed in float32 from the positions themselves, so any length will do.
    (Vaswani et al. 2017, section 3.5.)
    """

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        angle = angles(positions, x.shape[-1])
        encoding = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return x + encoding.reshape(*positions.shape, x.shape[-1]).astype(x.dtype)


class Learned(Position):
    """A trained vector for each position, added.

    Begins with variance 1, as embedded tokens do. (Vaswani et al. 2017, Table 3, row E;
    Gehring et al. 2017.)
    """

    limited = True

    def __init__(self, width: int, heads: int, *, causal: bool, max_length: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(1.0)
        self.table = nnx.Param(init(rngs.params(), (max_length, width)), axes=("position", "embed"))

    def embed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        # Past the table the answer is NaN, not the last row.
        return x + self.table[...].at[positions].get(mode="fill").astype(x.dtype)


class Rotary(Position):
    """Queries and keys turned by angles in proportion to their positions.

    Coordinates i and i + H/2 of a head turn together by p / 10000^(2i/H), so that a score
    depends on the distance between query and key. (Su et al. 2021, section 3.2; which
    coordinates make a pair is a matter of naming, and halves are cheaper than neighbours.)
    """

    def rotate(
        self, x: Float[Array, "B T N H"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T N H"]:
        angle = angles(positions, x.shape[-1])[:, :, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)
        return turned.astype(x.dtype)


class RelativeBias(Position):
    """A trained scalar for each head and each bucket of distances, added to the scores.

    32 buckets: half of those of a direction hold one distance each, the rest grow
    logarithmically up to 128 and beyond. The encoder divides its buckets between earlier
    and later keys. (T5: Raffel et al. 2020, section 2.1, and its published code.)
    """

    buckets, farthest = 32, 128

    def __init__(self, width: int, heads: int, *, causal: bool, max_length: int, rngs: nnx.Rngs):
        self.causal = causal
        init = nnx.initializers.normal(width**-0.5)
        shape = (self.buckets, heads)
        self.table = nnx.Param(init(rngs.params(), shape), axes=("position", "heads"))

    def bucket(self, distance: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The bucket of key position - query position."""
        buckets, first = self.buckets, jnp.zeros_like(distance)
        if not self.causal:
            buckets //= 2
            first = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
        exact = buckets // 2
        steps = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
        steps = steps / jnp.log(self.farthest / exact) * (buckets - exact)
        far = jnp.minimum(exact + steps.astype(jnp.int32), buckets - 1)
        return first + jnp.where(distance < exact, distance, far)

    def bias(
        self, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        bucket = self.bucket(keys[:, None, :] - queries[:, :, None])
        return jnp.moveaxis(self.table[...][bucket], -1, 1)


class ALiBi(Position):
    """Scores fall with the distance |i - j|, in head h = 1 … N with slope 2^(-8h/N).

    (Press, Smith and Lewis 2022, section 3. The encoder takes the distance to either
    side; and the formula serves every N, where the paper interleaves two series if N is
    no power of 2.)
    """

    def __init__(self, width: int, heads: int, *, causal: bool, max_length: int, rngs: nnx.Rngs):
        self.heads = heads

    def bias(
        self, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        slopes = 2.0 ** (-8.0 * jnp.arange(1, self.heads + 1, dtype=jnp.float32) / self.heads)
        distance = jnp.abs(queries[:, None, :, None] - keys[:, None, None, :])
        return -slopes[:, None, None] * distance.astype(jnp.float32)


def angles(positions: Int[Array, "#B T"], width: int) -> Float[Array, "#B T half"]:
    """p / 10000^(2i/width) for i = 0 … width/2 - 1, in float32."""
    rate = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[..., None].astype(jnp.float32) * rate


POSITIONS = {
    "none": Position,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rotary": Rotary,
    "relative": RelativeBias,
    "alibi": ALiBi,
}
