"""How times, growth and loops are measured: interleaved, fitted, read from compiled programs."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

Numbers = Sequence[Any] | np.ndarray


def slope(x: Numbers, y: Numbers) -> float:
    """The exponent of y ~ x^exponent: the straight line through log y over log x."""
    fit: Any = scipy.stats.linregress(np.log(x), np.log(y))
    return float(fit.slope)


def crossing(x: Numbers, rising: Numbers, other: Numbers) -> float:
    """Where `rising` overtakes `other` for good, straight lines between logs.

    0.0 if it is ahead from the first x on, infinity if it is not at the last.
    """
    ahead = np.log(rising) - np.log(other)
    below = np.flatnonzero(ahead < 0.0)
    if below.size == 0:
        return 0.0
    i = below[-1]
    if i == len(x) - 1:
        return np.inf
    share = -ahead[i] / (ahead[i + 1] - ahead[i])
    return float(np.exp(np.log(x[i]) + share * (np.log(x[i + 1]) - np.log(x[i]))))


def trip_counts(program: str) -> list[int]:
    """How often each loop of a compiled program runs, longest first.

    Args:
      program: its HLO text.

    Raises:
      ValueError: the compiler does not know it of one.
    """
    loops = re.findall(r"^.* = .* while\(.*$", program, re.MULTILINE)
    counts = [re.search(r'"known_trip_count":\{"n":"(\d+)"', loop) for loop in loops]
    if None in counts:
        raise ValueError("a loop of the program has no known number of rounds")
    return sorted((int(count[1]) for count in counts if count), reverse=True)


def instructions(program: str) -> int:
    """How many instructions a compiled program has, by its HLO text, fused ones included."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", program, re.MULTILINE))
