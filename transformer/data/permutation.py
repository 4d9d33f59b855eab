"""A keyed random permutation of 0 … size - 1, computed one element at a time.

The cost of drawing a batch depends only on its size: no step stores or sorts an epoch. The
permutation is a Feistel network (Luby and Rackoff 1988) of six rounds on the smallest even number
of bits that holds `size`, applied until the result is below `size` (Black and Rogaway 2002). All
arithmetic is in uint32, so the JAX and the NumPy versions are bit-identical.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

ROUNDS = 6


def round_keys(key: Array, epoch: UInt32[Array, ""]) -> UInt32[Array, "6"]:
    """The round keys of one epoch's permutation, for the data key of a run."""
    return jax.random.bits(jax.random.fold_in(key, epoch), (ROUNDS,), jnp.uint32)


def permute(index: UInt32[Array, ""], size: int, keys: UInt32[Array, "6"]) -> UInt32[Array, ""]:
    """The image of `index` under the permutation of 0 … size - 1 with these round keys."""
    half = half_width(size)
    return jax.lax.while_loop(
        lambda x: x >= size,
        lambda x: feistel_network(x, keys, half),
        feistel_network(index, keys, half),
    )


def permute_numpy(
    index: Int[np.ndarray, "n"], size: int, keys: UInt32[np.ndarray, "n 6"]
) -> Int[np.ndarray, "n"]:
    """`permute` of each index with its own round keys, in NumPy."""
    half = half_width(size)
    image = feistel_network(index.astype(np.uint32), keys.T, half)
    while (outside := image >= size).any():
        image[outside] = feistel_network(image[outside], keys[outside].T, half)
    return image.astype(np.int64)


def half_width(size: int) -> int:
    """Bits in each half of the Feistel network's block."""
    return max(1, math.ceil(math.log2(max(size, 2)) / 2))


def feistel_network(x: Any, keys: Iterable[Any], half: int) -> Any:
    """The image of x under a Feistel network on 2 · `half` bits, with one key per round.

    x and the keys are uint32 arrays, both of NumPy or both of JAX.
    """
    mask = np.uint32((1 << half) - 1)
    left, right = x >> np.uint32(half), x & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << np.uint32(half)) | right


def mix(x: Any) -> Any:
    """The finaliser of MurmurHash3: every input bit affects every output bit."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
