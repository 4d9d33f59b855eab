"""Multi-head attention, and the keys and values that it attends to.

Vaswani et al. 2017, section 3.2.2; its inner function is in `dot_product_attention`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.modules.dot_product_attention import ATTENTION_BACKENDS, attention_weights
from transformer.modules.dropout import Training, dropout
from transformer.modules.layers import Linear, add_bias
from transformer.modules.masking import Mask, written_out
from transformer.modules.normalization import RMSNorm
from transformer.parallel.mesh import constrain


class Relations(NamedTuple):
    """How the positions of a sequence stand to each other, for its self-attention.

    mask: True = the query may attend to the key.
    rotate: tells queries where they stand, and the new keys; see `positions.Position`.
    bias: added to the scores.
    """

    mask: Mask | Bool[Array, "#B 1 #T S"]
    rotate: Callable[[Array], Array]
    bias: Float[Array, "#B N T S"] | None


class KeyValue(NamedTuple):
    """The projected keys and values of S positions, or of a cache with room for S.

    K is the number of heads, or fewer where groups of heads share keys and values. H is the
    width of keys, E that of values, the paper's d_k and d_v. Heads come before positions, so
    that a step of decoding reads each head's cache as it lies in memory; the other way
    round, copying it was half of the step.
    """

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S E"]

    def write(self, new: "KeyValue", index: int | Int[Array, ""]) -> "KeyValue":
        """This cache with `new`'s positions written from position `index` on.

        The caller keeps index + T ≤ S (`model.Transformer.decode_step` answers NaN
        past the end; a silent overwrite of the last position would go unseen).
        """
        update = jax.lax.dynamic_update_slice_in_dim
        return KeyValue(
            update(self.key, new.key.astype(self.key.dtype), index, axis=2),
            update(self.value, new.value.astype(self.value.dtype), index, axis=2),
        )


class MultiHeadAttention(nnx.Module):
    """MultiHead(X, Y) = Concat(head₁ … head_N) W^O, head_i = Attention(X W_i^Q, Y W_i^K, Y W_i^V).

    Queries come from one sequence, keys and values from another or the same one.
    They are handed over already projected, so that a decoder's cache and an encoder's
    memory, whose keys and values are computed once, take the same path as self-attention.
    (Section 3.2.2.)

    Args:
      width: D.
      heads: N, of the queries.
      head_width: H, of queries and keys, the paper's d_k.
      value_width: E, of values, the paper's d_v.
      kv_heads: K, of keys and values: N; or fewer, a divisor of N, each shared by N/K
        heads (Ainslie et al. 2023); or 1, multi-query attention (Shazeer 2019).
      use_bias: whether the four projections add one.
      qk_norm: whether RMS norm is applied to queries and keys over H, before positions
        (after Henry et al. 2020 and Dehghani et al. 2023).
      epsilon: of that norm.
      fused: whether the projections of one sequence are one product.
      init: of the four matrices.
      backend: one of `ATTENTION_BACKENDS`.
      dtype: of the computation.
      rngs: for parameters.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        value_width: int,
        kv_heads: int,
        use_bias: bool,
        qk_norm: bool,
        epsilon: float = 1e-6,
        fused: bool,
        init: Callable[..., Array],
        backend: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def project_in(heads: int, head_width: int, axis: str):
            return Linear(
                width,
                (heads, head_width),
                use_bias=use_bias,
                kernel_init=init,
                kernel_metadata={"axes": ("embed", axis, "head")},
                bias_metadata={"axes": (axis, "head")},
                dtype=dtype,
                rngs=rngs,
            )

        # Where heads share keys and values, those are the same on every device.
        kv_axis = "heads" if kv_heads == heads else "kv_heads"
        self.query = project_in(heads, head_width, "heads")
        self.key = project_in(kv_heads, head_width, kv_axis)
        self.value = project_in(kv_heads, value_width, kv_axis)
        self.out = Linear(
            (heads, value_width),
            width,
            axis=(-2, -1),
            use_bias=use_bias,
            kernel_init=init,
            kernel_metadata={"axes": ("heads", "head", "embed")},
            bias_metadata={"axes": ("norm",)},
            dtype=dtype,
            rngs=rngs,
        )
        self.query_norm = RMSNorm(head_width, epsilon=epsilon) if qk_norm else None
        self.key_norm = RMSNorm(head_width, epsilon=epsilon) if qk_norm else None
        self.kv_axis = kv_axis
        self.fused = fused
        self.backend = ATTENTION_BACKENDS[backend]

    def project_all(
        self, x: Float[Array, "B T D"], rotate: Callable[[Array], Array] | None = None
    ) -> tuple[Float[Array, "B N T H"], KeyValue]:
        """Queries, keys and values of `x`, for attention of a sequence to itself."""
        query, key, value = self.products(x, self.query, self.key, self.value)
        return self.finish_query(query, rotate), self.finish_key_value(key, value, rotate)

    def project_query(
        self, x: Float[Array, "B T D"], rotate: Callable[[Array], Array] | None = None
    ) -> Float[Array, "B N T H"]:
        """Queries of `x`, projected once for each head."""
        return self.finish_query(self.query(x), rotate)

    def project(
        self, y: Float[Array, "B S D"], rotate: Callable[[Array], Array] | None = None
    ) -> KeyValue:
        """Keys and values of `y`, each projected once for each head, on the device of its position.

        Then they are gathered (over the mesh axis `context`), for every query looks at them all.
        """
        key, value = self.products(y, self.key, self.value)
        return self.finish_key_value(key, value, rotate)

    def products(self, x: Float[Array, "B T D"], *linears: Linear) -> list[Array]:
        """`linear(x)` of each; fused, as one product with their matrices side by side.

        The step of decoding is left out, for it would put them side by side at each token.
        """
        alike = len({linear.kernel.shape for linear in linears}) == 1
        if not (self.fused and alike) or x.shape[1] == 1:
            return [linear(x) for linear in linears]
        dtype = linears[0].dtype
        kernel = jnp.stack([linear.kernel[...] for linear in linears])
        products = jnp.einsum("BTD,CDNH->CBTNH", x.astype(dtype), kernel.astype(dtype))
        biases = [None if linear.bias is None else linear.bias[...] for linear in linears]
        return [
            product if bias is None else add_bias(product, bias)
            for product, bias in zip(products, biases, strict=True)
        ]

    def finish_query(
        self, query: Float[Array, "B T N H"], rotate: Callable[[Array], Array] | None
    ) -> Float[Array, "B N T H"]:
        """A projected query, normalised and rotated if so configured."""
        query = query if self.query_norm is None else self.query_norm(query)
        query = query if rotate is None else rotate(query)
        return constrain(query, "batch", "length", "heads", "head").swapaxes(1, 2)

    def finish_key_value(
        self,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K E"],
        rotate: Callable[[Array], Array] | None,
    ) -> KeyValue:
        """Projected keys and values, the keys normalised and rotated if so configured."""
        split, whole = (("batch", axis, self.kv_axis, "head") for axis in ("length", "keys"))
        key = key if self.key_norm is None else self.key_norm(key)
        key = key if rotate is None else rotate(key)
        key, value = (constrain(constrain(x, *split), *whole) for x in (key, value))
        return KeyValue(key.swapaxes(1, 2), value.swapaxes(1, 2))

    def __call__(
        self,
        query: Float[Array, "B N T H"],
        key_value: KeyValue,
        mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
        bias: Float[Array, "#B #N #T S"] | None = None,
        training: Training | None = None,
        maps: list[Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends from what `project_query` made of a sequence to `key_value`.

        Args:
          query: who asks.
          key_value: what `project` made of the other sequence, or a cache of it.
          mask: True = may attend.
          bias: added to the scores.
          training: for dropout of the weights.
          maps: a list that takes this call's attention weights [B, N, T, S], before
            dropout; nothing is computed for it when it is None.
        """
        if maps is not None:
            maps.append(attention_weights(query, key_value.key, written_out(mask), bias))
        heads = self.backend(
            query, key_value.key, key_value.value, mask, bias, **weight_dropout(training)
        )
        return self.out(heads.swapaxes(1, 2))


def weight_dropout(training: Training | None) -> dict[str, Any]:
    """What a backend needs to drop weights: nothing where none are dropped."""
    if training is None:
        return {}
    rate = training.attention_dropout
    if isinstance(rate, float) and rate == 0.0:
        return {}
    return {"drop": partial(dropout, rate=rate, stream=training.rngs.attention)}
