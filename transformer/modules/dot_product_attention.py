"""Scaled dot-product attention, softmax(Q Kᵀ / √H) V, and the backends that compute it.

`einsum_attention` is the reference; the other backends compute the same function with less memory
or on specific devices. B is the batch, N the heads of the queries, K those of keys and values (N,
or a divisor of it), T and S the numbers of queries and keys, H and E the widths of a head's keys
and values, the paper's d_k and d_v. A mask is True where a query may attend to a key; a bias is
added to the scores. (Vaswani et al. 2017, section 3.2.1.)
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.errors import UserError
from transformer.modules.masking import Mask, as_array
from transformer.parallel.mesh import axis_shards, shard_by_rules

Query = Float[Array, "B N T H"]
Key = Float[Array, "B K S H"]
Value = Float[Array, "B K S E"]
Allowed = Mask | Bool[Array, "#B #N #T S"] | None
Bias = Float[Array, "#B #N #T S"] | None
Output = Float[Array, "B N T E"]

CHUNK = 256  # queries at a time in `chunked`
LONG = 2048  # length from which the attention weights dominate memory
LANES = 128  # lanes of a TPU's vector unit; lengths are padded to multiples


def share(x: Float[Array, "B K S H"], heads: int) -> Float[Array, "B N S H"]:
    """Repeats keys or values for N heads; N/K neighbouring heads share one."""
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
    query: Query, key: Key, mask: Bool[Array, "#B #N #T S"] | None = None, bias: Bias = None
) -> Float[Array, "B N T S"]:
    """softmax(Q Kᵀ / √H + bias) over the allowed keys, in float32 for any input dtype."""
    key = share(key, query.shape[1])
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return masked_softmax(scores, mask)


def einsum_attention(
    query: Query,
    key: Key,
    value: Value,
    mask: Allowed = None,
    bias: Bias = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Output:
    """Scaled dot-product attention, softmax(Q Kᵀ / √H + bias) V.

    The reference that the other backends are tested against. It materialises the weights, to which
    `drop` is applied. (Equation 1.)
    """
    weights = drop(attention_weights(query, key, as_array(mask), bias))
    value = share(value, query.shape[1])
    return jnp.einsum("BNTS,BNSE->BNTE", weights.astype(value.dtype), value)


def xla_attention(
    query: Query,
    key: Key,
    value: Value,
    mask: Allowed = None,
    bias: Bias = None,
    implementation: Any = "xla",
) -> Output:
    """`jax.nn.dot_product_attention`, which requires E = H.

    That function gives a query with no allowed key the mean of the values, so its
    output is set to zero.
    """
    mask = as_array(mask)
    query, key, value = (each.swapaxes(1, 2) for each in (query, key, value))
    out = jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, implementation=implementation
    ).swapaxes(1, 2)
    return out if mask is None else jnp.where(mask.any(-1)[..., None], out, 0)


def cudnn_attention(
    query: Query, key: Key, value: Value, mask: Allowed = None, bias: Bias = None
) -> Output:
    """cuDNN's flash attention through `xla_attention`, for bfloat16 on an NVIDIA GPU.

    The few queries of a decoding step use the reference.

    Raises:
      UserError: the GPU is missing, or cuDNN has no kernel for these shapes.
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
    query: Query, key: Key, value: Value, mask: Allowed = None, bias: Bias = None
) -> Output:
    """Processes `CHUNK` queries at a time and rematerialises their weights in the backward pass.

    Memory grows with S instead of T · S, apart from a bias or a mask given as an array. (After Rabe
    and Staats 2021, who also split the keys.)
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
    query: Query, key: Key, value: Value, mask: Allowed = None, bias: Bias = None
) -> Output:
    """Splash attention, JAX's flash attention kernel for TPUs; interpreted on other devices.

    It takes a mask as segment ids, causality and a window, and skips fully masked blocks. A bias,
    a mask given as an array, and single queries use the reference.
    """
    if bias is not None or not isinstance(mask, Mask) or query.shape[2] == 1:
        return einsum_attention(query, key, value, mask, bias)
    # A device with some of the query heads needs the keys and values that these heads share.
    shared = math.lcm(key.shape[1], axis_shards("heads"))
    key, value = share(key, shared), share(value, shared)
    heads, segments = ("batch", "heads", None, None), ("batch", None)
    attend = shard_by_rules(
        partial(splash_kernel, causal=mask.causal, window=mask.window),
        (*(heads,) * 3, *(segments,) * 2),
        heads,
    )
    out = attend(query * query.shape[-1] ** -0.5, key, value, mask.queries, mask.keys)
    return jnp.where(mask.attends()[:, None, :, None], out, 0)


def splash_kernel(
    query: Query,
    key: Key,
    value: Value,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    causal: bool,
    window: int | None,
) -> Output:
    """Calls the kernel with lengths padded to its block size; queries are already scaled."""
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
    query: Query,
    key: Key,
    value: Value,
    mask: Allowed = None,
    bias: Bias = None,
    **drop: Callable[[Array], Array],
) -> Output:
    """The backend that `pick` selects for these shapes on this platform."""
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
    """Returns the name of the backend for a platform and a computation.

    Args:
      platform: cpu, gpu or tpu.
      dtype: the dtype of the queries.
      head_width: H.
      lengths: T and S.
      biased: whether a bias is added to the scores.
      flexible: whether there is dropout of the weights, or E ≠ H.
    """
    if flexible:
        return "einsum"
    if platform == "tpu" and not biased and min(lengths) >= 512:
        return "splash"
    if platform == "gpu" and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128:
        return "cudnn"
    return "chunked" if min(lengths) >= LONG else "einsum"


ATTENTION_BACKENDS: dict[str, Callable[..., Array]] = {
    "auto": auto_attention,
    "einsum": einsum_attention,
    "xla": xla_attention,
    "chunked": chunked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}

# Backends that support dropout of attention weights, and values of another width than keys.
FLEXIBLE_BACKENDS = ("auto", "einsum")

# Backends that compute only in bfloat16, on their device.
BFLOAT16_BACKENDS = ("cudnn",)

# Backends that take a compact `Mask` and do not materialise T · S entries.
SHORT_MASK_BACKENDS = ("auto", "chunked", "splash")
