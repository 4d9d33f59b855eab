"""From measured ratios and races to checks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from lab.claims.page import Check
from lab.sweeps.report import Record
from lab.sweeps.statistics import (
    Difference,
    Interval,
    critical,
    holm,
    mean_interval,
    paired,
)

ALPHA = 0.05
CHOOSING = 3  # seeds on which a learning rate is chosen; the others put it to the test


def answer(mean: float, p: float) -> bool | None:
    """Whether a positive mean is shown: yes, the contrary is, or neither."""
    if not p <= ALPHA:
        return None
    return mean > 0.0


def above_zero(
    cases: Mapping[str, Sequence[float]], write: Callable[[Interval], str]
) -> list[Check]:
    """A check for each case: the mean of its values is above 0, by t-tests after Holm.

    Args:
      cases: name → a value for each independent repetition.
      write: what was found, as text, of the mean and its interval.
    """
    tests = {name: paired(values, [0.0] * len(values)) for name, values in cases.items()}
    p = holm([test.p for test in tests.values()])
    return [
        Check(
            name, f"{write(mean_interval(cases[name]))} ({p_text(each)})", answer(test.mean, each)
        )
        for (name, test), each in zip(tests.items(), p, strict=True)
    ]


def times(interval: Interval | Difference) -> str:
    """An interval of logs as a ratio: `1.80 [1.50, 2.16] times`."""
    mean, low, high = np.exp([interval.mean, interval.low, interval.high])
    return f"{mean:.3g} [{low:.3g}, {high:.3g}] times"


def p_text(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def shown(interval: Interval | Difference, figures: str = ".2f") -> str:
    """`0.52 [0.40, 0.64]`"""
    return f"{interval.mean:{figures}} [{interval.low:{figures}}, {interval.high:{figures}}]"


def arrival(record: Record, target: float) -> float | None:
    """The step at which the learning curve crosses the target, between evaluations; or None."""
    before = (0, 0.0)
    for step, accuracy in record.curve:
        if accuracy >= target:
            share = (target - before[1]) / (accuracy - before[1])
            return before[0] + share * (step - before[0])
        before = (step, accuracy)
    return None


@dataclass(frozen=True)
class Best:
    """A kind at the learning rate at which it gets to the target soonest.

    variant: of the sweep.
    rate: the learning rate.
    at_end: whether it is the first or the last of those that were tried.
    records: the seeds that it was not chosen on.
    arrivals: the step at which each of them reaches the target; None: it does not.
    last: the last step of the runs.
    """

    variant: str
    rate: float
    at_end: bool
    records: Sequence[Record]
    arrivals: Sequence[float | None]
    last: int

    def arrived(self) -> list[float]:
        """The arrivals of those that arrive."""
        return [step for step in self.arrivals if step is not None]

    def text(self) -> str:
        """The mean of the arrivals, with its interval, and how many do where not all."""
        steps, number = self.arrived(), len(self.arrivals)
        if not steps:
            return f"none of {number} seeds"
        text = shown(mean_interval(steps), ".0f") if len(steps) > 1 else f"{steps[0]:.0f}"
        return text if len(steps) == number else f"{text} ({len(steps)} of {number} seeds)"


def bests(found: Mapping[str, Sequence[Record]], target: float) -> dict[str, Best]:
    """Each kind of a sweep whose variants are called `kind, rate`, at its own best rate.

    On the first `CHOOSING` seeds: the rate at which most of them arrive; among those the one
    that takes the fewest steps, or, where none arrives, the most accurate one.
    """

    def order(variant: str) -> tuple[Any, ...]:
        records = found[variant][:CHOOSING]
        steps = [step for each in records if (step := arrival(each, target)) is not None]
        accuracy = float(np.mean([each.accuracy for each in records]))
        return (-len(steps), float(np.mean(steps)) if steps else 0.0, -accuracy)

    best = {}
    for kind, variants in by_kind(found).items():
        variant = min(variants, key=order)
        rates = list(variants.values())
        records = found[variant][CHOOSING:]
        best[kind] = Best(
            variant=variant,
            rate=variants[variant],
            at_end=len(rates) > 1 and variants[variant] in (min(rates), max(rates)),
            records=records,
            arrivals=[arrival(each, target) for each in records],
            last=records[0].curve[-1][0],
        )
    return best


def by_kind(variants: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Kind → variant → learning rate."""
    kinds: dict[str, dict[str, float]] = {}
    for variant in variants:
        kind, _, rate = variant.rpartition(", ")
        kinds.setdefault(kind, {})[variant] = float(rate)
    return kinds


@dataclass(frozen=True)
class Race:
    """One kind against another to the target.

    case: of the checks.
    ours, theirs: at their best.
    step_times: log(their seconds a step / ours), a value for each process that timed them.
    """

    case: str
    ours: Best
    theirs: Best
    step_times: Sequence[float]


def judge(races: Sequence[Race]) -> list[Check]:
    """Ours gets there sooner, in steps and in seconds, corrected by Holm for all of them.

    The test is of log(their steps / ours), seed by seed; for seconds the log ratio of the times
    of a step is added, with its own error. A seed of theirs that does not arrive counts
    with the last step of its run, which is less than it would need. Who does not arrive on
    every seed is not shown to be sooner. Where the loser's learning rate is at the end of those
    that were tried, another might have served it better, and nothing is decided.
    """
    tests = [test for race in races for test in (in_steps(race), in_seconds(race))]
    p = iter(holm([each.p for each in tests]))
    checks = []
    for race, steps, seconds in zip(races, tests[::2], tests[1::2], strict=True):
        for unit, test in (("steps", steps), ("seconds", seconds)):
            each = next(p)
            holds = answer(test.mean, each)
            winner, loser = (race.ours, race.theirs) if holds else (race.theirs, race.ours)
            if len(winner.arrived()) < len(winner.arrivals):
                holds = None
            text = f"the other takes {times(test)} as {'many' if unit == 'steps' else 'long'}"
            text += f" ({p_text(each)})"
            if unit == "steps":
                text = f"{race.ours.text()} against {race.theirs.text()}; {text}"
            if holds is not None and loser.at_end:
                text += f"; but {loser.rate:g} is the last learning rate that was tried"
                holds = None
            checks.append(Check(f"{race.case}, {unit}", text, holds))
    return checks


def in_steps(race: Race) -> Difference:
    """Of log(their steps / ours) over seeds."""
    ours, theirs = (
        [np.log(each.last if step is None else step) for step in each.arrivals]
        for each in (race.ours, race.theirs)
    )
    return paired(theirs, ours)


def in_seconds(race: Race) -> Difference:
    """The same of seconds: the means add, and so do the variances of their errors."""
    steps, step = in_steps(race), mean_interval(race.step_times)
    errors = [
        (each.high - each.mean) / critical(each.n, 0.95) if each.n > 1 else 0.0
        for each in (steps, step)
    ]
    mean, error, n = steps.mean + step.mean, math.hypot(*errors), steps.n
    p = float(2.0 * scipy.stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0.0)
    margin = critical(n, 0.95) * error
    return Difference(mean, mean - margin, mean + margin, p, n, np.nan)


def rates_table(
    found: Mapping[str, Sequence[Record]], target: float
) -> list[tuple[str, str, str, str]]:
    """Rows (variant, seeds that arrive, steps, remark) of every rate that was tried."""
    best = {each.variant for each in bests(found, target).values()}
    rows = []
    for variant, each in found.items():
        steps = [step for one in each if (step := arrival(one, target)) is not None]
        mean = f"{np.mean(steps):,.0f}" if steps else ""
        rows.append((variant, f"{len(steps)}/{len(each)}", mean, "best" * (variant in best)))
    return rows
