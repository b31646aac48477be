"""The methods against scipy, statsmodels and a transcription of limma's formulas that shares no line with ours."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from ablab.analysis.effects.intervals import (
    Estimates,
    block_error,
    diffmax,
    moderated,
    on_shared_seeds,
    paired,
    scaled_f,
    shrink,
    trigamma_inverse,
    welch,
)


def fit_of_f(variances: list[float], degrees: float) -> tuple[float, float]:
    """limma's fitFDist without a covariate, arm by arm: (d0, s0^2)."""
    k = len(variances)
    shift = math.log(degrees / 2) - digamma(degrees / 2)
    e = [math.log(variance) + shift for variance in variances]
    mean = sum(e) / k
    squares = sum((one - mean) ** 2 for one in e)
    excess = squares / (k - 1) - trigamma(degrees / 2)
    if excess <= 0:
        return math.inf, sum(variances) / k
    half = optimize.brentq(lambda x: trigamma(x) - excess, 1e-8, 1e8, xtol=1e-12)
    return 2 * half, math.exp(mean + digamma(half) - math.log(half))


def digamma(x: float) -> float:
    return float(mpmath.psi(0, x))


def trigamma(x: float) -> float:
    return float(mpmath.psi(1, x))


VARIANCES = [
    [1.0, 2.0, 0.5, 8.0, 0.01],
    [0.9, 1.0, 1.1],
    [3.1e-6, 4.0e-5, 1.3e-7, 2.2e-6, 4.8e-6, 5.8e-5],
]


@pytest.mark.parametrize("variances", VARIANCES)
@pytest.mark.parametrize("degrees", [2.0, 4.0])
def test_the_prior_is_limmas(variances, degrees):
    expected = fit_of_f(variances, degrees)
    found = scaled_f(np.array(variances), np.full(len(variances), degrees))
    assert (float(found[0]), float(found[1])) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("variances", VARIANCES)
@pytest.mark.parametrize("n", [3, 5])
def test_a_moderated_variance_is_the_weighted_mean_of_prior_and_own(variances, n):
    k = len(variances)
    prior, common = fit_of_f(variances, n - 1.0)
    cap = (n - 1) * k / (1 + (k - 1) / 4)
    weight = min(prior, cap)
    found, degrees = shrink(np.array(variances), np.full(k, n - 1.0))
    expected = [(weight * common + (n - 1) * own) / (weight + n - 1) for own in variances]
    assert found == pytest.approx(expected, rel=1e-8)
    assert degrees == pytest.approx([min(weight + n - 1, cap)] * k)


def test_trigamma_is_inverted_over_twelve_decades():
    values = np.logspace(-6, 6, 60)
    assert special.polygamma(1, trigamma_inverse(values)) == pytest.approx(values, rel=1e-8)


def test_many_experiments_at_once_are_each_alone(normal):
    values = normal.normal(0, 1, (20, 5, 4))
    reference = normal.normal(0, 1, (20, 4))
    together = on_shared_seeds(values, reference)
    for i in range(20):
        alone = on_shared_seeds(values[i], reference[i])
        assert together.standard_error[i] == pytest.approx(alone.standard_error)
        assert together.degrees[i] == pytest.approx(alone.degrees)


def test_paired_is_scipys(normal):
    a = normal.normal(0, 1, 7)
    b = a + normal.normal(0.1, 0.2, 7)
    ours = paired((a - b)[None])
    theirs = stats.ttest_rel(a, b)
    assert ours.p[0] == pytest.approx(theirs.pvalue)
    interval = theirs.confidence_interval(0.9)
    assert ours.half_width(0.9)[0] == pytest.approx((interval.high - interval.low) / 2)


def test_welch_is_scipys_for_any_two_numbers_of_seeds(normal):
    a = normal.normal(3.2, 0.002, 5)
    b = normal.normal(3.1, 0.004, 3)
    ours = welch(a[None], b[None])
    theirs = stats.ttest_ind(a, b, equal_var=False)
    assert ours.degrees[0] == pytest.approx(theirs.df)
    assert ours.p[0] == pytest.approx(theirs.pvalue)


def test_the_block_error_is_that_of_least_squares_with_a_seed_effect(normal):
    import pandas as pd
    from statsmodels.formula.api import ols

    values = normal.normal(0, 1, (3, 4)) + normal.normal(0, 3, 4)
    table = pd.DataFrame(values).stack().rename_axis(["arm", "seed"])
    fit = ols("y ~ C(arm) + C(seed)", table.reset_index(name="y")).fit()
    assert block_error(values) == pytest.approx(fit.mse_resid)


def test_diffmax_takes_the_larger_error_and_its_degrees():
    steps = np.array([0.0, 0.1, -0.1, 0.05])
    quiet = np.stack([steps, steps, 0 * steps])
    loud = quiet.copy()
    loud[0] += [3.0, -3.0, 3.0, -3.0]
    for values in (quiet, loud):
        differences = values[:2] - values[2]
        both = diffmax(differences, values)
        own = moderated(differences).standard_error
        pooled = np.sqrt(2 * block_error(values) / 4)
        assert both.standard_error == pytest.approx(np.maximum(own, pooled))
        for i in range(2):
            degrees = 6 if pooled > own[i] else moderated(differences).degrees[i]
            assert both.degrees[i] == pytest.approx(degrees)


def test_without_any_spread_a_difference_is_certain_and_its_absence_too():
    sure = paired(np.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]))
    assert list(sure.p) == [0, 1]
    assert list(sure.p_beyond(0.25)) == [1, 0]


def test_the_two_one_sided_tests_are_scipys(normal):
    differences = normal.normal(0.1, 1, 9)
    found = paired(differences[None]).p_beyond(0.7)[0]
    above = stats.ttest_1samp(differences, -0.7, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.7, alternative="less").pvalue
    assert found == pytest.approx(max(above, below))


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 8),
    k=st.integers(1, 6),
    entropy=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-6, 0.5, 1e4]),
)
def test_what_all_cells_of_a_seed_share_does_not_count_and_units_do_not_matter(
    n, k, entropy, scale
):
    random = np.random.default_rng(entropy)
    values = random.normal(0, 1, (k, n))
    reference = random.normal(0, 1, n)
    seeds = random.normal(0, 100, n)
    one = on_shared_seeds(values, reference)
    other = on_shared_seeds(scale * (values + seeds), scale * (reference + seeds))
    assert other.method == one.method
    assert other.p == pytest.approx(one.p, rel=1e-6, abs=1e-12)
    assert other.half_width() == pytest.approx(scale * one.half_width(), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(3, 5), k=st.integers(3, 8), entropy=st.integers(0, 2**32 - 1))
def test_moderation_lies_between_an_arms_own_variance_and_the_common_one(n, k, entropy):
    random = np.random.default_rng(entropy)
    variances = random.lognormal(0, 2, k)
    degrees = np.full(k, n - 1.0)
    _, common = scaled_f(variances, degrees)
    shrunk, freedom = shrink(variances, degrees)
    low = np.minimum(variances, common) * (1 - 1e-12)
    high = np.maximum(variances, common) * (1 + 1e-12)
    assert np.all((low <= shrunk) & (shrunk <= high))
    assert np.all(freedom >= n - 1) and np.all(freedom <= (n - 1) * k)


def test_estimates_say_what_their_numbers_are():
    one = Estimates("by hand", np.array([2.266958]), np.array([1.0]), np.array([4.0]))
    # t(0.975, 4) = 2.776445
    assert one.half_width()[0] == pytest.approx(2.776445, abs=1e-6)
