"""Recurrence against attention: steps to learn, sequential operations, time, use of cores."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from transformer.data.batches import make_batch
from transformer.experiments.claims import pictures
from transformer.experiments.claims.measuring import interleaved, on_cores, slope, trip_counts
from transformer.experiments.claims.page import Check, Claim, Setting, table
from transformer.experiments.claims.sweeps import (
    Race,
    bests,
    file_of,
    judge,
    rates_table,
    records,
    seconds_a_step,
)
from transformer.experiments.report import Record
from transformer.experiments.statistics import mean_interval
from transformer.experiments.sweep import load_config, load_sweep
from transformer.loss import cross_entropy
from transformer.model import Model, ModelConfig
from transformer.sharding import cores

KINDS = ("transformer", "lstm", "gru")
VOCABULARY = 32
ROWS = 16


@cache
def model_of(kind: str) -> Model:
    """The model of one of `KINDS` in the sweep, all of about as many parameters."""
    sweep = load_sweep(file_of("recurrence"))
    overrides = next(each for name, each in sweep.variants.items() if name.startswith(kind))
    config = load_config(sweep.config)
    config.update_from_flattened_dict({**sweep.overrides, **overrides})
    config.model.max_length = 1024
    return Model(ModelConfig(**config.model), VOCABULARY)


def gradient_call(kind: str, n: int, rows: int = ROWS) -> tuple[Callable[..., Any], tuple]:
    """The gradient of the loss on strings of n tokens, and its arguments."""
    model = model_of(kind)
    params, statistics = model.split(model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, rows, n), 3, VOCABULARY)
    batch = make_batch(tokens[0], tokens[1])

    def loss(params: Any, batch: Any) -> Any:
        logits = model.bind(params | statistics)(
            batch.source, batch.source_segments, batch.target_in, batch.target_segments
        )
        return cross_entropy(logits, batch.target_out).mean()

    return jax.grad(loss), (params, batch)


def learning(setting: Setting, *, rounds: int = 5) -> Claim:
    """Steps and seconds to the target, each kind at its own best learning rate."""
    found = records(setting, "recurrence")
    variants = [best.variant for best in bests(found).values()]
    seconds = seconds_a_step(
        load_sweep(file_of("recurrence")), variants, setting.data_dir, rounds=rounds
    )
    return judge_learning(setting, found, seconds)


def judge_learning(
    setting: Setting, found: Mapping[str, list[Record]], seconds: Mapping[str, Sequence[float]]
) -> Claim:
    """The same, from the records and each best variant's seconds a step."""
    best = bests(found)
    medians = {kind: float(np.median(seconds[each.variant])) for kind, each in best.items()}
    races = [
        Race(
            f"against the {kind.upper()}",
            best["transformer"],
            best[kind],
            medians["transformer"],
            medians[kind],
        )
        for kind in best
        if kind != "transformer"
    ]
    series = {}
    for kind, each in best.items():
        curves = np.array([[y for _, y in seed.curve] for seed in each.records])
        band = (curves.mean(0), curves.min(0), curves.max(0))
        series[f"{kind}, {each.rate:g}"] = ([x for x, _ in each.records[0].curve], *band)
    in_seconds = {
        name: ([x * medians[name.split(", ")[0]] for x in steps], *band)
        for name, (steps, *band) in series.items()
    }
    what = "validation sequences right"
    pictures.lines(
        [
            pictures.Panel("by steps", "step", what, series, ""),
            pictures.Panel("by time", "seconds of training", what, in_seconds, ""),
        ],
        setting.folder / "learning.png",
    )
    sweep = load_sweep(file_of("recurrence"))
    sizes = ", ".join(f"{kind} {each.records[0].parameters:,}" for kind, each in best.items())
    return Claim(
        title="Recurrence needs more steps to learn",
        says="Recurrent networks need more steps to train.",
        method=(
            f"Reverse until {sweep.target:.0%} of validation sequences are right: "
            f"`configs/ablations/recurrence.py`, about equal parameters ({sizes}), each kind "
            "at the best of the same four learning rates. Seconds are steps times the median "
            "seconds a step, timed in turns on all cores. True if the Transformer needs fewer at "
            "p ≤ 0.05 (paired t over seeds, Holm), or if it arrives on every seed and the other "
            "does not."
        ),
        checks=judge(races),
        picture="learning.png",
        tables=[
            table(("kind, learning rate", "seeds that arrive", "steps", ""), rates_table(found)),
            table(
                ("kind", "milliseconds a step"),
                [(kind, f"{1e3 * each:.2f}") for kind, each in medians.items()],
            ),
        ],
        data={"seconds a step": seconds},
    )


def sequential(setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128)) -> Claim:
    """How often the loops of the compiled training gradient run."""
    counts: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for n in lengths:
            function, args = gradient_call(kind, n)
            program = jax.jit(function).lower(*args).compile()
            counts[kind].append(trip_counts(program.as_text() or ""))
    longest = {kind: [max(each, default=0) for each in found] for kind, found in counts.items()}
    checks = []
    for kind, found in longest.items():
        text = ", ".join(f"{rounds} at n = {n}" for n, rounds in zip(lengths, found, strict=True))
        recurrent = kind != "transformer"
        holds = found == list(lengths) if recurrent else not any(found)
        number = len(counts[kind][-1])
        loops = f"{number} loops, each" if number else "no loop;"
        checks.append(Check(f"{kind}", f"{loops} rounds: {text}", holds))
    pictures.lines(
        [
            pictures.Panel(
                "rounds of the longest loop",
                "n",
                "sequential rounds (1: no loop)",
                {
                    kind: (lengths, [max(each, 1) for each in found])
                    for kind, found in longest.items()
                },
            )
        ],
        setting.folder / "sequential.png",
    )
    return Claim(
        title="Recurrence is sequential",
        says="A recurrent layer needs as many sequential operations as there are tokens, "
        "self-attention a constant number.",
        method=(
            "The gradient of the loss on strings of n tokens, compiled: the rounds of each of its "
            "loops, as the compiler states them in the program. True of a recurrent model if each "
            "longest loop runs n times, of the Transformer if there is no loop at any n."
        ),
        checks=checks,
        picture="sequential.png",
        data={"lengths": list(lengths)} | counts,
    )


def timings(lengths: Sequence[int], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of the gradient of each kind at each length, in turns."""
    calls = {}
    for kind in KINDS:
        for n in lengths:
            function, args = gradient_call(kind, n)
            calls[kind, n] = partial(jax.jit(function), *args)
    return interleaved(calls, rounds)


def wall_time(
    setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128, 256), rounds: int = 7
) -> Claim:
    """Time of a training gradient against the length."""
    found = timings(lengths, rounds)
    medians = {kind: [float(np.median(found[kind, n])) for n in lengths] for kind in KINDS}
    checks = []
    for kind in KINDS[1:]:
        for i, n in enumerate(lengths):
            ratio = np.array(found[kind, n]) / np.array(found["transformer", n])
            each = mean_interval(ratio)
            checks.append(
                Check(
                    f"{kind}, n = {n}",
                    f"the Transformer is {each.mean:.2f} [{each.low:.2f}, {each.high:.2f}] "
                    f"times as fast ({1e3 * medians['transformer'][i]:.2f} ms)",
                    bool(each.low > 1.0),
                )
            )
    series = {kind: (lengths, values) for kind, values in medians.items()}
    pictures.lines(
        [pictures.Panel(f"gradient, {ROWS} strings", "n", "seconds", series)],
        setting.folder / "wall_time.png",
    )
    rows = [(kind, f"n^{slope(lengths[-4:], values[-4:])}") for kind, values in medians.items()]
    return Claim(
        title="Recurrence is slower at every length",
        says="Recurrence is slower, since its steps follow one another.",
        method=(
            f"The gradient of the loss on {ROWS} strings of n tokens, models of about equal "
            f"parameters, all cores, {rounds} rounds in turns. True if the interval of the ratio "
            "over rounds lies above 1."
        ),
        checks=checks,
        picture="wall_time.png",
        tables=[table(("model", "time at the four largest n"), rows)],
        data={f"{kind}, n {n}": each for (kind, n), each in found.items()},
    )


def parallel(setting: Setting, *, length: int = 64, rounds: int = 5) -> Claim:
    """What more cores give to each kind."""
    # Where a process cannot be kept on some cores, there is nothing to compare.
    available = cores() if hasattr(os, "sched_setaffinity") else 0
    numbers = [each for each in (1, 2, 4, 8, 16) if each <= available]
    # Fresh processes in turns: what slows the machine for a while slows all numbers of cores.
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for number in numbers:
            for (kind, _), each in on_cores(number, timings, (length,), 3).items():
                seconds.setdefault((kind, number), []).append(float(np.median(each)))
    gains = {
        (kind, number): np.array(seconds[kind, 1]) / np.array(seconds[kind, number])
        for kind in KINDS
        for number in numbers
    }
    checks = []
    for kind in KINDS[1:]:
        for number in numbers[1:]:
            ours, theirs = gains["transformer", number], gains[kind, number]
            difference = mean_interval(np.log(ours) - np.log(theirs))
            checks.append(
                Check(
                    f"{number} cores, against the {kind.upper()}",
                    f"the Transformer becomes {ours.mean():.2f} times as fast, the {kind.upper()} "
                    f"{theirs.mean():.2f}; ratio {np.exp(difference.mean):.2f} "
                    f"[{np.exp(difference.low):.2f}, {np.exp(difference.high):.2f}]",
                    bool(difference.low > 0.0),
                )
            )
    series = {kind: (numbers, [gains[kind, each].mean() for each in numbers]) for kind in KINDS}
    if checks:
        pictures.lines(
            [pictures.Panel(f"n = {length}", "cores", "times as fast as on one", series)],
            setting.folder / "parallel.png",
        )
    return Claim(
        title="Recurrence leaves less to do in parallel",
        says="Recurrence leaves less to run in parallel.",
        method=(
            f"The gradient of the loss on {ROWS} strings of {length} tokens in fresh processes "
            f"that have {', '.join(map(str, numbers))} cores, {rounds} rounds in turns. True if "
            "the Transformer gains more from the cores: the interval of the ratio of the two gains "
            "lies above 1."
        ),
        checks=checks,
        picture="parallel.png" if checks else None,
        data={f"{kind}, {number} cores": each for (kind, number), each in seconds.items()},
    )
