"""Multi-head attention (Vaswani et al. 2017, section 3.2.2), and its cache of keys and values."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import choose
from transformer.modules import dot_product_attention as core
from transformer.modules.dropout import CallRngs, Moded, dropout, kept_stream, stream_of
from transformer.modules.linear import Initializer, Linear, lecun_normal, linear_axes, zeros
from transformer.modules.masking import Mask, as_array, causal
from transformer.modules.normalization import LayerNorm
from transformer.modules.positions import QueryBias
from transformer.parallel.mesh import constrain

Tokens = Float[Array, "B T D"]
Rotate = Callable[[Array], Array] | None


class KeyValue(NamedTuple):
    """Projected keys and values of S positions."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S E"]


class KeyValueCache(NamedTuple):
    """Keys and values with room for S positions, in the order in which a decoding step reads them.

    Those of a head are contiguous, and keys are transposed.
    """

    key: Float[Array, "B K H S"]
    value: Float[Array, "B K S E"]

    @classmethod
    def of(cls, key_value: KeyValue) -> "KeyValueCache":
        """A cache that holds these."""
        return cls(key_value.key.swapaxes(2, 3), key_value.value)

    def write(self, new: KeyValue, index: int | Int[Array, ""]) -> "KeyValueCache":
        """This cache with `new` from position `index` on, where the caller ensures that it fits."""
        key, value = (x.astype(self.key.dtype) for x in KeyValueCache.of(new))
        update = jax.lax.dynamic_update_slice_in_dim
        return KeyValueCache(update(self.key, key, index, 3), update(self.value, value, index, 2))

    def grow(self, length: int) -> "KeyValueCache":
        """This cache with room for `length` positions."""
        more = (0, length - self.key.shape[3])
        key = jnp.pad(self.key, ((0, 0), (0, 0), (0, 0), more))
        return KeyValueCache(key, jnp.pad(self.value, ((0, 0), (0, 0), more, (0, 0))))


class MultiHeadAttention(Moded):
    """MultiHead(X, Y) = Concat(head₁ … head_N) W^O, head_i = Attention(X W_i^Q, Y W_i^K, Y W_i^V).

    Parameters, and arguments of the same name, are those of `nnx.MultiHeadAttention`. Two things
    differ: a query that may attend to no key gets zeros, where Flax returns the mean of the values,
    and dropout masks differ between heads and examples, as in the paper. (Section 3.2.2.)

    Args:
      qkv_features: N · H, of queries and keys; None: in_features.
      num_kv_heads: K, of keys and values, a divisor of N, each shared by N/K heads (Ainslie et
        al. 2023), 1 being multi-query attention (Shazeer 2019); None: N.
      normalize_qk: normalises queries and keys over H (Henry et al. 2020, Dehghani et al. 2023).
      dropout_rate: of the attention weights.
      rngs: random keys for the parameters and, with dropout, for calls without `rngs`.
      value_features: N · E, of values; None: qkv_features.
      qk_norm: constructor of the norms of `normalize_qk`; None: as Flax, LayerNorm without bias.
      backend: one of `ATTENTION_BACKENDS`.
      scale: of the scores, applied to the queries; None: 1/√H.
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
        qk_norm: Callable[..., Any] | None = None,
        backend: str = "einsum",
        scale: float | None = None,
    ):
        self.backend = choose(core.ATTENTION_BACKENDS, backend, "backend")
        if dropout_rate > 0.0 and backend not in core.FLEXIBLE_BACKENDS:
            raise ValueError(f"backend={backend!r} cannot drop attention weights")
        kv_heads, features = num_kv_heads or num_heads, qkv_features or in_features
        values = value_features or features
        for size, heads in ((features, num_heads), (values, num_heads), (num_heads, kv_heads)):
            if size % heads:
                raise ValueError(f"the number of heads, {heads}, does not divide {size}")
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inits = {"use_bias": use_bias, "kernel_init": kernel_init, "bias_init": bias_init}
        linear = partial(Linear, **inits, **common)

        def project_in(heads: int, width: int, axis: str) -> Linear:
            axes = linear_axes("embed", axis, "head")
            return linear(in_features, (heads, width // num_heads), **axes)

        # Keys and values that heads share are replicated over the mesh axis of the heads.
        self.kv_axis = "heads" if kv_heads == num_heads else "kv_heads"
        self.query = project_in(num_heads, features, "heads")
        self.key = project_in(kv_heads, features, self.kv_axis)
        self.value = project_in(kv_heads, values, self.kv_axis)
        axes = {"axis": (-2, -1)} | linear_axes("heads", "head", "embed")
        self.out = linear((num_heads, values // num_heads), out_features or in_features, **axes)
        qk_norm = partial(qk_norm or partial(LayerNorm, use_bias=False), **common)
        self.query_ln = nnx.data(qk_norm(features // num_heads) if normalize_qk else None)
        self.key_ln = nnx.data(qk_norm(features // num_heads) if normalize_qk else None)
        self.num_heads, self.in_features = num_heads, in_features
        # Backends divide by √H.
        self.query_scale = scale and scale * (features // num_heads) ** 0.5
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.rngs = nnx.data(kept_stream(rngs, dropout_rate))
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
        bias: Float[Array, "..."] | QueryBias | None = None,
        rotate: Rotate = None,
    ) -> Float[Array, "*B T out"]:
        """Attention from `inputs_q` to `inputs_k` (None: inputs_q) and `inputs_v` (None: inputs_k).

        Args:
          mask: broadcastable to [..., N, T, S], True = may attend; or a `masking.Mask`.
          deterministic: overrides the module's attribute.
          rngs: random keys for dropout; the stream `attention`, or else `dropout`.
          is_causal: whether query t may attend only to the keys up to t, in addition to `mask`.
          bias: broadcastable to [..., N, T, S], added to the scores; or, for B alone, a function
            of the projected queries, see `positions.TransformerXL`.
          rotate: applied to projected queries and keys [B, T, N, H], see `positions.Rotary`.
        """
        if inputs_k is None and inputs_v is not None:
            raise ValueError("inputs_v without inputs_k: pass the one array as inputs_k alone")
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(f"inputs have {inputs_q.shape[-1]} features, not {self.in_features}")
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        *batch, length, _ = inputs_q.shape
        if mask is not None and not isinstance(mask, Mask):
            mask = _four_axes(jnp.asarray(mask, bool), batch)
        if is_causal:
            order, given = causal(length, inputs_k.shape[-2]), as_array(mask)
            mask = order if given is None else order & given
        query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (inputs_q, inputs_k, inputs_v))
        projected = self.project_query(query, rotate), self.project_kv(key, value, rotate)
        mode = {"deterministic": deterministic, "rngs": rngs}
        bias = bias if callable(bias) else _four_axes(bias, batch)
        out = self.attend(*projected, mask=mask, bias=bias, **mode)
        return out.reshape(*batch, *out.shape[1:])

    def project_query(self, x: Tokens, rotate: Rotate = None) -> Float[Array, "B N T H"]:
        """The queries of `x`, normalised, rotated and scaled if configured."""
        query = self.query(x)
        query = query if self.query_ln is None else self.query_ln(query)
        query = query if rotate is None else rotate(query)
        query = query if self.query_scale is None else query * self.query_scale
        return constrain(query, "batch", "length", "heads", "head").swapaxes(1, 2)

    def project_kv(self, x: Tokens, y: Tokens | None = None, rotate: Rotate = None) -> KeyValue:
        """The keys of `x`, normalised and rotated if configured, and the values of `y` or `x`."""
        # Each device computes its positions, which are then gathered over the mesh axis `context`.
        split, whole = (("batch", axis, self.kv_axis, "head") for axis in ("length", "keys"))
        key, value = self.key(x), self.value(x if y is None else y)
        key = key if self.key_ln is None else self.key_ln(key)
        key = key if rotate is None else rotate(key)
        key, value = (constrain(constrain(each, *split), *whole) for each in (key, value))
        return KeyValue(key.swapaxes(1, 2), value.swapaxes(1, 2))

    def attend(
        self,
        query: Float[Array, "B N T H"],
        key_value: KeyValue,
        *,
        mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
        bias: Float[Array, "#B #N #T S"] | QueryBias | None = None,
        deterministic: bool | None = None,
        rngs: CallRngs = None,
    ) -> Float[Array, "B T out"]:
        """The output for projections; if `sow_weights` is set, sows the weights before dropout."""
        query, bias = bias(query) if callable(bias) else (query, bias)
        if self.sow_weights:
            weights = core.attention_weights(query, key_value.key, as_array(mask), bias)
            self.sow(nnx.Intermediate, "attention_weights", weights)
        drop, rate = {}, self.dropout_rate
        if (isinstance(rate, jax.Array) or rate > 0.0) and not self.is_deterministic(deterministic):
            stream = stream_of("attention", rngs, self.rngs)
            drop = {"drop": partial(dropout, rate=rate, stream=stream)}
        heads = self.backend(query, key_value.key, key_value.value, mask, bias, **drop)
        return self.out(heads.swapaxes(1, 2))

    def attend_cached(
        self, query: Float[Array, "B N T H"], cache: KeyValueCache, mask: Any, bias: Any = None
    ) -> Float[Array, "B T out"]:
        """The output for a few queries and a cache, without dropout, for any backend."""
        query, bias = bias(query) if callable(bias) else (query, bias)
        heads = core.from_cache(query, *cache, mask, bias)
        return self.out(heads.swapaxes(1, 2))


def _four_axes(x: Array | None, batch: list[Any]) -> Array | None:
    """Reshapes a mask or bias broadcastable to [*batch, N, T, S] to four axes."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if len(batch) != 1:
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
    return x
