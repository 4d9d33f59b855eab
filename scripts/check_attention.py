"""Compares outputs and gradients of the attention backends with the reference in float32.

Covers `cudnn` on a GPU and `splash` on a TPU, which the tests cannot run; status 1: one is wrong.

    python scripts/check_attention.py [--backends=cudnn]
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from transformer import cli
from transformer.console import table
from transformer.modules import dot_product_attention as attention
from transformer.modules.masking import Mask

BACKENDS = flags.DEFINE_list("backends", None, "Backends; default those of this device.")
LENGTH = flags.DEFINE_integer("length", 256, "Number of queries and of keys.", lower_bound=16)

HEADS, WIDTH, ROWS = 8, 64, 4
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative to the largest value
DEVICE_BACKENDS = {"gpu": ["cudnn", "xla", "chunked"], "tpu": ["splash", "xla", "chunked"]}


def masks(length: int) -> dict[str, Mask]:
    """Padding, packed rows, causality and a window; one row has no keys at all."""
    packed = 1 + 3 * np.arange(length) // length
    half_empty = packed * (np.arange(length) < length // 2)
    rows = jnp.asarray(np.stack([packed, half_empty, 0 * packed + 1, 0 * packed]), jnp.int32)
    padding = (rows > 0).astype(jnp.int32)
    return {
        "padding": Mask(padding, padding),
        "packed": Mask(rows, rows),
        "causal": Mask(rows, rows, causal=True),
        "window": Mask(rows, rows, causal=True, window=length // 8),
    }


def errors(backend: str, dtype: str, kv_heads: int, mask: Mask) -> list[float]:
    """The largest error of the output and of each gradient, relative to the largest value."""
    rng, length = np.random.default_rng(0), mask.queries.shape[1]
    shapes = [(ROWS, heads, length, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def loss(name: str, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        taken = mask if name in attention.SHORT_MASK_BACKENDS else mask.array()
        out = attention.ATTENTION_BACKENDS[name](*inputs, taken).astype(jnp.float32)
        return jnp.sin(out + 1.0).sum(), out

    gradients = jax.jit(jax.grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    found = jax.tree.leaves(gradients(backend, *inputs))
    exact = jax.tree.leaves(gradients("einsum", *(x.astype(jnp.float32) for x in inputs)))
    *of_gradients, of_output = [
        float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max())
        for x, y in zip(found, exact, strict=True)
    ]
    return [of_output, *of_gradients]


def main() -> None:
    """Prints a row per backend, number of key heads and mask."""
    cli.set_up_jax()
    default = DEVICE_BACKENDS.get(jax.default_backend(), ["xla", "chunked", "splash"])
    choices = BACKENDS.value or default, (HEADS, HEADS // 4, 1), masks(LENGTH.value).items()
    rows = []
    for backend, kv_heads, (name, mask) in itertools.product(*choices):
        dtype = "bfloat16" if backend in attention.BFLOAT16_BACKENDS else "float32"
        with jax.default_matmul_precision("highest"):
            found = errors(backend, dtype, kv_heads, mask)
        is_wrong = not np.max(found) <= TOLERANCE[dtype]  # NaN is wrong too
        shown = [f"{each:.1e}" for each in found]
        rows.append((backend, str(kv_heads), name, *shown, "WRONG" if is_wrong else "ok"))
    columns = ("backend", "key heads", "mask", "output", "d query", "d key", "d value", "")
    table(f"{jax.devices()[0].device_kind}: errors against float32", columns, rows)
    sys.exit(int(any(row[-1] == "WRONG" for row in rows)))


if __name__ == "__main__":
    cli.run(main)
