import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from transformer.experiments.statistics import Difference, holm, mean_interval, paired, verdict

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_that_of_scipy(n, level, rng):
    values = rng.normal(3.0, 2.0, size=n)
    interval = mean_interval(values, level)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    np.testing.assert_allclose((interval.low, interval.high), expected)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.n == n
    assert mean_interval(list(values), level) == interval


@pytest.mark.parametrize("n", [2, 5])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(n, rng):
    intervals = [mean_interval(values) for values in rng.normal(3.0, 2.0, size=(2000, n))]
    assert np.mean([one.low <= 3.0 <= one.high for one in intervals]) == pytest.approx(
        0.95, abs=0.01
    )


def test_one_value_has_no_interval():
    interval = mean_interval([0.3])
    assert (interval.mean, interval.n) == (0.3, 1)
    assert np.isnan([interval.low, interval.high]).all()


def test_equal_values_have_an_interval_of_no_width():
    interval = mean_interval([0.1, 0.1, 0.1])  # their computed spread is 1.7e-17
    assert interval.low == interval.high == interval.mean == pytest.approx(0.1)


def test_small_values_have_a_spread():
    interval, larger = mean_interval([1e-30, 2e-30]), mean_interval([1.0, 2.0])
    assert interval.high == pytest.approx(1e-30 * larger.high, abs=0.0)


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_paired_test_is_that_of_scipy(n, level, rng):
    baseline = rng.normal(size=n)
    variant = baseline + rng.normal(0.5, 0.3, size=n)
    difference = paired(variant, baseline, level)
    expected = stats.ttest_rel(variant, baseline)
    np.testing.assert_allclose(difference.p, expected.pvalue)
    bounds = (difference.low, difference.high)
    np.testing.assert_allclose(bounds, expected.confidence_interval(level))
    assert difference.mean == pytest.approx((variant - baseline).mean())
    assert difference.n == n
    assert paired(list(variant), list(baseline), level) == difference


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_smallest_detectable_difference_is_found_with_power_80_percent(n, level, rng):
    sigma = 0.3
    sample = stats.zscore(rng.normal(size=n), ddof=1) * sigma  # its spread is the true one
    detectable = paired(sample, np.zeros(n), level).detectable
    p = stats.ttest_1samp(rng.normal(detectable, sigma, size=(20_000, n)), 0.0, axis=1).pvalue
    assert np.mean(p <= 1 - level) == pytest.approx(0.8, abs=0.01)


def reports(effects, rng, seeds=10, repetitions=400):
    """p-values of `repetitions` sweeps, raw and adjusted, whose variants share a baseline."""
    raw = []
    for _ in range(repetitions):
        baseline = rng.normal(size=seeds)
        raw.append([paired(rng.normal(effect, size=seeds), baseline).p for effect in effects])
    return np.array(raw), np.array([holm(p) for p in raw])


def test_false_discoveries_are_as_rare_as_promised_only_with_the_correction(rng):
    raw, adjusted = reports([0.0] * 8, rng)
    simulation_error = 2 * (0.05 * 0.95 / len(raw)) ** 0.5
    assert (adjusted <= 0.05).any(1).mean() <= 0.05 + simulation_error
    assert (raw <= 0.05).any(1).mean() > 0.15
    assert (raw <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


def test_planted_effects_are_found_and_the_nulls_beside_them_are_not(rng):
    planted = np.array([3.0, 0.0, 0.0, -3.0, 0.0, 0.0])
    _, adjusted = reports(planted, rng, repetitions=200)
    simulation_error = 2 * (0.05 * 0.95 / len(adjusted)) ** 0.5
    assert ((adjusted <= 0.05)[:, planted != 0].mean(0) > 0.9).all()
    assert (adjusted <= 0.05)[:, planted == 0].any(1).mean() <= 0.05 + simulation_error


def test_holm_by_hand():
    # In order, 4 × 0.005, 3 × 0.01, 2 × 0.03, 1 × 0.04; the last may not be below the one before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@given(P_VALUES)
@settings(deadline=None)
def test_holm_is_the_closure_of_bonferroni(p):
    # A hypothesis falls when Bonferroni rejects each intersection of which it is a part.
    subsets = [
        s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)
    ]
    bonferroni = {s: min(1.0, len(s) * min(p[i] for i in s)) for s in subsets}
    expected = [max(bonferroni[s] for s in subsets if i in s) for i in range(len(p))]
    np.testing.assert_allclose(holm(p), expected)


@given(P_VALUES.flatmap(lambda p: st.tuples(st.just(p), st.permutations(range(len(p))))))
@settings(deadline=None)
def test_holm_raises_p_values_and_keeps_their_order_wherever_they_stand(case):
    p, order = case
    adjusted = holm(p)
    assert all(before <= after <= 1.0 for before, after in zip(p, adjusted, strict=True))
    assert (np.diff(np.array(adjusted)[np.argsort(p)]) >= 0).all()
    assert holm([p[i] for i in order]) == [adjusted[i] for i in order]


def test_nan_is_no_comparison():
    np.testing.assert_array_equal(holm([np.nan, 0.01, np.nan, 0.03]), [np.nan, 0.02, np.nan, 0.03])
    np.testing.assert_array_equal(holm([np.nan]), [np.nan])
    assert holm([]) == []


def test_seeds_that_agree():
    same = paired([0.9, 0.5, 0.7], [0.9, 0.5, 0.7])
    assert same == Difference(mean=0.0, low=0.0, high=0.0, p=1.0, n=3, detectable=0.0)
    shifted = paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])  # three differences, but for rounding
    assert shifted.low == shifted.high == shifted.mean == pytest.approx(0.1)
    assert (shifted.p, shifted.n, shifted.detectable) == (0.0, 3, 0.0)


def test_rounding_is_no_difference():
    assert paired([0.3, 0.3], [0.1 + 0.2, 0.3]) == Difference(0.0, 0.0, 0.0, 1.0, 2, 0.0)


def test_one_pair_has_a_mean_only():
    difference = paired([0.75], [0.5])
    assert (difference.mean, difference.n) == (0.25, 1)
    rest = (difference.low, difference.high, difference.p, difference.detectable)
    assert np.isnan(rest).all()


@pytest.mark.parametrize("diverged", [np.nan, np.inf, -np.inf])
def test_a_diverged_seed_makes_everything_nan(diverged):
    interval = mean_interval([1.0, diverged, np.inf])
    assert np.isnan([interval.mean, interval.low, interval.high]).all()
    one = paired([1.0, diverged, 2.0], [1.0, np.inf, 3.0])
    assert np.isnan([one.mean, one.low, one.high, one.p, one.detectable]).all()
    assert verdict(one, one.p, unit=str, better="lower") == "a seed is not finite: no verdict"


def test_what_is_not_one_value_for_each_seed_is_refused():
    with pytest.raises(ValueError, match="3 values cannot be paired with 1"):
        paired([1.0, 2.0, 3.0], [1.0])
    with pytest.raises(ValueError, match="one value for each seed"):
        mean_interval([])
    with pytest.raises(ValueError, match="one value for each seed"):
        mean_interval(np.ones((2, 2)))


def points(magnitude: float) -> str:
    assert magnitude >= 0.0
    return f"{100 * magnitude:.1f} points"


@pytest.mark.parametrize(
    ("mean", "p", "better", "words"),
    [
        (0.012, 0.003, "higher", "better by 1.2 points (p = 0.003)"),
        (0.012, 0.003, "lower", "worse by 1.2 points (p = 0.003)"),
        (-0.012, 0.003, "higher", "worse by 1.2 points (p = 0.003)"),
        (-0.012, 0.003, "lower", "better by 1.2 points (p = 0.003)"),
        (0.012, 0.00099, "higher", "better by 1.2 points (p < 0.001)"),
        (0.012, 0.0, "higher", "better by 1.2 points (p < 0.001)"),
        (0.012, 0.001, "higher", "better by 1.2 points (p = 0.001)"),
        (0.012, 0.05, "higher", "better by 1.2 points (p = 0.050)"),
        (
            -0.012,
            0.051,
            "higher",
            "no evidence of a difference at 10 seeds; smallest detectable: 0.8 points",
        ),
    ],
)
def test_verdicts(mean, p, better, words):
    difference = Difference(mean, mean - 0.01, mean + 0.01, p=1e-6, n=10, detectable=0.008)
    assert verdict(difference, p, unit=points, better=better) == words


def test_the_verdict_follows_alpha():
    difference = Difference(0.012, 0.002, 0.022, p=0.03, n=10, detectable=0.008)
    words = verdict(difference, 0.03, unit=points, better="higher", alpha=0.01)
    assert words.startswith("no evidence")


def test_verdicts_on_seeds_that_cannot_tell():
    one, same = paired([0.5], [0.5]), paired([0.5] * 5, [0.5] * 5)
    assert verdict(one, one.p, unit=points, better="higher") == "one seed: no verdict"
    assert verdict(same, same.p, unit=points, better="higher") == "identical on all 5 seeds"
