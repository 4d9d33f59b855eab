"""How times, growth and loops are measured: interleaved, fitted, read from compiled programs."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from transformer.experiments.statistics import critical

Numbers = Sequence[Any] | np.ndarray

SHORTEST = 0.02  # seconds that a timing takes at least, by repeating the call


def interleaved(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, shortest: float = SHORTEST
) -> dict[Any, list[float]]:
    """Seconds a call takes, in each of several rounds in which every call has its turn.

    What slows the machine for a while then slows all of them.
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles, and warms the caches
        repeats[name] = max(1, round(shortest / timed(call, 1)))
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call, repeats[name]))
    return seconds


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call takes, of several in a row."""
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats


class Slope(NamedTuple):
    """y ~ x^exponent, with the 95% interval of the exponent."""

    exponent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"


def slope(x: Numbers, y: Numbers) -> Slope:
    """The straight line through log y over log x, by least squares."""
    fit: Any = stats.linregress(np.log(x), np.log(y))
    margin = critical(len(x) - 1, 0.95) * fit.stderr  # two numbers are fitted: n - 2 degrees
    return Slope(float(fit.slope), float(fit.slope - margin), float(fit.slope + margin))


def crossing(x: Numbers, rising: Numbers, other: Numbers) -> float | None:
    """Where `rising` overtakes `other` for good, straight lines between logs; None: nowhere in x.

    Args:
      x: ascending.
      rising: below the other at first, if they cross.
      other: likewise.
    """
    ahead = np.log(rising) - np.log(other)
    below = np.flatnonzero(ahead < 0.0)
    if below.size == 0 or below[-1] == len(x) - 1:
        return None
    i = below[-1]
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


def on_cores(cores: int, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own that has so many CPU cores to run on.

    `function` and its arguments are pickled to a fresh interpreter.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=stay_on, initargs=(cores,)) as pool:
        return pool.submit(function, *args).result()


def stay_on(cores: int) -> None:
    """Keeps this process, which has not started JAX's threads yet, on its first `cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
