"""Scaled dot-product attention, its backends, and multi-head attention.

Vaswani et al. 2017, section 3.2.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.dropout import Training, dropout
from transformer.errors import UserError
from transformer.masking import Mask, written_out
from transformer.normalization import RMSNorm
from transformer.sharding import constrain, each_shard


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


def share(x: Float[Array, "B K S H"], heads: int) -> Float[Array, "B N S H"]:
    """Keys or values for each of N heads, N/K neighbours sharing one of K."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


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
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B N T S"]:
    """softmax(Q Kᵀ / √H + bias) over the allowed keys, in float32 whatever the inputs' dtype."""
    key = share(key, query.shape[1])
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return masked_softmax(scores, mask)


def einsum_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B N T E"]:
    """Scaled dot-product attention, softmax(Q Kᵀ / √H + bias) V, as the equation reads.

    The reference that every other backend is tested against, and the one that has the
    weights at hand, for `drop` to be applied to. (Equation 1.)
    """
    weights = drop(attention_weights(query, key, written_out(mask), bias))
    value = share(value, query.shape[1])
    return jnp.einsum("BNTS,BNSE->BNTE", weights.astype(value.dtype), value)


def xla_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
    implementation: Any = "xla",
) -> Float[Array, "B N T E"]:
    """The same through `jax.nn.dot_product_attention`, which wants E = H.

    That function gives a query with no allowed key the mean of the values, so its
    output is set to zero here.
    """
    mask = written_out(mask)
    query, key, value = (each.swapaxes(1, 2) for each in (query, key, value))
    out = jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, implementation=implementation
    ).swapaxes(1, 2)
    return out if mask is None else jnp.where(mask.any(-1)[..., None], out, 0)


def cudnn_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B N T E"]:
    """cuDNN's flash attention, through the same function: for bfloat16 on an NVIDIA GPU.

    The few queries of a step of decoding are left to the reference.

    Raises:
      UserError: there is no such GPU, or cuDNN has no kernel for these shapes.
    """
    if query.shape[2] < 16:
        return einsum_attention(query, key, value, mask, bias)
    try:
        return xla_attention(query, key, value, mask, bias, "cudnn")
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.attention_backend=cudnn: {reason}; choose another, or auto"
        ) from error


def chunked_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B N T E"]:
    """`CHUNK` queries at a time, and their weights again in the gradient.

    So memory grows with S, not with T · S; a bias and a mask that is an array are as large as they
    are. (After Rabe and Staats 2021, who cut the keys too.)
    """
    length, chunks = query.shape[2], -(-query.shape[2] // CHUNK)
    if chunks == 1:
        return einsum_attention(query, key, value, mask, bias)

    def cut(x: Array, axis: int) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, chunks * CHUNK - length)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], chunks, CHUNK, *x.shape[axis + 1 :]), axis, 0
        )

    parts, whole = {"query": cut(query, 2), "first": jnp.arange(chunks) * CHUNK}, {}
    if isinstance(mask, Mask):
        parts["queries"] = cut(mask.queries, 1)
    for name, each in (("mask", mask), ("bias", bias)):
        if isinstance(each, Array):  # one for each query, or one for all of them
            whole[name] = each
            if each.shape[2] > 1:
                parts[name] = cut(whole.pop(name), 2)

    @jax.checkpoint
    def attend(part: dict[str, Array]) -> Array:
        part = whole | part
        seen = part.get("mask")
        if isinstance(mask, Mask):
            seen = replace(mask, queries=part["queries"]).array(part["first"])
        return einsum_attention(part["query"], key, value, seen, part.get("bias"))

    out = jnp.moveaxis(jax.lax.map(attend, parts), 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def splash_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
) -> Float[Array, "B N T E"]:
    """Splash attention, the flash kernel for TPUs that comes with JAX; elsewhere interpreted.

    It takes a mask as segments, causality and a window, and skips the blocks in which
    nothing is allowed. It knows no bias. What it cannot take, and single queries, are left to
    the reference.
    """
    if bias is not None or not isinstance(mask, Mask) or query.shape[2] == 1:
        return einsum_attention(query, key, value, mask, bias)
    attend = each_shard(
        partial(splash_kernel, causal=mask.causal, window=mask.window),
        (
            ("batch", "heads", None, None),
            *(("batch", "heads" if query.shape[1] == key.shape[1] else None, None, None),) * 2,
            *(("batch", None),) * 2,
        ),
        ("batch", "heads", None, None),
    )
    out = attend(query * query.shape[-1] ** -0.5, key, value, mask.queries, mask.keys)
    return jnp.where(mask.attends()[:, None, :, None], out, 0)


def splash_kernel(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B N T E"]:
    """The kernel itself, on lengths made multiples of its blocks; queries are scaled."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % LANES)
        return jnp.pad(x, widths)

    length = query.shape[2]
    query, key, value = (pad(each, 2) for each in (query, key, value))
    segments = splash.SegmentIds(pad(query_segments, 1), pad(key_segments, 1))
    shape = query.shape[2], key.shape[2]
    if window is not None:
        near = (window - 1, 0 if causal else window - 1)
        one_head = splash.LocalMask(shape, near, offset=0)
    else:
        one_head = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    heads = splash.MultiHeadMask([one_head] * query.shape[1])
    q, kv = (next(size for size in (512, 256, LANES) if n % size == 0) for n in shape)
    sizes = splash.BlockSizes(q, kv, kv, q, kv, kv, q, kv)

    def attend(*inputs: Array, interpret: bool) -> Any:
        kernel = splash.make_splash_mha(
            heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.vmap(kernel)(*inputs[:3], splash.SegmentIds(*inputs[3:]))

    out = jax.lax.platform_dependent(
        *(query, key, value, *segments),
        tpu=partial(attend, interpret=False),
        default=partial(attend, interpret=True),
    )
    return out[:, :, :length]


def auto_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S E"],
    mask: Mask | Bool[Array, "#B #N #T S"] | None = None,
    bias: Float[Array, "#B #N #T S"] | None = None,
    **drop: Callable[[Array], Array],
) -> Float[Array, "B N T E"]:
    """The backend that `pick` names for these shapes, on this platform."""
    flexible = bool(drop) or query.shape[-1] != value.shape[-1]
    lengths = query.shape[2], key.shape[2]
    name = pick(
        jax.default_backend(), query.dtype, query.shape[-1], lengths, bias is not None, flexible
    )
    return ATTENTION_BACKENDS[name](query, key, value, mask, bias, **drop)


def pick(
    platform: str,
    dtype: jnp.dtype,
    head_width: int,
    lengths: tuple[int, int],
    biased: bool,
    flexible: bool,
) -> str:
    """The name of the backend for a platform and what is to be computed there.

    Args:
      platform: cpu, gpu or tpu.
      dtype: of queries.
      head_width: H.
      lengths: T and S.
      biased: whether scores get a bias.
      flexible: whether weights are dropped, or E is not H.
    """
    if flexible:
        return "einsum"
    if platform == "tpu" and not biased and min(lengths) >= 512:
        return "splash"
    if platform == "gpu" and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128:
        return "cudnn"
    return "chunked" if min(lengths) >= LONG else "einsum"


CHUNK = 256  # queries at a time
LONG = 2048  # tokens from which weights take more memory than anything else
LANES = 128  # of a TPU's vector unit: what the lengths of a kernel are multiples of

ATTENTION_BACKENDS: dict[str, Callable[..., Array]] = {
    "auto": auto_attention,
    "einsum": einsum_attention,
    "xla": xla_attention,
    "chunked": chunked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}

# The backends that can drop attention weights, and have values of another width than keys.
FLEXIBLE_BACKENDS = ("auto", "einsum")

# Those that compute in bfloat16 alone, on the device that they are for.
BFLOAT16_BACKENDS = ("cudnn",)

# Those that take a mask in short, and never hold T · S of it.
SHORT_MASK_BACKENDS = ("auto", "chunked", "splash")


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
        fused: bool,
        init: Callable[..., Array],
        backend: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def project_in(heads: int, head_width: int, axis: str):
            return nnx.LinearGeneral(
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
        self.out = nnx.LinearGeneral(
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
        self.query_norm = RMSNorm(head_width, epsilon=1e-6) if qk_norm else None
        self.key_norm = RMSNorm(head_width, epsilon=1e-6) if qk_norm else None
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

    def products(self, x: Float[Array, "B T D"], *linears: nnx.LinearGeneral) -> list[Array]:
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
            product if bias is None else product + bias.astype(dtype)
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
