"""Statistics over seeds: confidence intervals, paired tests, Holm's correction, verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import scipy

Values = Sequence[float] | np.ndarray

ALPHA = 0.05  # the largest adjusted p-value that counts as evidence
LEVEL = 1.0 - ALPHA
POWER = 0.8  # with which an effect of `Difference.detectable` is found
ROUNDING = 4 * np.finfo(np.float64).eps  # of a difference, relative to its terms; generous


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, write: Callable[[float], str] = "{:.2f}".format) -> str:
        """`0.52 [0.40, 0.64]`; of a single seed the value alone."""
        mean, low, high = map(write, (self.mean, self.low, self.high))
        return mean if self.n == 1 else f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Difference(Interval):
    """Variant minus baseline over `n` paired seeds."""

    p: float  # of the two-sided paired t-test of "the mean difference is zero"
    detectable: float  # the smallest true difference that this test finds with power 0.8


def mean_interval(values: Values, level: float = LEVEL) -> Interval:
    """Student's t interval of the mean, mean ± t(n-1) · s / √n, of one value per seed.

    The bounds are NaN for a single value; a value that is not finite makes everything NaN.
    """
    sample = _as_sample(values)
    mean, error = _mean_and_error(sample, scale=np.abs(sample).max())
    margin = critical(sample.size, level) * error
    return Interval(mean, mean - margin, mean + margin, sample.size)


def paired(variant: Values, baseline: Values, level: float = LEVEL) -> Difference:
    """The paired t-test of variant against baseline, whose values belong to the same seeds.

    `detectable` is λ · s / √n with λ from `noncentrality`, as if the spread s of the differences
    were the true one. Of a single pair everything but the mean is NaN; a value that is not finite
    makes everything NaN. Differences that are all zero have p = 1, other equal ones p = 0.
    """
    ours, theirs = _as_sample(variant), _as_sample(baseline)
    if ours.size != theirs.size:
        raise ValueError(f"{ours.size} values cannot be paired with {theirs.size}")
    mean, error = _mean_and_error(ours - theirs, scale=np.abs([ours, theirs]).max())
    return t_test(mean, error, ours.size, level)


def t_test(mean: float, error: float, n: int, level: float = LEVEL) -> Difference:
    """The two-sided t-test of a mean difference with a standard error from `n` pairs."""
    margin = critical(n, level) * error
    p = float(2.0 * scipy.stats.t.sf(abs(mean) / error, n - 1) if error else mean == 0.0)
    return Difference(mean, mean - margin, mean + margin, n, p, noncentrality(n, level) * error)


def holm(p_values: Values) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    p̃(i) = max over j ≤ i of min(1, (m - j + 1) · p(j)), p(1) ≤ … ≤ p(m): p̃ ≤ α bounds the chance
    of any false rejection by α, however the tests depend on each other. NaN is not counted in m.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    factors = np.arange(order.size, 0, -1)
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return adjusted.tolist()


def corrected(tests: Sequence[Difference]) -> list[Difference]:
    """The tests of one table with Holm's p, and `detectable` at the strictest of his steps.

    That is α / m, below which the smallest of the m p-values has to be.
    """
    adjusted, found = holm([test.p for test in tests]), []
    strict = 1.0 - ALPHA / max(np.count_nonzero(~np.isnan(adjusted)), 1)
    for test, p in zip(tests, adjusted, strict=True):
        ratio = noncentrality(test.n, strict) / noncentrality(test.n, LEVEL)
        found.append(replace(test, p=p, detectable=test.detectable * ratio))
    return found


def verdict(difference: Difference, unit: Callable[[float], str], higher_is_better: bool) -> str:
    """A sentence on a difference with an adjusted p; `unit` formats a magnitude: `1.2 points`."""
    if difference.n == 1:
        return "one seed: no verdict"
    if np.isnan(difference.mean):
        return "a seed is not finite: no verdict"
    if difference.mean == difference.detectable == 0.0:
        return f"identical on all {difference.n} seeds"
    if difference.p <= ALPHA:
        word = "better" if (difference.mean > 0.0) == higher_is_better else "worse"
        return f"{word} by {unit(abs(difference.mean))} ({p_text(difference.p)})"
    smallest = f"smallest detectable: {unit(difference.detectable)}"
    return f"no evidence of a difference at {difference.n} seeds; {smallest}"


def p_text(p: float) -> str:
    """`p = 0.012` or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _as_sample(values: Values) -> np.ndarray:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"expected one value per seed, not an array of shape {sample.shape}")
    return np.where(np.isfinite(sample), sample, np.nan)


def _mean_and_error(sample: np.ndarray, scale: float) -> tuple[float, float]:
    """The mean and its standard error s / √n, which is NaN for a single value.

    What is within the rounding of numbers as large as `scale` counts as zero: 0.9 - 0.8 and
    0.8 - 0.7 are the same difference.
    """
    mean = float(sample.mean())
    if sample.size == 1:
        return mean, np.nan
    spread = float(sample.std(ddof=1))
    if spread <= ROUNDING * scale:
        return 0.0 if abs(mean) <= ROUNDING * scale else mean, 0.0
    return mean, spread / sample.size**0.5


@cache
def critical(n: int, level: float) -> float:
    """The t that |t| of `n` values exceeds with probability 1 - level."""
    return float(scipy.stats.t.isf((1.0 - level) / 2.0, n - 1))


@cache
def noncentrality(n: int, level: float) -> float:
    """The δ · √n / σ at which the two-sided t-test at α = 1 - level finds δ with power 0.8.

    Only rejections towards the side of δ count. The others are rarer than 1 in 10⁶ at
    level 0.95, and SciPy's value for them is often NaN.
    """
    if n == 1:
        return np.nan
    threshold = critical(n, level)
    # At the upper end it takes s > 2σ, or a mean 3 standard errors low, to miss: power > 0.95.
    return scipy.optimize.root_scalar(
        lambda shift: float(scipy.stats.nct.sf(threshold, n - 1, shift)) - POWER,
        bracket=(0.0, 2.0 * threshold + 3.0),
    ).root
