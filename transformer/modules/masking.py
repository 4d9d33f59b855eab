"""Attention masks, as boolean arrays: True = the query may attend to the key.

Every mask broadcasts to the shape [B, N, T, S] of the attention scores, so that masks combine by
`&`.

Vaswani et al. 2017 (section 3.2.3) add -inf to the scores of masked keys, which gives them
probability 0; `additive` returns that matrix. A boolean mask does the same. For a query that may
attend to nothing (padding), `dot_product_attention.masked_softmax` returns zeros with finite
gradients, where the additive mask would yield NaN.

`Mask` is a compact form of a mask, for attention backends that do not materialise T · S entries.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal(
    queries: int, keys: int | None = None, offset: int | Int[Array, ""] = 0
) -> Bool[Array, "1 1 {queries} _"]:
    """Query t may attend to the keys up to t. With 3 queries and 4 keys:

        keys →   0 1 2 3
        query 0  x . . .
        query 1  x x . .
        query 2  x x x .

    Args:
      queries: T.
      keys: S; as many as queries by default.
      offset: position of the first query among the keys, for a cache; may be traced.
    """
    query = jnp.arange(queries)[:, None] + offset
    key = jnp.arange(queries if keys is None else keys)[None, :]
    return (key <= query)[None, None]


def window(
    queries: int, keys: int, width: int, offset: int | Int[Array, ""] = 0
) -> Bool[Array, "1 1 {queries} {keys}"]:
    """Query t may attend to keys less than `width` positions away on either side. For width 2:

        keys →   0 1 2 3
        query 0  x x . .
        query 1  x x x .
        query 2  . x x x

    Combined with `causal` it is a sliding window over the latest `width` positions, including the
    query's own. `offset` is as in `causal`. (Beltagy et al. 2020, section 3.1.)
    """
    query = jnp.arange(queries)[:, None] + offset
    key = jnp.arange(keys)[None, :]
    return (jnp.abs(query - key) < width)[None, None]


def segment(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> Bool[Array, "B 1 T S"]:
    """A query may attend to the keys of its own segment; segment 0 is padding.

    A row with segments [1, 1, 2, 0], two packed examples and padding:

        keys →   1 1 2 0
        query 1  x x . .
        query 1  x x . .
        query 2  . . x .
        query 0  . . . .    attends to nothing: its output is zero
    """
    query, key = query_segments[:, None, :, None], key_segments[:, None, None, :]
    return (query == key) & (key != 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """A compact mask: segments and, for self-attention, causality and a window.

    queries: [B, T] int32, the segment of each query; 0 = padding.
    keys: [B, S] int32, likewise.
    causal: whether a query may attend only to the keys up to it.
    window: see the function `window`; None: no limit.
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    causal: bool = field(default=False, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})

    def array(self, first: int | Int[Array, ""] = 0) -> Bool[Array, "B 1 T S"]:
        """The mask as an array; `queries` begin at position `first`."""
        length, keys = self.queries.shape[1], self.keys.shape[1]
        mask = segment(self.queries, self.keys)
        if self.causal:
            mask = mask & causal(length, keys, first)
        if self.window is not None:
            mask = mask & window(length, keys, self.window, first)
        return mask

    def attends(self) -> Bool[Array, "B T"]:
        """Whether each query may attend to any key; in self-attention, whether it is a token."""
        if self.causal or self.window is not None:
            return self.queries != 0
        return segment(self.queries, self.keys)[:, 0].any(-1)


def as_array(mask: Mask | Bool[Array, "#B #N #T S"] | None) -> Bool[Array, "#B #N #T S"] | None:
    """Returns a mask of either form as an array."""
    return mask.array() if isinstance(mask, Mask) else mask


def segments_of(tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The given segments, or by default 1 for each token that is not padding (0)."""
    return (tokens != 0).astype(jnp.int32) if segments is None else segments


def padding(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query may attend to the keys that are not padding."""
    return valid[:, None, None, :]


def additive(mask: Bool[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    """The matrix M of the paper: 0 where `mask` is True, -inf where it is False."""
    return jnp.where(mask, 0.0, -jnp.inf)
