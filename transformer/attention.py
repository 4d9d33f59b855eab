"""Scaled dot-product attention, its backends, and multi-head attention.

Vaswani et al. 2017, section 3.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.sharding import constrain


class KeyValue(NamedTuple):
    """The projected keys and values of S positions, or of a cache with room for S."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]

    def write(self, new: "KeyValue", index: int | Int[Array, ""]) -> "KeyValue":
        """This cache with `new`'s positions written from position `index` on.

        The caller keeps index + T ≤ S (`model.Transformer.decode_step` answers NaN
        past the end; a silent overwrite of the last position would go unseen).
        """
        update = jax.lax.dynamic_update_slice_in_dim
        return KeyValue(
            update(self.key, new.key.astype(self.key.dtype), index, axis=1),
            update(self.value, new.value.astype(self.value.dtype), index, axis=1),
        )


def masked_softmax(
    scores: Float[Array, "B N T S"], mask: Bool[Array, "#B #N #T S"] | None
) -> Float[Array, "B N T S"]:
    """Softmax over the keys that `mask` allows; a query with none gets zeros.

    Masked keys get exactly 0 and pass exactly zero gradient.
    """
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    mask: Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B N T S"]:
    """softmax(Q Kᵀ / √H + bias) over the allowed keys, in float32 whatever the inputs' dtype."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return masked_softmax(scores, mask)


def einsum_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention, softmax(Q Kᵀ / √H + bias) V, as the equation reads.

    The reference that every other backend is tested against. (Equation 1.)
    """
    weights = attention_weights(query, key, mask, bias)
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(value.dtype), value)


def xla_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """The same through `jax.nn.dot_product_attention`.

    That function gives a query with no allowed key the mean of the values, so its
    output is set to zero here.
    """
    out = jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, implementation="xla"
    )
    if mask is None:
        return out
    attends = mask.any(-1)  # [B|1, N|1, T]
    return jnp.where(jnp.moveaxis(attends, 1, 2)[..., None], out, 0)


ATTENTION_BACKENDS = {"einsum": einsum_attention, "xla": xla_attention}


class MultiHeadAttention(nnx.Module):
    """MultiHead(X, Y) = Concat(head₁ … head_N) W^O, head_i = Attention(X W_i^Q, Y W_i^K, Y W_i^V).

    Queries come from one sequence, keys and values from another or the same one.
    They are handed over already projected (`project`), so that a decoder's cache
    and an encoder's memory, whose keys and values are computed once, take the same
    path as self-attention. (Section 3.2.2.)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        use_bias: bool,
        backend: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def project_in():
            return nnx.LinearGeneral(
                width,
                (heads, head_width),
                use_bias=use_bias,
                kernel_init=nnx.initializers.glorot_uniform(),
                kernel_metadata={"axes": ("embed", "heads", "head")},
                bias_metadata={"axes": ("heads", "head")},
                dtype=dtype,
                rngs=rngs,
            )

        self.query, self.key, self.value = project_in(), project_in(), project_in()
        self.out = nnx.LinearGeneral(
            (heads, head_width),
            width,
            axis=(-2, -1),
            use_bias=use_bias,
            kernel_init=nnx.initializers.glorot_uniform(),
            kernel_metadata={"axes": ("heads", "head", "embed")},
            bias_metadata={"axes": ("norm",)},
            dtype=dtype,
            rngs=rngs,
        )
        self.attend = ATTENTION_BACKENDS[backend]

    def project(self, y: Float[Array, "B S D"]) -> KeyValue:
        """Keys and values of `y`, each projected once for each head."""
        axes = ("batch", "length", "heads", "head")
        return KeyValue(constrain(self.key(y), *axes), constrain(self.value(y), *axes))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key_value: KeyValue,
        mask: Bool[Array, "#B #N #T S"] | None = None,
        bias: Float[Array, "#B #N #T S"] | None = None,
        maps: list[Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends from `x` to `key_value`.

        Args:
          x: what the queries are made of.
          key_value: what `project` made of the other sequence, or a cache of it.
          mask: True = may attend.
          bias: added to the scores.
          maps: a list that takes this call's attention weights [B, N, T, S]; nothing
            is computed for it when it is None.
        """
        query = constrain(self.query(x), "batch", "length", "heads", "head")
        if maps is not None:
            maps.append(attention_weights(query, key_value.key, mask, bias))
        heads = self.attend(query, key_value.key, key_value.value, mask, bias)
        return self.out(heads)
