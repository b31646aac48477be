import math

import numpy as np
import pytest
from scipy import integrate, stats

from ablab.analysis.effects.intervals import on_shared_seeds
from ablab.analysis.effects.looks import LOOKS, alpha_at, nominal_alphas, spent
from ablab.analysis.effects.multiplicity import holm
from ablab.analysis.effects.power import (
    beyond,
    power,
    seeds_needed,
    smallest_effect,
    spread_of,
)


@pytest.mark.parametrize("degrees", [2, 4, 6.15, 7, 20, 99])
@pytest.mark.parametrize("critical", [2.0, 3.5, 6.0])
def test_the_chance_is_that_of_scipys_noncentral_t_where_that_answers(degrees, critical):
    answered = 0
    for distance in (0.0, 0.5, 1, 2, 3.5, 5, 8, 12, 20, 40):
        theirs = stats.nct.sf(critical, degrees, distance)
        theirs += stats.nct.cdf(-critical, degrees, distance)
        ours = beyond(critical, degrees, distance)
        assert 0 <= ours <= 1 + 1e-12
        if math.isfinite(theirs):
            assert ours == pytest.approx(theirs, abs=1e-4)
            answered += 1
    assert answered >= 5


@pytest.mark.parametrize(("critical", "degrees", "distance"), [(14.1, 2, 8), (2.36, 7, 20)])
def test_where_scipy_may_answer_nan_an_integral_by_another_rule_agrees(
    critical, degrees, distance
):
    def density(u):
        scaled = stats.chi2.pdf(degrees * u**2, degrees) * 2 * degrees * u
        return scaled * stats.norm.sf(critical * u - distance)

    expected, _ = integrate.quad(density, 0, 10)
    assert beyond(critical, degrees, distance) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("n", "arms", "correlation"),
    [(3, 10, 0.0), (3, 10, 0.8), (5, 10, 0.0), (8, 10, 0.0), (8, 1, 0.8)],
)
def test_power_is_what_simulated_experiments_show(n, arms, correlation):
    """One live arm of 2 sd among dead ones.  Within 1.6 points and the error of 4,000 experiments, 0.8 each way."""
    random = np.random.default_rng(7)
    experiments = 4000
    seeds = np.sqrt(correlation) * random.normal(0, 1, (experiments, 1, n))
    own = np.sqrt(1 - correlation) * random.normal(0, 1, (experiments, arms + 1, n))
    values = seeds + own
    values[:, 1] += 2
    found = on_shared_seeds(values[:, 1:], values[:, 0])
    shown = np.mean(holm(found.p)[:, 0] < 0.05)
    expected = power(2, spread_of(1, correlation), n, arms)
    assert shown == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(("n", "arms"), [(3, 1), (3, 10), (5, 10), (8, 10), (20, 3)])
def test_the_smallest_effect_has_the_power_that_was_asked_for(n, arms):
    effect = smallest_effect(0.003, n, arms)
    assert power(effect, 0.003, n, arms) == pytest.approx(0.8, abs=1e-9)
    assert power(0.99 * effect, 0.003, n, arms) < 0.8


@pytest.mark.parametrize("effect", [0.5, 1.0, 3.0])
def test_the_seeds_needed_are_the_fewest(effect):
    n = seeds_needed(effect, 1.0, 4)
    assert power(effect, 1.0, n, 4) >= 0.8
    assert all(power(effect, 1.0, fewer, 4) < 0.8 for fewer in range(1, n))


def test_what_has_no_answer_says_so():
    assert power(1.0, 1.0, 2) == 0
    assert smallest_effect(1.0, 2) == math.inf
    assert seeds_needed(1e-6, 1.0) is None
    assert power(0.1, 0.0, 3) == 1
    assert power(0.0, 0.0, 3) == 0
    assert smallest_effect(0.0, 3) == 0


def test_correlated_arms_need_fewer_seeds():
    assert spread_of(1, 0) == pytest.approx(math.sqrt(2))
    assert spread_of(1, 0.5) == pytest.approx(1)
    assert seeds_needed(1, spread_of(1, 0.8), 10) < seeds_needed(1, spread_of(1, 0), 10) / 3


# Looks.


def test_three_looks_spend_what_obrien_and_fleming_would():
    """0.0014, 0.0126, 0.0449; rounded and simulated they are known as .00135, .0124, .0453."""
    assert nominal_alphas(LOOKS) == pytest.approx((0.00135, 0.0124, 0.0453), rel=0.025)
    assert nominal_alphas((5,)) == pytest.approx((0.05,))


def test_a_walk_passes_the_boundaries_as_often_as_it_may():
    random = np.random.default_rng(3)
    walks = 400_000
    steps = random.normal(0, 1, (walks, 8)).cumsum(1)
    looks = (3, 5, 8)
    passed = np.zeros(walks, bool)
    for seeds, alpha in zip(looks, nominal_alphas(looks), strict=True):
        z = np.abs(steps[:, seeds - 1]) / np.sqrt(seeds)
        passed |= z > stats.norm.isf(alpha / 2)
        expected = spent(np.array(seeds / 8))
        assert passed.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected / walks))


def test_between_looks_counts_the_last_one_that_was_reached():
    early, middle, last = nominal_alphas()
    expected = {2: 0, 3: early, 4: early, 5: middle, 7: middle, 8: last, 9: last}
    for seeds, alpha in expected.items():
        assert alpha_at(seeds) == alpha
