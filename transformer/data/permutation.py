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
RoundKeys = UInt32[Array, "6"]


def round_keys(key: Array, epoch: UInt32[Array, ""]) -> RoundKeys:
    """The round keys of one epoch's permutation, for the data key of a run."""
    return jax.random.bits(jax.random.fold_in(key, epoch), (ROUNDS,), jnp.uint32)


def permute(index: UInt32[Array, ""], size: int, keys: RoundKeys) -> UInt32[Array, ""]:
    """The image of `index` under the permutation of 0 … size - 1 with these round keys."""
    first = _network(index, keys, size)
    return jax.lax.while_loop(lambda x: x >= size, lambda x: _network(x, keys, size), first)


def permute_numpy(
    index: Int[np.ndarray, "n"], size: int, keys: UInt32[np.ndarray, "n 6"]
) -> Int[np.ndarray, "n"]:
    """`permute` of each index with its own round keys, in NumPy."""
    image = _network(index.astype(np.uint32), keys.T, size)
    while (outside := image >= size).any():
        image[outside] = _network(image[outside], keys[outside].T, size)
    return image.astype(np.int64)


def _network(x: Any, keys: Iterable[Any], size: int) -> Any:
    """The image of x under a Feistel network with one key per round, in uint32 of NumPy or JAX."""
    half = np.uint32(max(1, math.ceil(math.log2(max(size, 2)) / 2)))  # bits of a half
    mask = (np.uint32(1) << half) - np.uint32(1)
    left, right = x >> half, x & mask
    for key in keys:
        # The finaliser of MurmurHash3: every input bit affects every output bit.
        mixed = right ^ key
        mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint32(16))) & mask)
    return (left << half) | right
