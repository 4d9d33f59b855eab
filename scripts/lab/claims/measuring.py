"""How times, growth and loops are measured: interleaved, fitted, read from compiled programs."""

import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
import scipy

from transformer import cli

Numbers = Sequence[Any] | np.ndarray

SHORTEST = 0.02  # seconds that a timing takes at least, by repeating the call


def interleaved(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, shortest: float = SHORTEST
) -> dict[Any, list[float]]:
    """Seconds a call takes, in each of several rounds in which every call has its turn.

    What slows the machine for a while then slows all of them. The order is another in each
    round, so that no call always follows the same one.
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles, and warms the caches
        repeats[name] = max(1, round(shortest / timed(call, 1)))
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            seconds[name].append(timed(calls[name], repeats[name]))
    return seconds


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds a call takes, of several in a row."""
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats


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


def in_a_process(cores: int | None, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process, on so many CPU cores, or on all of them.

    `function` and its arguments are pickled to a new interpreter.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=begin, initargs=(cores,)) as pool:
        return pool.submit(function, *args).result()


def begin(cores: int | None) -> None:
    """Keeps this process, which has no threads of JAX yet, on its first `cores` cores."""
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    cli.set_up_jax()
