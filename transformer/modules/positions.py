"""Position encodings, and `POSITIONS`, their table."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.errors import check_choice, choose
from transformer.modules.linear import INITIALIZERS, Linear, axis_names, linear_axes
from transformer.parallel.mesh import constrain

Tokens = Float[Array, "B T D"]
Heads = Float[Array, "B T N H"]
Places = Int[Array, "#B T"] | None
Queries = Int[Array, "#B T"]
Keys = Int[Array, "#B S"]
Bias = Float[Array, "#B N T S"]
# Or a function from the queries to the queries that the keys are multiplied with, and the bias.
QueryBias = Callable[[Float[Array, "B N T H"]], tuple[Float[Array, "B N T H"], Bias]]

SINUSOID_LAYOUTS = ("neighbours", "halves")  # of sines and cosines
# Exponents of the base of D/2 wavelengths, by their number: -2i/D of Vaswani et al. 2017, or
# -i/(D/2 - 1) of tensor2tensor, in which the last is the base.
RATES = {
    "paper": lambda half: -jnp.arange(0, 2 * half, 2, dtype=jnp.float32) / (2 * half),
    "tensor2tensor": lambda half: -jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1),
}


class Position(nnx.Module):
    """A position encoding: three hooks, which do nothing here and which subclasses override.

    Each stack has one, shared by its layers. `rotate` and `bias` apply only to self-attention,
    since source and target positions are not comparable. Positions are by default 0 … T - 1.
    `causal`: no key is later than the query, as in the decoder. `max_length`, `offset` and `rngs`
    are for subclasses: those that are `limited`, those in which the number of the first position
    matters, and those with parameters.
    """

    limited = False  # whether positions end at `max_length`

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 1,
        causal: bool = False,
        max_length: int | None = None,
        offset: int = 0,
        rngs: nnx.Rngs | None = None,
    ):
        self.num_heads, self.causal, self.offset = num_heads, causal, offset

    def __call__(self, x: Tokens, positions: Places = None) -> Tokens:
        """Adds the encoding of the positions to x."""
        return x

    def rotate(self, x: Heads, positions: Places = None) -> Heads:
        """Rotates the queries or keys x by their positions."""
        return x

    def bias(self, queries: Queries, keys: Keys) -> Bias | QueryBias | None:
        """The bias that is added to the scores between these positions; None: no bias."""
        return None

    def numbers(self, x: Tokens, positions: Places) -> Int[Array, "#B T"]:
        """The positions of x plus `offset`."""
        positions = in_row(x, positions)
        return positions + self.offset if self.offset else positions


def in_row(x: Array, positions: Places) -> Int[Array, "#B T"]:
    """The given positions, or by default 0 … T - 1 for x of shape [B, T, …]."""
    return jnp.arange(x.shape[1])[None] if positions is None else positions


def _angles(
    positions: Int[Array, "#B T"], width: int, base: float = 10_000.0, rates: str = "paper"
) -> Float[Array, "#B T half"]:
    """p / base^(2i/width) for i = 0 … width/2 - 1, or by the other `RATES`, in float32."""
    rate = base ** RATES[rates](width // 2)
    return positions[..., None].astype(jnp.float32) * rate


class Sinusoidal(Position):
    """Adds PE(p, 2i) = sin(p / 10000^(2i/D)) and PE(p, 2i+1) = cos(p / 10000^(2i/D)).

    Computed in float32 from the positions, for any length. (Vaswani et al. 2017, section 3.5.)

    Args:
      layout: one of `SINUSOID_LAYOUTS`; halves: all sines, then all cosines.
      rates: one of `RATES`.
    """

    def __init__(
        self, features: int, *, layout: str = "neighbours", rates: str = "paper", **options: Any
    ):
        super().__init__(features, **options)
        check_choice(SINUSOID_LAYOUTS, layout, "sinusoid_layout")
        check_choice(RATES, rates, "sinusoid_rates")
        self.axis, self.rates = -1 if layout == "neighbours" else -2, rates

    def __call__(self, x: Tokens, positions: Places = None) -> Tokens:
        positions = self.numbers(x, positions)
        angles = _angles(positions, x.shape[-1], rates=self.rates)
        waves = jnp.sin(angles), jnp.cos(angles)
        if len(positions) == 1:  # fused with the sum, these would be computed again for each row
            waves = jax.lax.optimization_barrier(waves)
        encoding = jnp.stack(waves, axis=self.axis).reshape(*positions.shape, x.shape[-1])
        return x + encoding.astype(x.dtype)


class Learned(Position):
    """Adds a learned vector for each position; NaN past `max_length`.

    Their variance begins as 1, as that of tokens. (Vaswani et al. 2017, Table 3, row E.)
    `offset` is the row of the first position, in a table of `max_length` + `offset` rows.
    """

    limited = True

    def __init__(self, features: int, *, max_length: int = 512, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, **options)
        shape = max_length + self.offset, features
        value = nnx.initializers.normal(1.0)(rngs.params(), shape)
        self.embedding = nnx.Param(value, **axis_names("position", "embed"))

    def __call__(self, x: Tokens, positions: Places = None) -> Tokens:
        rows = self.embedding[...].at[self.numbers(x, positions)].get(mode="fill")
        return x + rows.astype(x.dtype)


class Rotary(Position):
    """Rotates queries and keys by their positions, so that scores depend only on the distance.

    Coordinates i and i + H/2 are a pair that is rotated by p / base^(2i/H). (Su et al. 2021,
    section 3.2, who pair neighbours: equivalent up to numbering, and slower.)
    """

    def __init__(self, features: int, *, base: float = 10_000.0, **options: Any):
        super().__init__(features, **options)
        self.base = base

    def rotate(self, x: Heads, positions: Places = None) -> Heads:
        angles = _angles(in_row(x, positions), x.shape[-1], self.base)[:, :, None]
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)
        return turned.astype(x.dtype)


class RelativeBias(Position):
    """Adds a learned scalar for each head and bucket of distances to the scores.

    Half of the `buckets` hold one distance each and the others grow logarithmically up to
    `distance`. The encoder divides them between earlier and later keys. (T5: Raffel et al.
    2020, section 2.1.)
    """

    def __init__(
        self, features: int, *, buckets: int = 32, distance: int = 128, rngs: nnx.Rngs, **rest: Any
    ):
        super().__init__(features, **rest)
        self.buckets, self.distance = buckets, distance
        shape = self.buckets, self.num_heads
        value = nnx.initializers.normal(features**-0.5)(rngs.params(), shape)
        self.embedding = nnx.Param(value, **axis_names("position", "heads"))

    def bucket(self, distance: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The bucket of a distance, key position - query position."""
        buckets = self.buckets if self.causal else self.buckets // 2
        first = 0 if self.causal else jnp.where(distance > 0, buckets, 0)
        distance, exact = jnp.abs(distance), buckets // 2
        steps = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
        steps = steps / jnp.log(self.distance / exact) * (buckets - exact)
        far = jnp.minimum(exact + steps.astype(jnp.int32), buckets - 1)
        return first + jnp.where(distance < exact, distance, far)

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        bucket = self.bucket(keys[:, None, :] - queries[:, :, None])
        return jnp.moveaxis(self.embedding[...][bucket], -1, 1)


class PerLayer(nnx.List, Position):
    """A position encoding for each layer of a stack; `bias` is the tuple of theirs.

    They may bias the scores, as those of `PER_LAYER` do, and neither add to x nor rotate.
    """

    def bias(self, queries: Queries, keys: Keys) -> Any:
        return tuple(each.bias(queries, keys) for each in self)


class ALiBi(Position):
    """Scores decrease linearly with the distance |i - j|, with slope 2^(-8h/N) in head h = 1 … N.

    The formula is used for every N; the paper interleaves two series if N is not a power of 2. The
    encoder uses the distance to either side. (Press, Smith and Lewis 2022, section 3.)
    """

    def bias(self, queries: Queries, keys: Keys) -> Bias:
        heads = jnp.arange(1, self.num_heads + 1, dtype=jnp.float32)
        slopes = 2.0 ** (-8.0 * heads / self.num_heads)
        distance = jnp.abs(queries[:, None, :, None] - keys[:, None, None, :])
        return -slopes[:, None, None] * distance.astype(jnp.float32)


class TransformerXL(Position):
    """Scores ((q_i + u) · k_j + (q_i + v) · W R(i - j)) / √H, where R is sinusoidal.

    W, u and v are learned, and i - j is negative for later keys. (Dai et al. 2019, section 3.3.)

    Args:
      head_width: H; None: features / num_heads.
      scale: of the scores, if it is not 1/√H.
      init: of W, one of `INITIALIZERS`.
    """

    def __init__(
        self,
        features: int,
        *,
        head_width: int | None = None,
        scale: float | None = None,
        init: str = "glorot_uniform",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(features, **options)
        heads = self.num_heads, head_width or features // self.num_heads
        axes = linear_axes("embed", "heads", "head")
        kernel_init = choose(INITIALIZERS, init, "init")
        self.project = Linear(
            features, heads, use_bias=False, kernel_init=kernel_init, rngs=rngs, **axes
        )
        zeros, axes = jnp.zeros(heads), axis_names("heads", "head")
        self.content, self.position = nnx.Param(zeros, **axes), nnx.Param(zeros, **axes)
        # Queries come multiplied by this, and the scores are divided by √H.
        self.query_scale = 1.0 if scale is None else scale * heads[1] ** 0.5

    def bias(self, queries: Queries, keys: Keys) -> QueryBias:
        waves = (_waves(each, self.project.kernel.shape[0]) for each in (queries, keys))
        u, v = (each[...] * self.query_scale for each in (self.content, self.position))
        return jax.tree_util.Partial(_transformer_xl, self.project.kernel[...], u, v, *waves)


def _waves(positions: Int[Array, "#B T"], width: int) -> Float[Array, "#B T D"]:
    angles = _angles(positions, width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _transformer_xl(kernel: Array, u: Array, v: Array, here: Array, there: Array, query: Array):
    """The queries + u and the bias (q_i + v) · W R(i - j) / √H, given R(i) and R(j).

    The sine of a difference is sin i cos j - cos i sin j and its cosine cos i cos j + sin i sin j:
    a product of R(j) with what depends on i alone, without an array of D numbers for each pair.
    """
    wide = query.astype(jnp.float32)
    projected = jnp.einsum("BNTH,DNH->BNTD", wide + v[:, None], kernel)
    projected = constrain(projected, "batch", "heads", "length", "width")
    (sine, cosine), (sin, cos) = (jnp.split(x, 2, -1) for x in (projected, here[:, None]))
    turned = jnp.concatenate([cosine * sin - sine * cos, sine * sin + cosine * cos], axis=-1)
    bias = jnp.einsum("BNTD,BSD->BNTS", turned, there) * query.shape[-1] ** -0.5
    return (wide + u[:, None]).astype(query.dtype), bias


POSITIONS = {
    "none": Position,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rotary": Rotary,
    "relative": RelativeBias,
    "alibi": ALiBi,
    "transformer_xl": TransformerXL,
}
PER_LAYER = ("relative", "transformer_xl")  # those of which each layer may have its own
