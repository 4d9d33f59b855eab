"""Who may attend to whom, as boolean arrays: True = the query may attend to the key.

Every mask has the shape [B|1, N|1, T, S] of the attention scores, with 1 where
it is the same along an axis, so that masks combine by `&`.

Vaswani et al. 2017 (section 3.2.3) write masking as setting illegal scores to
-inf, in matrix form

    softmax(Q Kᵀ / √d_k + M) V,    M = 0 where allowed, -inf where not.

That is the same thing: exp(s + 0) = exp(s) and exp(s - inf) = 0, so a masked key
gets probability exactly 0 and the others share 1 among themselves. The code does
not add -inf, for one reason: where a query may attend to nothing (a padded row)
the softmax becomes exp(-inf) / 0, a NaN that spreads through every gradient. A
boolean mask says what is meant, and `dot_product_attention.masked_softmax` gives such a row
zeros, with finite gradients. See `additive` for M itself, and its test for the
equivalence.

`Mask` is what such an array is made of, for the backends of attention that never hold
all T · S of it at once.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal(
    queries: int, keys: int | None = None, offset: int | Int[Array, ""] = 0
) -> Bool[Array, "1 1 {queries} _"]:
    """Query t may attend to the keys up to t: an output depends on earlier outputs alone.

    With 4 queries and 4 keys, `x` = may attend:

        keys →   0 1 2 3
        query 0  x . . .
        query 1  x x . .
        query 2  x x x .
        query 3  x x x x

    With a cache, the first query stands at position `offset` of the keys. 1 query,
    4 keys, offset 2:

        query 0  x x x .

    Args:
      queries: number of queries, T.
      keys: number of keys, S; as many as queries by default.
      offset: position of the first query among the keys; may be traced.
    """
    query = jnp.arange(queries)[:, None] + offset
    key = jnp.arange(queries if keys is None else keys)[None, :]
    return (key <= query)[None, None]


def window(
    queries: int, keys: int, width: int, offset: int | Int[Array, ""] = 0
) -> Bool[Array, "1 1 {queries} {keys}"]:
    """Query t may attend to the keys less than `width` away, to either side.

    The last queries of 5, and 5 keys, at width 2:

        keys →   0 1 2 3 4
        query 2  . x x x .
        query 3  . . x x x
        query 4  . . . x x

    With `causal` it is a sliding window over the `width` latest positions, the query's
    own among them. (Beltagy et al. 2020, section 3.1.)

    Args:
      queries: number of queries, T.
      keys: number of keys, S.
      width: of the window to either side, the query's own position included.
      offset: position of the first query among the keys; may be traced.
    """
    query = jnp.arange(queries)[:, None] + offset
    key = jnp.arange(keys)[None, :]
    return (jnp.abs(query - key) < width)[None, None]


def segment(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> Bool[Array, "B 1 T S"]:
    """A query may attend to the keys of its own segment; segment 0 is padding.

    One row with segments [1, 1, 2, 0] (two examples packed together, then padding):

        keys →   1 1 2 0
        query 1  x x . .
        query 1  x x . .
        query 2  . . x .
        query 0  . . . .    attends to nothing: its output is zero

    With a single segment this is the padding mask. Causal self-attention over
    packed rows is `causal(T) & segment(target_segments, target_segments)`:

        query 1  x . . .
        query 1  x x . .
        query 2  . . x .
        query 0  . . . .
    """
    query, key = query_segments[:, None, :, None], key_segments[:, None, None, :]
    return (query == key) & (key != 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """A mask said in short: segments, and of a sequence with itself causality and a window.

    queries: [B, T] int32, the segment of each query; 0 = padding.
    keys: [B, S] int32, likewise.
    causal: whether a query may attend to the keys up to it alone.
    window: how near a key must be, see `window`; None: anywhere.
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    causal: bool = field(default=False, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})

    def array(self, first: int | Int[Array, ""] = 0) -> Bool[Array, "B 1 T S"]:
        """The mask written out; `queries` are those from position `first` on."""
        length, keys = self.queries.shape[1], self.keys.shape[1]
        mask = segment(self.queries, self.keys)
        if self.causal:
            mask = mask & causal(length, keys, first)
        if self.window is not None:
            mask = mask & window(length, keys, self.window, first)
        return mask

    def attends(self) -> Bool[Array, "B T"]:
        """Which queries have any key: in a sequence with itself, those that are not padding."""
        if self.causal or self.window is not None:
            return self.queries != 0
        return segment(self.queries, self.keys)[:, 0].any(-1)


def as_array(mask: Mask | Bool[Array, "#B #N #T S"] | None) -> Bool[Array, "#B #N #T S"] | None:
    """The array of a mask, whichever form it has."""
    return mask.array() if isinstance(mask, Mask) else mask


def segments_of(tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The given segments, or else 1 for each token that is not 0, the padding."""
    return (tokens != 0).astype(jnp.int32) if segments is None else segments


def padding(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query may attend to the keys that are real tokens.

    One row of 4 keys, the last one padding; the same for every query:

        keys →   a b c 0
        query *  x x x .
    """
    return valid[:, None, None, :]


def additive(mask: Bool[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    """The matrix M of the paper: 0 where `mask` is True, -inf where it is False.

    For readers and tests; the model uses the boolean mask itself (see above).
    """
    return jnp.where(mask, 0.0, -jnp.inf)
