import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from ablab.analysis.effects.multiplicity import holm

P = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("largest", [1.0, 0.01])
def test_holm_is_that_of_statsmodels(normal, k, largest):
    p = normal.uniform(0, largest, k)
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_ties_share_the_larger_step():
    assert list(holm(np.array([0.25, 0.125, 0.25, 0.0]))) == [0.5, 0.375, 0.5, 0]


@given(P, st.randoms())
def test_the_order_of_a_family_does_not_matter(p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    there = holm(np.array(p))
    assert np.array_equal(there[order], holm(np.array(p)[order]))


def test_families_side_by_side_are_each_alone():
    p = np.random.default_rng(0).uniform(0, 0.1, (30, 4))
    together = holm(p)
    assert all(np.array_equal(together[i], holm(p[i])) for i in range(30))


def test_a_family_of_nobody_has_no_p():
    assert len(holm(np.array([]))) == 0
