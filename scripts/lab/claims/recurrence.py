"""Recurrence against attention: steps to learn, sequential operations, time, use of cores."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from lab.claims import pictures
from lab.claims.judging import (
    CHOOSING,
    Race,
    above_zero,
    arrival,
    bests,
    judge,
    rates_table,
    shown,
    times,
)
from lab.claims.measuring import instructions, slope, trip_counts
from lab.claims.page import Check, Claim, Setting, table
from lab.claims.sweeps import (
    curves,
    file_of,
    in_seconds,
    records,
    step_times,
    target_of,
)
from lab.sweeps.report import Record
from lab.sweeps.statistics import mean_interval
from lab.sweeps.sweep import load_sweep
from lab.timing import in_process, interleaved
from transformer.config import load_config
from transformer.data.batches import make_batch
from transformer.loss import cross_entropy
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model
from transformer.parallel.devices import cpu_cores

SWEEP = "recurrence"
KINDS = ("transformer", "lstm", "gru")
VOCABULARY = 32
ROWS = 16


@cache
def model_of(kind: str) -> Model:
    """The model of one of `KINDS` in the sweep, all of about as many parameters."""
    sweep = load_sweep(file_of(SWEEP))
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
        return cross_entropy(logits, batch.target_out).nll.mean()

    return jax.grad(loss), (params, batch)


def learning(setting: Setting, *, processes: int = 5) -> Claim:
    """Steps and seconds to the target, each kind at its own best learning rate."""
    found = records(setting, SWEEP)
    variants = [best.variant for best in bests(found, target_of(SWEEP)).values()]
    seconds = step_times(SWEEP, variants, setting.data_dir, processes)
    return judge_learning(setting, found, seconds)


def judge_learning(
    setting: Setting, found: Mapping[str, list[Record]], seconds: Mapping[str, Sequence[float]]
) -> Claim:
    """The same, from the records and each best variant's seconds a step."""
    target = target_of(SWEEP)
    best = bests(found, target)
    ours = best["transformer"]
    races = [
        Race(
            f"against the {kind.upper()}",
            ours,
            each,
            (np.log(seconds[each.variant]) - np.log(seconds[ours.variant])).tolist(),
        )
        for kind, each in best.items()
        if each is not ours
    ]
    lines = {kind: curves(each.records) for kind, each in best.items()}
    by_time = {kind: in_seconds(lines[kind], seconds[each.variant]) for kind, each in best.items()}
    y = "validation sequences right"
    pictures.lines(
        [
            pictures.Panel("by steps", "step", y, lines, ""),
            pictures.Panel("by time", "seconds of training", y, by_time, ""),
        ],
        setting.folder / "learning.png",
    )
    sizes = ", ".join(f"{kind} {each.records[0].parameters:,}" for kind, each in best.items())
    milliseconds = [
        (kind, shown(mean_interval([1e3 * one for one in seconds[each.variant]])))
        for kind, each in best.items()
    ]
    return Claim(
        name="learning",
        title="Steps and seconds to learn",
        says="Recurrent networks need more steps to train.",
        method=(
            f"Reverse until {target:.0%} of validation sequences are right: "
            f"`configs/ablations/recurrence.py`, about equal parameters ({sizes}), each kind "
            f"at the best of the same five learning rates, chosen on {CHOOSING} seeds; the others "
            "put it to the test. A run arrives where its learning curve crosses the target, "
            "between evaluations; seconds are steps times those of a step, timed in turns in "
            "fresh processes. True if the logs of what the other needs and of what the Transformer "
            "needs differ in its favour (paired t, Holm). The recurrent decoder feeds its attended "
            "output back, as Luong et al. 2015 do, so attention is inside its loop. Bands go from "
            "the lowest seed to the highest."
        ),
        checks=judge(races),
        tables=[
            table(
                ("kind, learning rate", "seeds that arrive", "steps", ""),
                rates_table(found, target),
            ),
            table(("kind", "milliseconds a step"), milliseconds),
        ],
        data={
            "seconds a step": seconds,
            "arrivals": {
                variant: [arrival(one, target) for one in each] for variant, each in found.items()
            },
        },
    )


def sequential(setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128)) -> Claim:
    """How often the loops of the compiled training gradient run."""
    programs = {}
    for kind in KINDS:
        for n in lengths:
            function, args = gradient_call(kind, n)
            programs[kind, n] = jax.jit(function).lower(*args).compile().as_text()
    return judge_sequential(setting, lengths, programs)


def judge_sequential(
    setting: Setting, lengths: Sequence[int], programs: Mapping[tuple[str, int], str]
) -> Claim:
    """The same, from the text of the programs."""
    checks, rows, loops = [], [], {}
    for kind in KINDS:
        texts = [programs[kind, n] for n in lengths]
        loops[kind] = [trip_counts(text) for text in texts]
        size = [instructions(text) for text in texts]
        if kind == "transformer":
            holds = not any(loops[kind]) and max(size) < 1.5 * min(size)
        else:
            holds = all(
                bool(each) and set(each) == {n}
                for n, each in zip(lengths, loops[kind], strict=True)
            )
        number = len(loops[kind][-1])
        found = f"{number} loops, of n rounds each" if number and holds else f"{number} loops"
        growing = f"{size[0]} instructions at n = {lengths[0]}, {size[-1]} at n = {lengths[-1]}"
        checks.append(Check(kind, f"{found}; {growing}", holds))
        for n, each, instr in zip(lengths, loops[kind], size, strict=True):
            rounds = ", ".join(map(str, each)) or "no loop"
            rows.append((kind, str(n), rounds, str(instr)))
    series = {kind: (lengths, [max(sum(each), 1) for each in loops[kind]]) for kind in KINDS}
    panel = pictures.Panel("rounds of all loops", "n", "sequential rounds (1: no loop)", series)
    pictures.lines([panel], setting.folder / "sequential.png")
    return Claim(
        name="sequential",
        title="Sequential operations",
        says="A recurrent layer needs as many sequential operations as there are tokens, "
        "self-attention a constant number.",
        method=(
            "The gradient of the loss on strings of n tokens, compiled: the rounds of each of its "
            "loops, as the compiler states them in the program. True of a recurrent model if every "
            "loop runs n times; of the Transformer if there is no loop at any n, and none that is "
            "unrolled: over all n the number of instructions grows by less than half."
        ),
        checks=checks,
        tables=[table(("model", "n", "rounds of its loops", "instructions"), rows)],
        data={"lengths": list(lengths)} | loops,
    )


def gradient_seconds(kinds: Sequence[str], lengths: Sequence[int], rounds: int) -> dict[Any, float]:
    """Median seconds of the gradient of each kind at each length, in turns."""
    calls = {}
    for kind in kinds:
        for n in lengths:
            function, args = gradient_call(kind, n)
            calls[kind, n] = partial(jax.jit(function), *args)
    return {each: float(np.median(found)) for each, found in interleaved(calls, rounds).items()}


def wall_time(
    setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128, 256), processes: int = 5
) -> Claim:
    """Time of a training gradient against the length."""
    rounds = [in_process(None, gradient_seconds, KINDS, lengths, 5) for _ in range(processes)]
    found = {each: [one[each] for one in rounds] for each in rounds[0]}
    return judge_wall_time(setting, lengths, found)


def judge_wall_time(
    setting: Setting, lengths: Sequence[int], found: Mapping[tuple[str, int], Sequence[float]]
) -> Claim:
    """The same, from the seconds in each process."""
    cases = {
        f"{kind}, n = {n}": (np.log(found[kind, n]) - np.log(found["transformer", n])).tolist()
        for kind in KINDS[1:]
        for n in lengths
    }
    seconds = {kind: np.array([found[kind, n] for n in lengths]) for kind in KINDS}
    series = {
        kind: (lengths, np.median(each, 1), each.min(1), each.max(1))
        for kind, each in seconds.items()
    }
    panel = pictures.Panel(f"gradient, {ROWS} strings", "n", "seconds", series)
    pictures.lines([panel], setting.folder / "wall_time.png")
    rows = [
        (kind, shown(mean_interval([slope(lengths[-4:], one) for one in each[-4:].T])))
        for kind, each in seconds.items()
    ]
    return Claim(
        name="wall_time",
        title="Time against recurrence",
        says="Recurrence is slower, since its steps follow one another.",
        method=(
            f"The gradient of the loss on {ROWS} strings of n tokens, models of about equal "
            "parameters, all cores, in turns in each of several fresh processes. True if the "
            "Transformer is faster (t-test of the log ratios over processes, Holm). The recurrent "
            "decoder has its attention inside its loop. Bands go from the quickest process to the "
            "slowest."
        ),
        checks=above_zero(cases, lambda each: f"the Transformer is {times(each)} as fast"),
        tables=[table(("model", "exponent of n in the time at the four largest n"), rows)],
        data={f"{kind}, n {n}": list(each) for (kind, n), each in found.items()},
    )


def parallel(setting: Setting, *, length: int = 64, processes: int = 5) -> Claim:
    """What more cores give to each kind."""
    # Where a process cannot be kept on some cores, there is nothing to compare.
    available = cpu_cores() if hasattr(os, "sched_setaffinity") else 0
    numbers = [each for each in (1, 2, 4, 8, 16) if each <= available]
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(processes):  # in turns: what slows the machine slows all numbers of cores
        for number in numbers:
            seconds = in_process(number, gradient_seconds, KINDS, (length,), 5)
            for kind in KINDS:
                found.setdefault((kind, number), []).append(seconds[kind, length])
    return judge_parallel(setting, length, numbers, found)


def judge_parallel(
    setting: Setting,
    length: int,
    numbers: Sequence[int],
    found: Mapping[tuple[str, int], Sequence[float]],
) -> Claim:
    """The same, from the seconds in each process."""
    gains = {
        (kind, number): np.log(found[kind, 1]) - np.log(found[kind, number])
        for kind in KINDS
        for number in numbers
    }
    cases = {
        f"{number} cores, against the {kind.upper()}": (
            gains["transformer", number] - gains[kind, number]
        ).tolist()
        for kind in KINDS[1:]
        for number in numbers[1:]
    }
    if cases:
        series = {}
        for kind in KINDS:
            each = np.exp([gains[kind, number] for number in numbers])
            series[kind] = (numbers, np.median(each, 1), each.min(1), each.max(1))
        panel = pictures.Panel(f"n = {length}", "cores", "times as fast as on one", series, "x")
        pictures.lines([panel], setting.folder / "parallel.png")
    rows = [
        (kind, str(number), times(mean_interval(gains[kind, number].tolist())))
        for kind in KINDS
        for number in numbers[1:]
    ]
    return Claim(
        name="parallel",
        title="Gain from more cores",
        says="Recurrence leaves less to run in parallel.",
        method=(
            f"The gradient of the loss on {ROWS} strings of {length} tokens in fresh processes "
            "that have one core or several, in turns. True if the Transformer gains more from "
            "the cores (t-test of the logs of the two gains over processes, Holm). Bands go from "
            "the lowest gain to the highest."
        ),
        checks=above_zero(cases, lambda each: f"its gain is {times(each)} the other's"),
        tables=[table(("model", "cores", "as fast as on one"), rows)] if rows else [],
        data={f"{kind}, {number} cores": list(each) for (kind, number), each in found.items()},
    )
