"""Interleaved timing: what slows the machine for a while slows every contender alike."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def rotate(
    calls: Mapping[Name, Callable[[], Any]], rounds: int, pause: float = 0.0
) -> dict[Name, list[Any]]:
    """The result of every call in each of several rounds, in a new random order every round.

    Args:
      calls: name → a function without arguments.
      rounds: how often each is called.
      pause: seconds before each call, in which the threads of the previous one go to sleep.
    """
    found: dict[Name, list[Any]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            time.sleep(pause)
            found[name].append(calls[name]())
    return found


def interleaved(
    calls: Mapping[Name, Callable[[], Any]], rounds: int, shortest: float = 0.02
) -> dict[Name, list[float]]:
    """Seconds per call in each of several rounds; see `rotate`.

    Args:
      calls: name → a function without arguments, whose arrays are waited for.
      rounds: measurements of each.
      shortest: seconds that one measurement takes at least, by repeating the call.
    """
    timers = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles, and warms the caches
        timers[name] = partial(seconds, call, max(1, round(shortest / seconds(call))))
    return rotate(timers, rounds)


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds per call, over several calls in a row."""
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats
