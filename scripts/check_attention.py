"""Compares the attention backends that this device has with the equation in float32.

Outputs and gradients, for each way of sharing keys and values and each mask: of `cudnn` on an
NVIDIA GPU and of `splash` compiled for a TPU, which the tests cannot run. The exit status is 1 if
one is off.

Usage:
    python scripts/check_attention.py [--backends=cudnn]
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from transformer import cli
from transformer.console import table
from transformer.modules.dot_product_attention import (
    ATTENTION_BACKENDS,
    BFLOAT16_BACKENDS,
    SHORT_MASK_BACKENDS,
)
from transformer.modules.masking import Mask

BACKENDS = flags.DEFINE_list("backends", None, "Which; default those of this device.")
LENGTH = flags.DEFINE_integer("length", 256, "Queries, and keys.", lower_bound=16)

HEADS, WIDTH, ROWS = 8, 64, 4
# The most of the error, for outputs and gradients of size 1: a few roundings of bfloat16.
ALLOWED = {"float32": 1e-3, "bfloat16": 3e-2}


def masks(length: int) -> dict[str, Mask]:
    """Padding, packed rows, causality and a window; of one row no query has a key."""
    place = np.arange(length)
    packed = 1 + 3 * place // length
    segments = np.stack(
        [packed, np.where(place < length // 2, packed, 0), 0 * place + 1, 0 * place]
    )
    rows = jnp.asarray(segments, jnp.int32)
    padding = (rows > 0).astype(jnp.int32)
    return {
        "padding": Mask(padding, padding),
        "packed": Mask(rows, rows),
        "causal": Mask(rows, rows, causal=True),
        "window": Mask(rows, rows, causal=True, window=length // 8),
    }


def both(backend: str, mask: Mask, inputs: list[jax.Array]) -> list[jax.Array]:
    """The output and the gradients of one backend, in float32."""
    attend = ATTENTION_BACKENDS[backend]
    taken = mask if backend in SHORT_MASK_BACKENDS else mask.array()

    def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*inputs, taken).astype(jnp.float32)
        return jnp.sin(out + 1.0).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [each.astype(jnp.float32) for each in (out, *gradients)]


def errors(backend: str, dtype: str, kv_heads: int, mask: Mask) -> list[float]:
    """The largest difference of the output and of each gradient, beside the largest value."""
    rng, length = np.random.default_rng(0), mask.queries.shape[1]
    shapes = [(ROWS, heads, length, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    wanted = both("einsum", mask, [each.astype(jnp.float32) for each in inputs])
    found = both(backend, mask, inputs)
    return [
        float(jnp.abs(one - other).max() / jnp.abs(other).max())
        for one, other in zip(found, wanted, strict=True)
    ]


def here() -> list[str]:
    """The backends of this device."""
    platform = jax.default_backend()
    own = {"gpu": ["cudnn", "xla", "chunked"], "tpu": ["splash", "xla", "chunked"]}
    return own.get(platform, ["xla", "chunked", "splash"])


def main() -> None:
    """Prints a row for each backend, number of key heads and mask."""
    cli.set_up_jax()
    rows, off = [], 0
    for backend in BACKENDS.value or here():
        dtype = "bfloat16" if backend in BFLOAT16_BACKENDS else "float32"
        for kv_heads in (HEADS, HEADS // 4, 1):
            for name, mask in masks(LENGTH.value).items():
                with jax.default_matmul_precision("highest"):
                    found = errors(backend, dtype, kv_heads, mask)
                wrong = not np.max(found) <= ALLOWED[dtype]  # NaN is wrong too
                off += wrong
                shown = [f"{each:.1e}" for each in found]
                rows.append((backend, str(kv_heads), name, *shown, "OFF" if wrong else "ok"))
    title = f"{jax.devices()[0].device_kind}: differences from the equation in float32"
    columns = ("backend", "key heads", "mask", "output", "d query", "d key", "d value", "")
    table(title, columns, rows)
    sys.exit(int(off > 0))


if __name__ == "__main__":
    cli.run(main)
