"""Interleaved timing: what slows the machine for a while slows every contender alike."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax

from transformer import cli

Name = TypeVar("Name", bound=Hashable)
Calls = Mapping[Name, Callable[[], Any]]


def rotate(calls: Calls[Name], rounds: int, pause: float = 0.0) -> dict[Name, list[Any]]:
    """The result of every call in each round, in a random order, after so many seconds' pause."""
    found: dict[Name, list[Any]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            time.sleep(pause)
            found[name].append(calls[name]())
    return found


def interleaved(calls: Calls[Name], rounds: int, shortest: float = 0.02) -> dict[Name, list[float]]:
    """Seconds per call in each round; a measurement repeats a call for `shortest` seconds."""
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


def in_process(cores: int | None, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, pickled, in a fresh process on so many CPU cores; None: on all of them."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_initialize, initargs=(cores,)) as pool:
        return pool.submit(function, *args).result()


def _initialize(cores: int | None) -> None:
    """Keeps this process on its first `cores` cores, before JAX starts its threads."""
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    cli.set_up_jax()
