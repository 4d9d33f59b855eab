"""Compares the attention backends of this device with the equation in float32.

Outputs and gradients, for several numbers of key heads and each kind of mask: of `cudnn` on an
NVIDIA GPU and of `splash` compiled for a TPU, which the tests cannot run. Exits with status 1 if a
backend is wrong.

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

BACKENDS = flags.DEFINE_list("backends", None, "Backends; default those of this device.")
LENGTH = flags.DEFINE_integer("length", 256, "Number of queries and of keys.", lower_bound=16)

HEADS, WIDTH, ROWS = 8, 64, 4
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative to the largest value
DEVICE_BACKENDS = {"gpu": ["cudnn", "xla", "chunked"], "tpu": ["splash", "xla", "chunked"]}


def masks(length: int) -> dict[str, Mask]:
    """Padding, packed rows, causality and a window; one row has no keys at all."""
    position = np.arange(length)
    packed = 1 + 3 * position // length
    half_empty = np.where(position < length // 2, packed, 0)
    rows = jnp.asarray(np.stack([packed, half_empty, 0 * packed + 1, 0 * packed]), jnp.int32)
    padding = (rows > 0).astype(jnp.int32)
    return {
        "padding": Mask(padding, padding),
        "packed": Mask(rows, rows),
        "causal": Mask(rows, rows, causal=True),
        "window": Mask(rows, rows, causal=True, window=length // 8),
    }


def output_and_gradients(backend: str, mask: Mask, inputs: list[jax.Array]) -> list[jax.Array]:
    """The output and the gradients of one backend, in float32."""
    taken = mask if backend in SHORT_MASK_BACKENDS else mask.array()

    def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = ATTENTION_BACKENDS[backend](*inputs, taken).astype(jnp.float32)
        return jnp.sin(out + 1.0).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [each.astype(jnp.float32) for each in (out, *gradients)]


def errors(backend: str, dtype: str, kv_heads: int, mask: Mask) -> list[float]:
    """The largest error of the output and of each gradient, relative to the largest value."""
    rng, length = np.random.default_rng(0), mask.queries.shape[1]
    shapes = [(ROWS, heads, length, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    exact = output_and_gradients("einsum", mask, [x.astype(jnp.float32) for x in inputs])
    found = output_and_gradients(backend, mask, inputs)
    return [
        float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(found, exact, strict=True)
    ]


def main() -> None:
    """Prints a row per backend, number of key heads and mask."""
    cli.set_up_jax()
    rows, wrong = [], 0
    default = DEVICE_BACKENDS.get(jax.default_backend(), ["xla", "chunked", "splash"])
    for backend in BACKENDS.value or default:
        dtype = "bfloat16" if backend in BFLOAT16_BACKENDS else "float32"
        for kv_heads in (HEADS, HEADS // 4, 1):
            for name, mask in masks(LENGTH.value).items():
                with jax.default_matmul_precision("highest"):
                    found = errors(backend, dtype, kv_heads, mask)
                is_wrong = not np.max(found) <= TOLERANCE[dtype]  # NaN is wrong too
                wrong += is_wrong
                shown = [f"{each:.1e}" for each in found]
                result = "WRONG" if is_wrong else "ok"
                rows.append((backend, str(kv_heads), name, *shown, result))
    title = f"{jax.devices()[0].device_kind}: errors against the equation in float32"
    columns = ("backend", "key heads", "mask", "output", "d query", "d key", "d value", "")
    table(title, columns, rows)
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    cli.run(main)
