"""Position encodings, and `POSITIONS`, their table."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.modules.linear import axis_names


class Position(nnx.Module):
    """A position encoding: three hooks, which do nothing here and which subclasses override.

    Each stack has one, shared by its layers. `rotate` and `bias` apply only to self-attention,
    since source and target positions are not comparable.

    Args:
      features: D.
      num_heads: N.
      max_length: number of positions, for subclasses that are `limited`.
      causal: whether no key is later than the query, as in the decoder.
      rngs: random keys, for subclasses with parameters.
    """

    # Whether positions end at `max_length`.
    limited = False

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 1,
        max_length: int = 512,
        causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        self.num_heads, self.causal = num_heads, causal

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Adds the encoding of the positions to x; by default they are 0 … T - 1."""
        return x

    def rotate(
        self, x: Float[Array, "B T N H"], positions: Int[Array, "#B T"] | None = None
    ) -> Float[Array, "B T N H"]:
        """Rotates the queries or keys x by their positions."""
        return x

    def bias(
        self, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
    ) -> Float[Array, "#B N T S"] | None:
        """The bias that is added to the scores between these positions; None: no bias."""
        return None


def in_row(x: Array, positions: Int[Array, "#B T"] | None) -> Int[Array, "#B T"]:
    """The given positions, or by default 0 … T - 1 for x of shape [B, T, …]."""
    return jnp.arange(x.shape[1])[None] if positions is None else positions


class Sinusoidal(Position):
    """Adds PE(p, 2i) = sin(p / 10000^(2i/D)) and PE(p, 2i+1) = cos(p / 10000^(2i/D)).

    Computed in float32 from the positions, for any length.
    (Vaswani et al. 2017, section 3.5.)
    """

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        positions = in_row(x, positions)
        angle = angles(positions, x.shape[-1])
        encoding = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return x + encoding.reshape(*positions.shape, x.shape[-1]).astype(x.dtype)


class Learned(Position):
    """Adds a learned vector for each position; NaN past `max_length`.

    Initialised with variance 1, that of embedded tokens. (Vaswani et al. 2017, Table 3, row E;
    Gehring et al. 2017.)
    """

    limited = True

    def __init__(self, features: int, *, max_length: int = 512, rngs: nnx.Rngs, **unused):
        value = nnx.initializers.normal(1.0)(rngs.params(), (max_length, features))
        self.embedding = nnx.Param(value, **axis_names("position", "embed"))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        rows = self.embedding[...].at[in_row(x, positions)].get(mode="fill")
        return x + rows.astype(x.dtype)


class Rotary(Position):
    """Rotates queries and keys by their positions, so that scores depend only on the distance.

    Coordinates i and i + H/2 of a head are a pair that is rotated by p / 10000^(2i/H). (Su et
    al. 2021, section 3.2, who pair neighbouring coordinates; this is equivalent up to numbering,
    and halves are faster.)
    """

    def rotate(
        self, x: Float[Array, "B T N H"], positions: Int[Array, "#B T"] | None = None
    ) -> Float[Array, "B T N H"]:
        angle = angles(in_row(x, positions), x.shape[-1])[:, :, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)
        return turned.astype(x.dtype)


class RelativeBias(Position):
    """Adds a learned scalar for each head and bucket of distances to the scores.

    There are 32 buckets. In each direction, half of them hold one distance each and the others grow
    logarithmically up to distance 128. The encoder divides the buckets between earlier and later
    keys. (T5: Raffel et al. 2020, section 2.1, and its published code.)
    """

    buckets, farthest = 32, 128

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 1,
        causal: bool = False,
        rngs: nnx.Rngs,
        **unused,
    ):
        self.causal = causal
        init = nnx.initializers.normal(features**-0.5)
        value = init(rngs.params(), (self.buckets, num_heads))
        self.embedding = nnx.Param(value, **axis_names("position", "heads"))

    def bucket(self, distance: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The bucket of a distance, key position - query position."""
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
        return jnp.moveaxis(self.embedding[...][bucket], -1, 1)


class ALiBi(Position):
    """Scores decrease linearly with the distance |i - j|, with slope 2^(-8h/N) in head h = 1 … N.

    (Press, Smith and Lewis 2022, section 3. The encoder uses the distance to either
    side. The formula is used for every N; the paper interleaves two series if N is not a power
    of 2.)
    """

    def bias(
        self, queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        heads = self.num_heads
        slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)
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
