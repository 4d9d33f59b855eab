import itertools

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.statistics import Difference, holm, mean_interval, paired, verdict


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_and_the_paired_test_are_those_of_scipy(n, level, rng):
    baseline = rng.normal(3.0, 2.0, size=n)
    variant = baseline + rng.normal(0.5, 0.3, size=n)
    interval, difference = mean_interval(variant, level), paired(variant, baseline, level)
    alone, both = scipy.stats.ttest_1samp(variant, 0.0), scipy.stats.ttest_rel(variant, baseline)
    samples = (variant, variant - baseline)
    for found, sample, expected in zip((interval, difference), samples, (alone, both), strict=True):
        bounds = expected.confidence_interval(level)
        np.testing.assert_allclose((found.low, found.high), bounds)
        assert (found.mean, found.n) == (pytest.approx(sample.mean()), n)
    np.testing.assert_allclose(difference.p, both.pvalue)
    assert mean_interval(list(variant), level) == interval
    assert paired(list(variant), list(baseline), level) == difference


def test_one_value_has_no_interval_and_equal_ones_have_one_of_no_width():
    interval, difference = mean_interval([0.3]), paired([0.75], [0.5])
    assert (interval.mean, interval.n, difference.mean, difference.n) == (0.3, 1, 0.25, 1)
    assert np.isnan([interval.low, interval.high, difference.low, difference.high]).all()
    assert np.isnan([difference.p, difference.detectable]).all()
    with pytest.raises(ValueError, match="3 values cannot be paired with 1"):
        paired([1.0, 2.0, 3.0], [1.0])
    with pytest.raises(ValueError, match="one value per seed"):
        mean_interval(np.ones((2, 2)))
    equal = mean_interval([0.1, 0.1, 0.1])  # their computed spread is 1.7e-17
    assert equal.low == equal.high == equal.mean == pytest.approx(0.1)
    small, larger = mean_interval([1e-30, 2e-30]), mean_interval([1.0, 2.0])
    assert small.high == pytest.approx(1e-30 * larger.high, abs=0.0)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_smallest_detectable_difference_is_found_with_power_80_percent(n, level, rng):
    sigma = 0.3
    sample = scipy.stats.zscore(rng.normal(size=n), ddof=1) * sigma  # its spread is the true one
    detectable = paired(sample, np.zeros(n), level).detectable
    p = scipy.stats.ttest_1samp(rng.normal(detectable, sigma, size=(20_000, n)), 0.0, axis=1).pvalue
    assert np.mean(p <= 1 - level) == pytest.approx(0.8, abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(deadline=None)
def test_holm_is_the_closure_of_bonferroni(p):
    # A hypothesis falls when Bonferroni rejects each intersection of which it is a part.
    every, sizes = range(len(p)), range(1, len(p) + 1)
    subsets = [s for size in sizes for s in itertools.combinations(every, size)]
    bonferroni = {s: min(1.0, len(s) * min(p[i] for i in s)) for s in subsets}
    expected = [max(bonferroni[s] for s in subsets if i in s) for i in every]
    np.testing.assert_allclose(holm(p), expected)
    np.testing.assert_array_equal(holm([np.nan, *p]), [np.nan, *holm(p)])  # no comparison


def test_seeds_that_agree_but_for_rounding():
    same = Difference(mean=0.0, low=0.0, high=0.0, p=1.0, n=3, detectable=0.0)
    assert paired([0.9, 0.5, 0.7], [0.9, 0.5, 0.7]) == same
    assert paired([0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3]) == same
    shifted = paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])  # three differences, but for rounding
    assert shifted.low == shifted.high == shifted.mean == pytest.approx(0.1)
    assert (shifted.p, shifted.n, shifted.detectable) == (0.0, 3, 0.0)


@pytest.mark.parametrize("diverged", [np.nan, np.inf, -np.inf])
def test_a_diverged_seed_makes_everything_nan(diverged):
    interval = mean_interval([1.0, diverged, np.inf])
    assert np.isnan([interval.mean, interval.low, interval.high]).all()
    one = paired([1.0, diverged, 2.0], [1.0, np.inf, 3.0])
    assert np.isnan([one.mean, one.low, one.high, one.p, one.detectable]).all()
    assert verdict(one, str, higher_is_better=False) == "a seed is not finite: no verdict"


def points(magnitude: float) -> str:
    assert magnitude >= 0.0
    return f"{100 * magnitude:.1f} points"


@pytest.mark.parametrize(
    ("mean", "p", "higher_is_better", "words"),
    [
        (0.012, 0.003, True, "better by 1.2 points (p = 0.003)"),
        (0.012, 0.003, False, "worse by 1.2 points (p = 0.003)"),
        (-0.012, 0.00099, True, "worse by 1.2 points (p < 0.001)"),
        (-0.012, 0.05, False, "better by 1.2 points (p = 0.050)"),
        (-0.012, 0.051, True, "no evidence of a difference at 10 seeds; smallest detectable: 0.8"),
    ],
)
def test_verdicts(mean, p, higher_is_better, words):
    difference = Difference(mean, mean - 0.01, mean + 0.01, p=p, n=10, detectable=0.008)
    assert verdict(difference, points, higher_is_better).startswith(words)
    one, same = paired([0.5], [0.5]), paired([0.5] * 5, [0.5] * 5)
    assert verdict(one, points, True) == "one seed: no verdict"
    assert verdict(same, points, True) == "identical on all 5 seeds"
