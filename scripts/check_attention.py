"""Compares outputs and gradients of the attention backends with the reference in float32.

Covers `cudnn` on a GPU and `splash` on a TPU, which the tests cannot run; status 1: one is wrong.

    python scripts/check_attention.py [--backends=cudnn]
    python scripts/check_attention.py --dtype=bfloat16 --rows=64   # to compare the times
"""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from lab.timing import seconds

from transformer import cli
from transformer.console import table
from transformer.modules import dot_product_attention as attention
from transformer.modules.masking import Mask

BACKENDS = flags.DEFINE_list("backends", None, "Backends; default those of this device.")
LENGTH = flags.DEFINE_integer("length", 256, "Number of queries and of keys.", lower_bound=16)
ROWS = flags.DEFINE_integer("rows", 4, "Sequences, in fours.", lower_bound=4)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Except of cudnn.")

HEADS, WIDTH, REPEATS = 8, 64, 20
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative to the largest value
DEVICE_BACKENDS = {"gpu": ["cudnn"], "tpu": ["splash"]}


def masks(length: int) -> dict[str, Mask]:
    """Padding, packed rows, causality and a window; one row has no keys at all."""
    packed = 1 + 3 * np.arange(length) // length
    half_empty = packed * (np.arange(length) < length // 2)
    rows = np.stack([packed, half_empty, 0 * packed + 1, 0 * packed] * (ROWS.value // 4))
    rows = jnp.asarray(rows, jnp.int32)
    padding = (rows > 0).astype(jnp.int32)
    return {
        "padding": Mask(padding, padding),
        "packed": Mask(rows, rows),
        "causal": Mask(rows, rows, causal=True),
        "window": Mask(rows, rows, causal=True, window=length // 8),
    }


def errors(backend: str, dtype: str, kv_heads: int, mask: Mask) -> tuple[list[float], float]:
    """The largest error of output and gradients, relative to the largest value; milliseconds."""
    rng, (rows, length) = np.random.default_rng(0), mask.queries.shape
    shapes = [(rows, heads, length, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def loss(name: str, mask: Mask, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        taken = mask if name in attention.SHORT_MASK_BACKENDS else mask.array()
        out = attention.ATTENTION_BACKENDS[name](*inputs, taken).astype(jnp.float32)
        return jnp.sin(out + 1.0).sum(), out

    gradients = jax.jit(jax.grad(loss, argnums=(2, 3, 4), has_aux=True), static_argnums=0)
    found = jax.tree.leaves(gradients(backend, mask, *inputs))
    exact = jax.tree.leaves(gradients("einsum", mask, *(x.astype(jnp.float32) for x in inputs)))
    *of_gradients, of_output = [
        float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max())
        for x, y in zip(found, exact, strict=True)
    ]
    took = seconds(partial(gradients, backend, mask, *inputs), REPEATS)
    return [of_output, *of_gradients], 1e3 * took


def main() -> None:
    """Prints a row per backend, number of key heads and mask."""
    cli.set_up_jax()
    default = ["einsum", "xla", "chunked", *DEVICE_BACKENDS.get(jax.default_backend(), ["splash"])]
    choices = BACKENDS.value or default, (HEADS, HEADS // 4, 1), masks(LENGTH.value).items()
    rows = []
    for backend, kv_heads, (name, mask) in itertools.product(*choices):
        dtype = "bfloat16" if backend in attention.BFLOAT16_BACKENDS else DTYPE.value
        with jax.default_matmul_precision("highest"):
            found, ms = errors(backend, dtype, kv_heads, mask)
        is_wrong = not np.max(found) <= TOLERANCE[dtype]  # NaN is wrong too
        shown = [*(f"{each:.1e}" for each in found), f"{ms:.3f}"]
        rows.append((backend, str(kv_heads), name, *shown, "WRONG" if is_wrong else "ok"))
    columns = ("backend", "key heads", "mask", "output", "d query", "d key", "d value", "ms", "")
    table(f"{jax.devices()[0].device_kind}: errors against float32", columns, rows)
    sys.exit(int(any(row[-1] == "WRONG" for row in rows)))


if __name__ == "__main__":
    cli.run(main)
