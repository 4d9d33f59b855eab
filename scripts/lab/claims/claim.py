"""What a claim is, how its verdict follows from its checks, and the checks that are t-tests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.statistics import ALPHA, Interval, holm, mean_interval, p_text, paired

MOST_NAMED = 4  # exceptions that a verdict names; it counts more of them


@dataclass(frozen=True)
class Setting:
    """Where claims find runs and leave figures."""

    root: Path  # the folder of the sweeps' folders
    data_dir: str | None  # where TFDS keeps datasets; None: its default
    jobs: int  # programs of a sweep at a time
    folder: Path  # of the figures and the data; the page is beside it


@dataclass(frozen=True)
class Check:
    """A case in which a claim is tested."""

    case: str
    found: str  # the measured value with its uncertainty
    holds: bool | None  # whether the claim is true of it; None: undecided


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and its checks."""

    title: str  # of its section
    says: str  # the claim, in a sentence
    method: str  # what was measured, how, and when a check is true
    checks: Sequence[Check]
    tables: Sequence[str] = ()  # Markdown, below the checks
    data: Mapping[str, Any] = field(default_factory=dict)  # the measurements


def verdict(checks: Sequence[Check]) -> str:
    """`holds` if all checks are true, `holds with a condition` if some are.

    The exceptions are named, or counted if there are many.
    """
    cases = {
        answer: [check.case for check in checks if check.holds is answer]
        for answer in (True, False, None)
    }
    exceptions = len(checks) - len(cases[True])
    if not checks:
        return "could not be measured here"
    if not cases[True]:
        return "does not hold here"
    if not exceptions:
        return "holds"
    if exceptions > MOST_NAMED:
        return (
            f"holds with a condition: in {len(cases[True])} of {len(checks)} cases, not in "
            f"{len(cases[False])}, undecided in {len(cases[None])}"
        )
    named = {"not for": cases[False], "undecided": cases[None]}
    parts = [f"{words}: {'; '.join(each)}" for words, each in named.items() if each]
    return f"holds with a condition; {'; '.join(parts)}"


def answer(mean: float, p: float) -> bool | None:
    """Whether a mean is shown to be positive; None if neither sign is shown."""
    return mean > 0.0 if p <= ALPHA else None


def above_zero(
    cases: Mapping[str, Sequence[float]], write: Callable[[Interval], str]
) -> list[Check]:
    """A check per case that the mean of its repetitions is positive: t-tests, corrected by Holm."""
    tests = {name: paired(values, [0.0] * len(values)) for name, values in cases.items()}
    adjusted = holm([test.p for test in tests.values()])
    return [
        Check(name, f"{write(mean_interval(cases[name]))} ({p_text(p)})", answer(test.mean, p))
        for (name, test), p in zip(tests.items(), adjusted, strict=True)
    ]


def log_ratio(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """log(theirs / ours), value by value."""
    return (np.log(theirs) - np.log(ours)).tolist()


def times(interval: Interval) -> str:
    """An interval of logarithms as a ratio: `1.80 [1.50, 2.16] times`."""
    mean, low, high = np.exp([interval.mean, interval.low, interval.high])
    return f"{mean:.3g} [{low:.3g}, {high:.3g}] times"


def shown(interval: Interval, figures: str = ".2f") -> str:
    """`0.52 [0.40, 0.64]`"""
    return f"{interval.mean:{figures}} [{interval.low:{figures}}, {interval.high:{figures}}]"


def band(values: Sequence[Sequence[float]] | np.ndarray) -> tuple[np.ndarray, ...]:
    """The median, lowest and highest repetition at each point, of values [points, repetitions]."""
    values = np.asarray(values)
    return np.median(values, 1), values.min(1), values.max(1)
