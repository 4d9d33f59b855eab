"""A random permutation that is computed an element at a time.

A batch then costs its own size, and no step holds or sorts a whole epoch. It is a Feistel network
(Luby and Rackoff 1988) of six rounds over the smallest even number of bits that holds the size,
walked until it lands below the size (Black and Rogaway 2002). The arithmetic is that of uint32, the
same to the last bit in JAX and in NumPy.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

ROUNDS = 6


def half_width(size: int) -> int:
    """Bits in each half of what the network permutes."""
    return max(1, math.ceil(math.log2(max(size, 2)) / 2))


def network(x: Any, keys: Iterable[Any], half: int) -> Any:
    """Where the network sends x, uint32 below 2 ** (2 · half); an array of NumPy or of JAX.

    Args:
      x: what is permuted.
      keys: of each round, uint32.
      half: bits in each half.
    """
    low = np.uint32((1 << half) - 1)
    left, right = x >> np.uint32(half), x & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return (left << np.uint32(half)) | right


def mix(x: Any) -> Any:
    """The finaliser of MurmurHash3: every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
