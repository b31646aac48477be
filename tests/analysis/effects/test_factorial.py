"""Main effects and interactions against statsmodels, and against the truth of planted factors."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols

from ablab.analysis.effects.factorial import factorial_effects
from ablab.core.store.planned import Factors

NAMES = ["a", "b", "c", "d"]
PLANTED = {"a": -0.02, "b": +0.01, "a x b": -0.01}  # 2 b of each term


def factors_of(rows, names=NAMES, aliases=()) -> Factors:
    levels = {
        "+ "
        + ", ".join(name for name, level in zip(names, row, strict=True) if level > 0): dict(
            zip(names, row, strict=True)
        )
        for row in rows
    }
    pairs = [] if aliases else [list(pair) for pair in combinations(names, 2)]
    words = {name: ["off", "on"] for name in names}
    return Factors(words, levels, pairs, list(aliases))


def runs_of(
    factors: Factors, random, seeds: int, noise: float = 0.001, lost=()
) -> pd.DataFrame:
    """seeds runs a cell.  lost: (cell's place, seed) that diverged."""
    blocks = random.normal(0, 0.05, seeds)
    rows = []
    for at, (cell, level) in enumerate(factors.levels.items()):
        truth = 0.0
        for term, size in PLANTED.items():
            truth += size / 2 * np.prod([level[name] for name in term.split(" x ")])
        for seed in range(seeds):
            row = dict(level) | {"cell": cell, "seed": seed, "run": f"{at}/{seed}"}
            row["status"] = "diverged" if (at, seed) in lost else "finished"
            row["y"] = 3 + truth + blocks[seed] + random.normal(0, noise)
            rows.append(row)
    return pd.DataFrame(rows)


FULL = list(product((-1, 1), repeat=4))
HALF = [row for row in FULL if np.prod(row) == 1]  # d = a b c


@pytest.mark.parametrize("lost", [(), {(2, 0), (5, 1), (11, 0)}])
def test_effects_are_those_of_statsmodels_with_a_seed_block(normal, lost):
    factors = factors_of(FULL)
    runs = runs_of(factors, normal, 2, lost=lost)
    found = factorial_effects(runs, "y", factors)
    done = runs[runs.status == "finished"]
    fit = ols("y ~ C(seed) + (a + b + c + d) ** 2", done).fit()
    assert [effect.term for effect in found][:5] == [*NAMES, "a x b"]
    for effect in found:
        name = effect.term.replace(" x ", ":")
        assert effect.delta == pytest.approx(2 * fit.params[name])
        assert effect.interval.p == pytest.approx(fit.pvalues[name])
        assert (effect.low, effect.high) == pytest.approx(tuple(2 * fit.conf_int().loc[name]))


def test_planted_effects_and_an_interaction_are_found_and_nothing_else(normal):
    factors = factors_of(FULL)
    found = {
        effect.term: effect
        for effect in factorial_effects(
            runs_of(factors, normal, 2), "y", factors, equivalence=0.005
        )
    }
    verdicts = {term: effect.verdict for term, effect in found.items()}
    assert verdicts.pop("a") == "helps"
    assert verdicts.pop("b") == "hurts"
    assert verdicts.pop("a x b") == "helps"
    assert set(verdicts.values()) == {"equivalent"}
    assert found["a"].sentence.startswith("a helps: on against off -0.0")
    assert found["a x b"].sentence.startswith("a and b do more together: -0.0")


def test_for_a_metric_that_should_rise_the_words_turn(normal):
    factors = factors_of(FULL)
    found = factorial_effects(runs_of(factors, normal, 2), "y", factors, better="higher")
    assert [effect.verdict for effect in found][:2] == ["hurts", "helps"]


def test_a_fraction_names_what_cannot_be_told_from_an_effect(normal):
    aliases = ["a x b = c x d", "a x c = - b x d"]
    factors = Factors(
        {name: ["off", "on"] for name in NAMES},
        factors_of(HALF).levels,
        [["a", "b"]],
        aliases,
    )
    found = {
        effect.term: effect
        for effect in factorial_effects(runs_of(factors, normal, 3), "y", factors)
    }
    assert found["a"].aliases == ()
    assert found["a x b"].aliases == ("c x d",)
    assert found["a"].verdict == "helps"


def test_the_sign_of_an_alias_is_told_from_either_side():
    from ablab.analysis.effects.factorial import _aliases

    assert _aliases("c", ["a x b = - c = d"]) == ("- a x b", "- d")
    assert _aliases("a x b", ["a x b = - c = d"]) == ("- c", "d")
    assert _aliases("e", ["a x b = - c = d"]) == ()


def test_what_the_finished_runs_cannot_tell_has_no_number(normal):
    factors = factors_of(FULL)
    runs = runs_of(factors, normal, 2)
    without_d = runs[[factors.levels[cell]["d"] < 0 for cell in runs.cell]]
    found = {effect.term: effect for effect in factorial_effects(without_d, "y", factors)}
    assert found["a"].delta is None  # a and a x d stand in the same columns
    assert found["a"].verdict == "too few seeds"
    nothing = factorial_effects(runs[:0], "y", factors)
    assert {effect.delta for effect in nothing} == {None}


def test_intervals_cover_the_truth_and_families_err_as_often_as_they_say():
    """Half of 2^5 at resolution V, two seeds: 32 runs.  Bounds: three errors of 200 experiments."""
    names = [*NAMES, "e"]
    rows = [row for row in product((-1, 1), repeat=5) if np.prod(row) == 1]
    factors = factors_of(rows, names)
    random = np.random.default_rng(11)
    covered, false, halves = [], [], []
    runs = runs_of(factors, random, 2)
    for _ in range(200):
        runs["y"] = random.normal(0, 1, len(runs)) + np.array([0.0, 3.0])[runs.seed]
        found = factorial_effects(runs, "y", factors)
        covered += [effect.low <= 0 <= effect.high for effect in found]
        false.append(any(effect.p_adjusted < 0.05 for effect in found))
        halves += [(effect.high - effect.low) / 2 for effect in found]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
    assert np.mean(false) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert np.mean(halves) == pytest.approx(0.74, abs=0.02)
