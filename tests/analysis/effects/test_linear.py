from itertools import combinations

import numpy as np
import pytest
import statsmodels.api as sm

from ablab.analysis.effects.linear import Linear, TwoWay


def test_a_contrast_is_that_of_statsmodels(normal):
    design = np.column_stack([np.ones(12), normal.normal(0, 1, (12, 3))])
    y = normal.normal(0, 1, 12)
    theirs = sm.OLS(y, design).fit()
    contrasts = np.array([[0.0, 1, 0, 0], [0, 1, -1, 0]])
    ours = Linear(design, y, "ols").estimate(contrasts)
    expected = theirs.t_test(contrasts)
    assert ours.delta == pytest.approx(expected.effect)
    assert ours.standard_error == pytest.approx(expected.sd)
    assert ours.p == pytest.approx(expected.pvalue)
    assert ours.degrees[0] == theirs.df_resid


def test_columns_that_say_the_same_are_told_apart_from_what_they_tell():
    arms = np.repeat(np.eye(2), 3, 0)
    seeds = np.tile(np.eye(3), (2, 1))
    model = Linear(np.hstack([arms, seeds]), np.arange(6.0), "ols")
    assert model.degrees == 2  # 6 runs, 2 arms, 3 seeds, one of them told by the rest
    assert model.tells(np.array([1.0, -1, 0, 0, 0]))
    assert not model.tells(np.array([1.0, 0, 0, 0, 0]))  # an arm without a reference


def test_a_model_that_leaves_no_run_for_the_noise_tells_nothing():
    model = Linear(np.eye(3), np.arange(3.0), "ols")
    assert not model.tells(np.array([1.0, -1, 0]))


def two_way(arms, seeds, y):
    of_arms = np.eye(arms.max() + 1)[arms]
    of_seeds = np.eye(seeds.max() + 1)[seeds]
    design = np.hstack([of_arms, of_seeds])
    return TwoWay(arms, seeds, y, "ols"), Linear(design, y, "ols")


@pytest.mark.parametrize("lost", [0.0, 0.2, 0.5])
def test_arms_and_blocks_are_told_as_by_a_column_for_each(normal, lost):
    arms, seeds = np.divmod(np.arange(6 * 4), 4)
    kept = (normal.random(24) >= lost) | (seeds == arms % 4)  # each arm and seed has a run
    arms, seeds = arms[kept], seeds[kept]
    ours, theirs = two_way(arms, seeds, normal.normal(3, 1, len(arms)))
    assert ours.degrees == theirs.degrees
    for arm, other in combinations(range(6), 2):
        contrast = np.zeros(theirs.design.shape[1])
        contrast[[arm, other]] = 1, -1
        assert ours.tells(arm, other) == theirs.tells(contrast)
        if not ours.tells(arm, other):
            continue
        told = ours.difference(arm, other)
        expected = theirs.estimate(contrast[None])
        assert told.delta == pytest.approx(expected.delta)
        assert told.standard_error == pytest.approx(expected.standard_error)
        assert told.p == pytest.approx(expected.p)


def test_arms_that_no_chain_of_seeds_joins_are_not_told_apart():
    arms = np.repeat(np.arange(4), 3)
    of_two_arms = np.tile(np.arange(3), 2)
    seeds = np.concatenate([of_two_arms, of_two_arms + 3])
    model, _ = two_way(arms, seeds, np.arange(12.0) ** 2)
    assert model.tells(0, 1) and model.tells(2, 3)
    assert not model.tells(0, 2)


def test_one_run_that_was_lost_of_ten_thousand_is_made_up_for_as_by_yates(normal):
    """The value that leaves the whole table's answer: Yates, Empire J. Exp. Agric. 1:129, 1933."""
    arms, seeds = np.divmod(np.arange(2000 * 5), 5)
    values = normal.normal(3, 1, len(arms))
    model = TwoWay(arms[:-1], seeds[:-1], values[:-1], "ols")
    assert model.degrees == 9999 - 2000 - 5 + 1
    assert model.tells(1999, 0)
    table = values.reshape(2000, 5)
    table[-1, -1] = 0
    arm, seed = table[-1].sum(), table[:, -1].sum()
    table[-1, -1] = (2000 * arm + 5 * seed - table.sum()) / (1999 * 4)
    expected = table[-1].mean() - table[0].mean()
    assert model.difference(1999, 0).delta[0] == pytest.approx(expected)
