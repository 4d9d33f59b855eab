"""Recurrence against attention: sequential operations, time, use of cores."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from lab import plots
from lab.claims.claim import Check, Claim, Setting, above_zero, band, log_ratio, shown, times
from lab.claims.complexity import slope, trip_counts
from lab.claims.learning import sweep_of
from lab.statistics import mean_interval
from lab.tables import markdown
from lab.timing import in_process, interleaved
from transformer.config import load_config
from transformer.data.batches import make_batch
from transformer.loss import cross_entropy
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model
from transformer.parallel.devices import cpu_cores

KINDS = ("transformer", "lstm", "gru")
VOCABULARY = 32
ROWS = 16


@cache
def model_of(kind: str) -> Model:
    """The model of one of `KINDS` in the sweep, all of about as many parameters."""
    sweep = sweep_of("recurrence")
    overrides = next(each for name, each in sweep.variants.items() if name.startswith(kind))
    config = load_config(sweep.config)
    config.update_from_flattened_dict({**sweep.overrides, **overrides})
    config.model.max_length = 1024
    return Model(ModelConfig(**config.model), VOCABULARY)


def gradient_call(kind: str, n: int) -> tuple[Callable[..., Any], tuple]:
    """The gradient of the loss on strings of n tokens, and its arguments."""
    model = model_of(kind)
    params, statistics = model.split(model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, ROWS, n), 3, VOCABULARY)
    batch = make_batch(tokens[0], tokens[1])

    def loss(params: Any, batch: Any) -> Any:
        logits = model.bind(params | statistics)(**batch.inputs())
        return cross_entropy(logits, batch.target_out).nll.mean()

    return jax.grad(loss), (params, batch)


def compiled(kind: str, n: int) -> str:
    """The HLO text of the compiled gradient."""
    function, args = gradient_call(kind, n)
    return str(jax.jit(function).lower(*args).compile().as_text())


def sequential(setting: Setting, *, lengths: Sequence[int] = (8, 16, 32, 64, 128)) -> Claim:
    """The rounds of the loops of the compiled training gradient."""
    checks, rows, series = [], [], {}
    for kind in KINDS:
        texts = [compiled(kind, n) for n in lengths]
        loops = [trip_counts(text) for text in texts]
        size = [len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.M)) for text in texts]
        if kind == "transformer":
            holds = not any(loops) and max(size) < 1.5 * min(size)
        else:
            holds = all(each and set(each) == {n} for n, each in zip(lengths, loops, strict=True))
        number = len(loops[-1])
        text = f"{number} loops, of n rounds each" if number and holds else f"{number} loops"
        text += f"; {size[0]} instructions at n = {lengths[0]}, {size[-1]} at n = {lengths[-1]}"
        checks.append(Check(kind, text, bool(holds)))
        for n, each, instructions in zip(lengths, loops, size, strict=True):
            rounds = ", ".join(map(str, each)) or "no loop"
            rows.append((kind, str(n), rounds, str(instructions)))
        series[kind] = (lengths, [max(sum(each), 1) for each in loops])
    labels = "rounds of all loops", "n", "sequential rounds (1: no loop)"
    plots.lines([plots.Panel(*labels, series, log="xy")], setting.folder / "sequential.png")
    return Claim(
        title="Sequential operations",
        says="A recurrent layer needs as many sequential operations as there are tokens, "
        "self-attention a constant number.",
        method="The gradient of the loss on strings of n tokens, compiled: the rounds of each of "
        "its loops, as the compiler states them. True of a recurrent model if every loop runs n "
        "times; of the Transformer if there is no loop at any n, and none is unrolled: over all n "
        "the number of instructions grows by less than half.",
        checks=checks,
        tables=[markdown(("model", "n", "rounds of its loops", "instructions"), rows)],
        data={kind: rounds for kind, (_, rounds) in series.items()} | {"lengths": list(lengths)},
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
    """The time of a training gradient against the length."""
    rounds = [in_process(None, gradient_seconds, KINDS, lengths, 5) for _ in range(processes)]
    found = {each: [one[each] for one in rounds] for each in rounds[0]}
    cases = {
        f"{kind}, n = {n}": log_ratio(found[kind, n], found["transformer", n])
        for kind in KINDS[1:]
        for n in lengths
    }
    series, rows = {}, []
    for kind in KINDS:
        seconds = [found[kind, n] for n in lengths]
        series[kind] = (lengths, *band(seconds))
        fits = [slope(lengths[-4:], one) for one in zip(*seconds[-4:], strict=True)]
        rows.append((kind, shown(mean_interval(fits))))
    panel = plots.Panel(f"gradient, {ROWS} strings", "n", "seconds", series, log="xy")
    plots.lines([panel], setting.folder / "wall_time.png")
    return Claim(
        title="Time against recurrence",
        says="Recurrence is slower, since its steps follow one another.",
        method=f"The gradient of the loss on {ROWS} strings of n tokens, models of about equal "
        "parameters, all cores, in turns in each of several fresh processes. True if the "
        "Transformer is faster (t-test of the log ratios over processes, Holm). The recurrent "
        "decoder has its attention inside its loop. Bands go from the fastest process to the "
        "slowest.",
        checks=above_zero(cases, lambda each: f"the Transformer is {times(each)} as fast"),
        tables=[markdown(("model", "exponent of n in the time at the four largest n"), rows)],
        data={f"{kind}, n {n}": each for (kind, n), each in found.items()},
    )


def parallel(setting: Setting, *, length: int = 64, processes: int = 5) -> Claim:
    """The speedup of each kind from more cores."""
    # Without processor affinity there is nothing to compare.
    available = cpu_cores() if hasattr(os, "sched_setaffinity") else 0
    numbers = [each for each in (1, 2, 4, 8, 16) if each <= available]
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(processes):  # in turns: a slow phase of the machine affects all numbers
        for number in numbers:
            seconds = in_process(number, gradient_seconds, KINDS, (length,), 5)
            for kind in KINDS:
                found.setdefault((kind, number), []).append(seconds[kind, length])
    gains = {
        (kind, number): log_ratio(found[kind, 1], each) for (kind, number), each in found.items()
    }
    cases = {
        f"{number} cores, against the {kind.upper()}": [
            a - b for a, b in zip(gains["transformer", number], gains[kind, number], strict=True)
        ]
        for kind in KINDS[1:]
        for number in numbers[1:]
    }
    tables = []
    if cases:
        series = {
            kind: (numbers, *band(np.exp([gains[kind, number] for number in numbers])))
            for kind in KINDS
        }
        panel = plots.Panel(f"n = {length}", "cores", "speedup over one core", series, log="x")
        plots.lines([panel], setting.folder / "parallel.png")
        rows = [
            (kind, str(number), times(mean_interval(gains[kind, number])))
            for kind in KINDS
            for number in numbers[1:]
        ]
        tables = [markdown(("model", "cores", "as fast as on one"), rows)]
    return Claim(
        title="Gain from more cores",
        says="Recurrence leaves less to run in parallel.",
        method=f"The gradient of the loss on {ROWS} strings of {length} tokens in fresh processes "
        "with one core or several, in turns. True if the Transformer gains more from the cores "
        "(t-test of the logarithms of the two gains over processes, Holm). Bands go from the "
        "lowest gain to the highest.",
        checks=above_zero(cases, lambda each: f"its gain is {times(each)} the other's"),
        tables=tables,
        data={f"{kind}, {number} cores": each for (kind, number), each in found.items()},
    )
