"""What a claim is, checks that are t-tests, verdicts, and the page of all claims."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab import statistics
from lab.statistics import ALPHA, Difference, Interval, Values, mean_interval, paired
from lab.tables import markdown

MOST_NAMED = 4  # exceptions that a verdict names; it counts more of them
HEAD = """# The claims, checked

    python scripts/claims.py --jobs=4

Each claim is tested in several cases, in each of which it is true, false or undecided. A claim
*holds* if it is true in all cases, *holds in part* if in some, and *does not hold here* if in none.
Brackets are 95% confidence intervals (Student's t). "Smallest detectable" is the true effect that a
test which shows none would have found with power 0.8. The toy task is small: effects that it does
not show may exist elsewhere.
"""


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
    data: Mapping[str, Any]  # the measurements


def verdict(checks: Sequence[Check]) -> str:
    """`holds` if all checks are true; otherwise the exceptions are named, or counted if many."""
    true, false, undecided = (
        [check.case for check in checks if check.holds is answer] for answer in (True, False, None)
    )
    if not checks:
        return "could not be measured here"
    if not true:
        return "does not hold here"
    if len(false + undecided) > MOST_NAMED:
        counts = f"true in {len(true)} of {len(checks)} cases, false in {len(false)}"
        return f"holds in part: {counts}, undecided in {len(undecided)}"
    named = {"not for": false, "undecided": undecided}
    parts = [f"; {words}: {'; '.join(cases)}" for words, cases in named.items() if cases]
    return f"holds in part{''.join(parts)}" if parts else "holds"


def answer(test: Difference) -> bool | None:
    """Whether a mean is shown to be positive; None if neither sign is shown."""
    return test.mean > 0.0 if test.p <= ALPHA else None


def above_zero(cases: Mapping[str, Values], write: Callable[[Interval], str]) -> list[Check]:
    """A check per case that the mean of its repetitions is positive: t-tests, corrected by Holm."""
    tests = statistics.corrected([paired(each, np.zeros(len(each))) for each in cases.values()])
    return [
        Check(name, write(mean_interval(cases[name])) + shown(test, write), answer(test))
        for name, test in zip(cases, tests, strict=True)
    ]


def shown(test: Difference, write: Callable[[Interval], str]) -> str:
    """The p-value of a test in brackets, with the smallest detectable effect if it shows none."""
    p, size = statistics.p_text(test.p), test.detectable
    if answer(test) is not None or np.isnan(size):
        return f" ({p})"
    return f" ({p}; smallest detectable: {write(Interval(size, size, size, 1))})"


def log_ratio(theirs: Values, ours: Values) -> np.ndarray:
    """log(theirs / ours), value by value."""
    return np.log(theirs) - np.log(ours)


def times(interval: Interval) -> str:
    """An interval of logarithms as a ratio: `1.80 [1.50, 2.16] times`."""
    return f"{interval.text(lambda value: f'{np.exp(value):.3g}')} times"


def band(values: Sequence[Sequence[float]] | np.ndarray) -> tuple[np.ndarray, ...]:
    """The median, lowest and highest repetition at each point, of values [points, repetitions]."""
    values = np.asarray(values)
    return np.median(values, 1), values.min(1), values.max(1)


def write_page(folder: Path, names: Sequence[str]) -> Path:
    """Writes the page of the claims whose JSON is in `folder`, in the order of `names`."""
    answers = {True: "yes", False: "**no**", None: "undecided"}
    sections, rows = [], []
    for name in names:
        if not (path := folder / f"{name}.json").exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        checks = [Check(**check) for check in record["checks"]]
        title, words = record["title"], verdict(checks)
        anchor = "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")
        rows.append((f"[{title}](#{anchor})", record["says"], f"**{words}**"))
        cases = [(each.case, each.found, answers[each.holds]) for each in checks]
        picture, by = folder / f"{name}.png", record["commit"] or "unknown"
        sections += [
            f"## {title}\n\n> {record['says']}\n\n{record['method']}\n\n**{words}**\n",
            *([markdown(("case", "found", "true"), cases, align="lll")] if cases else []),
            *([f"![{title}]({folder.name}/{picture.name})\n"] if picture.exists() else []),
            f"On {record['devices']}; JAX {record['jax']}; commit {by}.\n",
        ]
    summary = markdown(("claim", "statement", "verdict"), rows, align="lll")
    path = folder.with_suffix(".md")
    path.write_text("\n".join((HEAD, summary, *sections)), encoding="utf-8")
    return path
