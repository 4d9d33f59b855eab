"""Scaled dot-product attention, softmax(Q Kᵀ / √H) V, and the backends that compute it.

A mask is True where a query may attend to a key; a bias is added to the scores; N/K neighbouring
heads of the queries share a head of keys and values. (Vaswani et al. 2017, section 3.2.1.)
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer.errors import explained
from transformer.modules.masking import Mask, as_array
from transformer.parallel.mesh import axis_shards, shard_by_rules

Query = Float[Array, "B N T H"]
Key = Float[Array, "B K S H"]
Value = Float[Array, "B K S E"]
Weights = Float[Array, "B N T S"]
Allowed = Bool[Array, "#B #N #T S"] | None
Masks = Mask | Allowed
Bias = Float[Array, "#B #N #T S"] | None
Heads = Float[Array, "B N T E"]
Drop = Callable[[Array], Array] | None

CHUNK = 256  # queries at a time in `chunked`
LONG = 2048  # length from which the attention weights dominate memory
LANES = 128  # lanes of a TPU's vector unit; lengths are padded to multiples


def _share(x: Float[Array, "B K S H"], heads: int) -> Float[Array, "B N S H"]:
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def masked_softmax(scores: Weights, mask: Allowed) -> Weights:
    """Softmax over the keys that `mask` allows; others get exactly 0 and exactly zero gradient."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.maximum(peak, jnp.finfo(scores.dtype).min))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def attention_weights(query: Query, key: Key, mask: Allowed, bias: Bias = None) -> Weights:
    """softmax(Q Kᵀ / √H + bias) over the allowed keys, in float32 for any input dtype."""
    return _weights("BNTH,BNSH->BNTS", query, key, mask, bias)


def _weights(product: str, query: Query, key: Array, mask: Allowed, bias: Bias) -> Weights:
    key = _share(key, query.shape[1])
    scores = jnp.einsum(product, query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    return masked_softmax(scores if bias is None else scores + bias, mask)


def einsum(
    query: Query, key: Key, value: Value, mask: Masks = None, bias: Bias = None, drop: Drop = None
) -> Heads:
    """The reference, which materialises the weights and applies `drop` to them. (Equation 1.)"""
    weights = attention_weights(query, key, as_array(mask), bias)
    return _average(weights if drop is None else drop(weights), value)


def from_cache(
    query: Query, key: Float[Array, "B K H S"], value: Value, mask: Masks, bias: Bias = None
) -> Heads:
    """`einsum` with transposed keys; a product with few queries is faster than a transposition."""
    weights = _weights("BNTH,BNHS->BNTS", query, key, as_array(mask), bias)
    return _average(weights, value)


def _average(weights: Weights, value: Value) -> Heads:
    value = _share(value, weights.shape[1])
    return jnp.einsum("BNTS,BNSE->BNTE", weights.astype(value.dtype), value)


def xla(
    query: Query, key: Key, value: Value, mask: Masks = None, bias: Bias = None, kernel: Any = "xla"
) -> Heads:
    """`jax.nn.dot_product_attention`, with zeros for a query without keys; requires E = H."""
    mask = as_array(mask)
    q, k, v = (each.swapaxes(1, 2) for each in (query, key, value))
    out = jax.nn.dot_product_attention(q, k, v, bias, mask, implementation=kernel).swapaxes(1, 2)
    return out if mask is None else jnp.where(mask.any(-1)[..., None], out, 0)


def cudnn(query: Query, key: Key, value: Value, mask: Masks = None, bias: Bias = None) -> Heads:
    """cuDNN's flash attention, for bfloat16 on an NVIDIA GPU; `einsum` for a decoding step."""
    if query.shape[2] < 16:
        return einsum(query, key, value, mask, bias)
    message = "model.attention_backend=cudnn: {reason}; choose another, or auto"
    with explained(message, NotImplementedError, RuntimeError, ValueError):
        return xla(query, key, value, mask, bias, "cudnn")


def chunked(query: Query, key: Key, value: Value, mask: Masks = None, bias: Bias = None) -> Heads:
    """`CHUNK` queries at a time, rematerialised: memory grows with S. (Rabe and Staats 2021.)"""
    length = query.shape[2]
    if length <= CHUNK:
        return einsum(query, key, value, mask, bias)

    def cut(x: Array, axis: int) -> Array:
        shape = *x.shape[:axis], -1, CHUNK, *x.shape[axis + 1 :]
        return jnp.moveaxis(_pad(x, axis, CHUNK).reshape(shape), axis, 0)

    # A mask or bias may have one row for all queries, which each chunk takes whole.
    inputs = {"query": query, "mask": mask, "bias": bias}
    rows = [name for name, x in inputs.items() if isinstance(x, Array) and x.shape[2] > 1]
    chunks: dict[str, Any] = {name: cut(inputs[name], 2) for name in rows}
    if isinstance(mask, Mask):
        chunks |= {"segments": cut(mask.queries, 1), "first": jnp.arange(0, length, CHUNK)}

    @jax.checkpoint
    def attend(chunk: dict[str, Array]) -> Array:
        here = inputs | chunk
        if isinstance(mask, Mask):
            here["mask"] = replace(mask, queries=here["segments"]).array(here["first"])
        return einsum(here["query"], key, value, here["mask"], here["bias"])

    out = jnp.moveaxis(jax.lax.map(attend, chunks), 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def splash(query: Query, key: Key, value: Value, mask: Masks = None, bias: Bias = None) -> Heads:
    """JAX's flash attention kernel for TPUs, interpreted elsewhere, which skips masked blocks."""
    if bias is not None or not isinstance(mask, Mask) or query.shape[2] == 1:
        return einsum(query, key, value, mask, bias)
    # A device with some of the query heads needs the keys and values that these heads share.
    shared = math.lcm(key.shape[1], axis_shards("heads"))
    key, value = _share(key, shared), _share(value, shared)
    heads, segments = ("batch", "heads", None, None), ("batch", None)
    kernel = partial(_splash_kernel, causal=mask.causal, window=mask.window)
    attend = shard_by_rules(kernel, (heads, heads, heads, segments, segments), heads)
    out = attend(query * query.shape[-1] ** -0.5, key, value, mask.queries, mask.keys)
    return jnp.where(mask.attends()[:, None, :, None], out, 0)


def _splash_kernel(*inputs: Array, causal: bool, window: int | None) -> Heads:
    """Calls the kernel on query, key, value and segments, padded to its block size."""
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    length = inputs[0].shape[2]
    query, key, *rest = (_pad(each, 2 if each.ndim == 4 else 1, LANES) for each in inputs)
    shape = query.shape[2], key.shape[2]
    one_head = tpu.CausalMask(shape) if causal else tpu.FullMask(shape)
    if window is not None:
        one_head = tpu.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset=0)
    heads = tpu.MultiHeadMask([one_head] * query.shape[1])
    q, kv = (next(size for size in (512, 256, LANES) if n % size == 0) for n in shape)
    sizes = tpu.BlockSizes(q, kv, kv, q, kv, kv, q, kv)
    make = partial(tpu.make_splash_mha, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def attend(*inputs: Array, interpret: bool) -> Any:
        kernel = jax.vmap(make(heads, interpret=interpret))
        return kernel(*inputs[:3], tpu.SegmentIds(*inputs[3:]))

    kernels = {"tpu": partial(attend, interpret=False), "default": partial(attend, interpret=True)}
    return jax.lax.platform_dependent(query, key, *rest, **kernels)[:, :, :length]


def auto(
    query: Query, key: Key, value: Value, mask: Masks = None, bias: Bias = None, **drop: Any
) -> Heads:
    """The backend that `pick` selects for these shapes on this platform."""
    length, width = query.shape[2:]
    sizes, flexible = (width, min(length, key.shape[2])), bool(drop) or value.shape[-1] != width
    name = pick(jax.default_backend(), query.dtype, *sizes, bias is not None, flexible)
    return ATTENTION_BACKENDS[name](query, key, value, mask, bias, **drop)


def pick(
    platform: str, dtype: Any, head_width: int, length: int, biased: bool, flexible: bool
) -> str:
    """The name of a backend; `length`: the shorter; `flexible`: dropout of weights, or E ≠ H."""
    if flexible:
        return "einsum"
    if platform == "tpu" and not biased and length >= 512:
        return "splash"
    if platform == "gpu" and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128:
        return "cudnn"
    return "chunked" if length >= LONG else "einsum"


ATTENTION_BACKENDS: dict[str, Callable[..., Array]] = {
    "auto": auto,
    "einsum": einsum,
    "xla": xla,
    "chunked": chunked,
    "cudnn": cudnn,
    "splash": splash,
}

FLEXIBLE_BACKENDS = ("auto", "einsum")  # support dropout of the weights, and E ≠ H
BFLOAT16_BACKENDS = ("cudnn",)  # compute only in bfloat16, on their device
SHORT_MASK_BACKENDS = ("auto", "chunked", "splash")  # take a `Mask`, and no T · S entries
