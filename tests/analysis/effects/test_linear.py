import numpy as np
import pytest
import statsmodels.api as sm

from ablab.analysis.effects.linear import Linear


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
