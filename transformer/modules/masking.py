"""Attention masks: boolean, True = the query may attend to the key, combined with `&`.

They broadcast to [B, N, T, S]. Vaswani et al. 2017 (section 3.2.3) add -inf to the scores of masked
keys, which gives them probability 0. `dot_product_attention.masked_softmax` does the same, except
that a query without keys (padding) gets zeros with finite gradients, not NaN.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Index = int | Int[Array, ""]


def causal(queries: int, keys: int | None = None, offset: Index = 0) -> Bool[Array, "1 1 T S"]:
    """Query t may attend to the keys up to t. With 3 queries and 4 keys:

        keys →   0 1 2 3
        query 0  x . . .
        query 1  x x . .
        query 2  x x x .

    `offset` is the position of the first query among the keys, for a cache.
    """
    positions = jnp.arange(queries)[None, None, :, None] + offset
    return jnp.arange(queries if keys is None else keys) <= positions


def window(queries: int, keys: int, width: int, offset: Index = 0) -> Bool[Array, "1 1 T S"]:
    """Query t may attend to keys less than `width` positions away on either side. For width 2:

        keys →   0 1 2 3
        query 0  x x . .
        query 1  x x x .
        query 2  . x x x

    With `causal`: the latest `width` keys. (Beltagy et al. 2020, section 3.1.)
    """
    positions = jnp.arange(queries)[None, None, :, None] + offset
    return jnp.abs(positions - jnp.arange(keys)) < width


def segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """A query may attend to the keys of its own segment; segment 0 is padding.

    A row with segments [1, 1, 2, 0], two packed examples and padding:

        keys →   1 1 2 0
        query 1  x x . .
        query 1  x x . .
        query 2  . . x .
        query 0  . . . .    attends to nothing: its output is zero
    """
    return (queries[:, None, :, None] == keys[:, None, None, :]) & padding(keys != 0)


def padding(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query may attend to the keys that are not padding."""
    return valid[:, None, None, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """A compact mask, for attention backends that do not materialise T · S entries."""

    queries: Int[Array, "B T"]  # segments, as in `segment`
    keys: Int[Array, "B S"]
    causal: bool = field(default=False, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})  # its width

    def array(self, first: Index = 0) -> Bool[Array, "B 1 T S"]:
        """The mask as an array; `queries` begin at position `first`."""
        mask, shape = segment(self.queries, self.keys), (self.queries.shape[1], self.keys.shape[1])
        mask = mask & causal(*shape, first) if self.causal else mask
        return mask if self.window is None else mask & window(*shape, self.window, first)

    def attends(self) -> Bool[Array, "B T"]:
        """Whether each query may attend to any key; in self-attention, whether it is a token."""
        itself = self.causal or self.window is not None
        return self.queries != 0 if itself else segment(self.queries, self.keys)[:, 0].any(-1)


def as_array(mask: Mask | Bool[Array, "#B #N #T S"] | None) -> Bool[Array, "#B #N #T S"] | None:
    """A mask of either form as an array."""
    return mask.array() if isinstance(mask, Mask) else mask


def segments_of(tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The given segments, or by default 1 for each token that is not padding (0)."""
    return (tokens != 0).astype(jnp.int32) if segments is None else segments
