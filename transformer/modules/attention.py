"""Multi-head attention (Vaswani et al. 2017, section 3.2.2), and its cache of keys and values.

The inner function, softmax(Q Kᵀ / √H) V, is in `dot_product_attention`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.modules.dot_product_attention import (
    ATTENTION_BACKENDS,
    FLEXIBLE_BACKENDS,
    attention_weights,
)
from transformer.modules.dropout import CallRngs, Moded, dropout, kept_stream, stream_of
from transformer.modules.linear import (
    Initializer,
    Linear,
    add_bias,
    axis_names,
    compute_dtype,
    lecun_normal,
    zeros,
)
from transformer.modules.masking import Mask, as_array, causal
from transformer.modules.normalization import LayerNorm
from transformer.parallel.mesh import constrain

Rotate = Callable[[Array], Array]

layer_norm_without_bias = partial(LayerNorm, use_bias=False)


class KeyValue(NamedTuple):
    """The projected keys and values of S positions, or of a cache with room for S.

    K is the number of heads, or fewer where groups of heads share keys and values. H is the
    width of keys, E that of values, the paper's d_k and d_v. Heads come before positions, so
    that a decoding step reads the cache of each head contiguously; in the other order, copying it
    took half of the step.
    """

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S E"]

    def write(self, new: "KeyValue", index: int | Int[Array, ""]) -> "KeyValue":
        """This cache with `new`'s positions written from position `index` on.

        The caller ensures index + T ≤ S: past the end JAX would silently overwrite the last
        positions, so `Transformer.decode_step` returns NaN there.
        """
        update = jax.lax.dynamic_update_slice_in_dim
        return KeyValue(
            update(self.key, new.key.astype(self.key.dtype), index, axis=2),
            update(self.value, new.value.astype(self.value.dtype), index, axis=2),
        )


class MultiHeadAttention(Moded):
    """MultiHead(X, Y) = Concat(head₁ … head_N) W^O, head_i = Attention(X W_i^Q, Y W_i^K, Y W_i^V).

    The arguments and parameters are those of `nnx.MultiHeadAttention`, with two differences. A
    query that may attend to no key gets zeros; Flax returns the mean of the values. Dropout masks
    differ between heads and examples, as in the paper; Flax shares one by default. `attend` takes
    projected keys and values, such as a decoder's cache or an encoder's memory. (Section 3.2.2.)

    Args:
      num_heads: N, of the queries.
      in_features: size of the inputs' last axis.
      qkv_features: N · H, of queries and keys; None: in_features.
      out_features: size of the output's last axis; None: in_features.
      num_kv_heads: K, of keys and values, a divisor of N, each shared by N/K heads (Ainslie et
        al. 2023), 1 being multi-query attention (Shazeer 2019); None: N.
      use_bias: whether the four projections have a bias.
      normalize_qk: whether queries and keys are normalised over H (Henry et al. 2020, Dehghani
        et al. 2023).
      dtype: the dtype of the computation; None: promoted from inputs and parameters.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the four matrices.
      bias_init: initializer of their biases.
      dropout_rate: dropout rate of the attention weights.
      deterministic: whether to disable dropout; the call, `train()` and `eval()` override it.
      rngs: random keys for the parameters and, with dropout, for calls without `rngs`.
      value_features: N · E, of values; None: qkv_features.
      qk_norm: constructor of the norms of `normalize_qk`, with the arguments of `LayerNorm`; by
        default, as in Flax, a LayerNorm without bias.
      fused_qkv: whether the projections of one sequence are computed as one product.
      backend: one of `ATTENTION_BACKENDS`.

    Raises:
      ValueError: heads do not divide the features, or the backend has no dropout.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        use_bias: bool = True,
        normalize_qk: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        rngs: nnx.Rngs,
        value_features: int | None = None,
        qk_norm: Callable[..., Any] = layer_norm_without_bias,
        fused_qkv: bool = False,
        backend: str = "einsum",
    ):
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        qkv_features = in_features if qkv_features is None else qkv_features
        value_features = qkv_features if value_features is None else value_features
        check_sizes(num_heads, kv_heads, qkv_features, value_features, dropout_rate, backend)
        head, value_head = qkv_features // num_heads, value_features // num_heads
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inits: dict[str, Any] = {"kernel_init": kernel_init, "bias_init": bias_init}
        linear = partial(Linear, use_bias=use_bias, **inits, **common)

        def project_in(heads: int, width: int, axis: str) -> Linear:
            return linear(
                in_features,
                (heads, width),
                kernel_metadata=axis_names("embed", axis, "head"),
                bias_metadata=axis_names(axis, "head"),
            )

        # Keys and values that heads share are replicated over the mesh axis of the heads.
        self.kv_axis = "heads" if kv_heads == num_heads else "kv_heads"
        self.query = project_in(num_heads, head, "heads")
        self.key = project_in(kv_heads, head, self.kv_axis)
        self.value = project_in(kv_heads, value_head, self.kv_axis)
        self.out = linear(
            (num_heads, value_head),
            in_features if out_features is None else out_features,
            kernel_metadata=axis_names("heads", "head", "embed"),
            bias_metadata=axis_names("norm"),
        )
        self.query_ln = nnx.data(qk_norm(head, **common) if normalize_qk else None)
        self.key_ln = nnx.data(qk_norm(head, **common) if normalize_qk else None)
        self.num_heads, self.in_features = num_heads, in_features
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.rngs = nnx.data(kept_stream(rngs, dropout_rate))
        self.fused_qkv = fused_qkv
        self.backend = ATTENTION_BACKENDS[backend]
        self.sow_weights = False

    def __call__(
        self,
        inputs_q: Float[Array, "*B T D"],
        inputs_k: Float[Array, "*B S D"] | None = None,
        inputs_v: Float[Array, "*B S D"] | None = None,
        *,
        mask: Any = None,
        deterministic: bool | None = None,
        rngs: CallRngs = None,
        is_causal: bool = False,
        bias: Float[Array, "..."] | None = None,
        rotate: Rotate | None = None,
    ) -> Float[Array, "*B T out"]:
        """Returns the output of attention from `inputs_q` to `inputs_k` and `inputs_v`.

        Args:
          inputs_q: [..., T, D].
          inputs_k: [..., S, D]; None: inputs_q.
          inputs_v: [..., S, D]; None: inputs_k.
          mask: broadcastable to [..., N, T, S], True = may attend; or a `masking.Mask`.
          deterministic: overrides the module's attribute.
          rngs: random keys for dropout; the stream `attention`, or else `dropout`.
          is_causal: whether query t may attend only to the keys up to t, in addition to `mask`.
          bias: broadcastable to [..., N, T, S], added to the scores.
          rotate: applied to projected queries and keys [B, T, N, H], see `positions.Rotary`.
        """
        if inputs_k is None and inputs_v is not None:
            raise ValueError("inputs_v without inputs_k: pass the one array as inputs_k alone")
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs have {inputs_q.shape[-1]} features, and the module {self.in_features}"
            )
        batch = inputs_q.shape[:-2]
        if mask is not None and not isinstance(mask, Mask):
            mask = four_axes(jnp.asarray(mask, bool), batch)
        if is_causal:
            both, written = causal(inputs_q.shape[-2], inputs_k.shape[-2]), as_array(mask)
            mask = both if written is None else both & written
        if len(batch) != 1:
            inputs = (x.reshape(-1, *x.shape[-2:]) for x in (inputs_q, inputs_k, inputs_v))
            inputs_q, inputs_k, inputs_v = inputs
        query, key_value = self.project(inputs_q, inputs_k, inputs_v, rotate)
        out = self.attend(
            query,
            key_value,
            mask=mask,
            bias=four_axes(bias, batch),
            deterministic=deterministic,
            rngs=rngs,
        )
        return out.reshape(*batch, *out.shape[1:])

    def project(
        self, inputs_q: Array, inputs_k: Array, inputs_v: Array, rotate: Rotate | None = None
    ) -> tuple[Float[Array, "B N T H"], KeyValue]:
        """Queries, keys and values of [B, T, D]."""
        if inputs_q is inputs_k and inputs_k is inputs_v:
            query, key, value = self.products(inputs_q, self.query, self.key, self.value)
        elif inputs_k is inputs_v:
            query = self.query(inputs_q)
            key, value = self.products(inputs_k, self.key, self.value)
        else:
            query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        return self.finish_query(query, rotate), self.finish_key_value(key, value, rotate)

    def project_query(self, x: Float[Array, "B T D"]) -> Float[Array, "B N T H"]:
        """The queries of `x`, for `attend`."""
        return self.finish_query(self.query(x), None)

    def project_kv(self, y: Float[Array, "B S D"]) -> KeyValue:
        """The keys and values of `y`, for `attend`."""
        key, value = self.products(y, self.key, self.value)
        return self.finish_key_value(key, value, None)

    def products(self, x: Float[Array, "B T D"], *linears: Linear) -> Sequence[Array]:
        """Applies each linear layer to x; if fused, as one product with the stacked matrices.

        A single position, as in a decoding step, is not fused: that would stack the matrices
        for each token.
        """
        alike = len({linear.kernel.shape for linear in linears}) == 1
        if not (self.fused_qkv and alike) or x.shape[1] == 1:
            return [linear(x) for linear in linears]
        kernel = jnp.stack([linear.kernel[...] for linear in linears])
        dtype = compute_dtype(linears[0].dtype, x, kernel)
        products = jnp.einsum("BTD,CDNH->CBTNH", x.astype(dtype), kernel.astype(dtype))
        return [
            product if linear.bias is None else add_bias(product, linear.bias[...])
            for product, linear in zip(products, linears, strict=True)
        ]

    def finish_query(
        self, query: Float[Array, "B T N H"], rotate: Rotate | None
    ) -> Float[Array, "B N T H"]:
        """Normalises and rotates a projected query, if configured."""
        query = query if self.query_ln is None else self.query_ln(query)
        query = query if rotate is None else rotate(query)
        return constrain(query, "batch", "length", "heads", "head").swapaxes(1, 2)

    def finish_key_value(
        self,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K E"],
        rotate: Rotate | None,
    ) -> KeyValue:
        """Normalises and rotates projected keys, if configured, and pairs them with the values.

        Each device computes its own positions, which are then gathered over the mesh axis
        `context`, since each query attends to all keys.
        """
        split, whole = (("batch", axis, self.kv_axis, "head") for axis in ("length", "keys"))
        key = key if self.key_ln is None else self.key_ln(key)
        key = key if rotate is None else rotate(key)
        key, value = (constrain(constrain(x, *split), *whole) for x in (key, value))
        return KeyValue(key.swapaxes(1, 2), value.swapaxes(1, 2))

    def attend(
        self,
        query: Float[Array, "B N T H"],
        key_value: KeyValue,
        *,
        mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
        bias: Float[Array, "#B #N #T S"] | None = None,
        deterministic: bool | None = None,
        rngs: CallRngs = None,
    ) -> Float[Array, "B T out"]:
        """Returns the output for projected queries, keys and values; the latter may be a cache.

        If `sow_weights` is set, sows the weights [B, N, T, S], before dropout, as the
        `nnx.Intermediate` named `attention_weights`; `nnx.capture` collects them.
        """
        if self.sow_weights:
            weights = attention_weights(query, key_value.key, as_array(mask), bias)
            self.sow(nnx.Intermediate, "attention_weights", weights)
        drop, rate = {}, self.dropout_rate
        drops = isinstance(rate, jax.Array) or rate > 0.0
        if drops and not self.is_deterministic(deterministic):
            stream = stream_of("attention", rngs, self.rngs)
            drop = {"drop": partial(dropout, rate=rate, stream=stream)}
        heads = self.backend(query, key_value.key, key_value.value, mask, bias, **drop)
        return self.out(heads.swapaxes(1, 2))


def check_sizes(
    heads: int, kv_heads: int, features: int, value_features: int, dropout_rate: float, backend: str
) -> None:
    """Raises a ValueError if heads do not divide features, or the backend has no dropout."""
    for size, divisor in ((features, heads), (value_features, heads), (heads, kv_heads)):
        if size % divisor:
            raise ValueError(f"the number of heads, {divisor}, does not divide {size}")
    if dropout_rate > 0.0 and backend not in FLEXIBLE_BACKENDS:
        raise ValueError(f"backend={backend!r} cannot drop attention weights")


def four_axes(x: Array | None, batch: tuple[int, ...]) -> Array | None:
    """Reshapes a mask or bias broadcastable to [*batch, N, T, S] to four axes."""
    if x is None or (x.ndim == 4 and len(batch) == 1):
        return x
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if len(batch) != 1:
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
    return x
