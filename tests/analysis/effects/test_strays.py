"""Runs that lie far from the other seeds of their arm are named, and sound ones are not."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.analysis.effects.strays import strays

# A campaign on four GPUs whose optimizer overflowed now and then: bits/byte of the runs that finished.
OVERFLOWED = {
    "base": [1.2619, 1.2568, 1.2597, 1.7466],
    "fp8 both": [1.3802, 1.2564, 1.2898, 1.2660, 1.2558],
    "fp8 both e4m3": [1.6492, 1.2757, 1.2637, 1.2545],
}


def table(arms) -> pd.DataFrame:
    rows = [
        {"cell": cell, "seed": seed, "val/loss": value}
        for cell, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def named(arms) -> list[tuple[str, int]]:
    return [(one.cell, one.seed) for one in strays(table(arms), "val/loss")]


def test_a_run_that_recovered_from_a_spike_is_named_with_what_the_others_reached():
    assert named(OVERFLOWED) == [("base", 3), ("fp8 both e4m3", 0)]
    first = next(strays(table(OVERFLOWED), "val/loss"))
    assert first.value == 1.7466 and first.others == (1.2568, 1.2619)


@pytest.mark.parametrize(("arms", "seeds", "at_most"), [(2, 3, 3), (4, 5, 1)])
def test_of_two_hundred_sound_experiments_few_name_a_run(arms, seeds, at_most):
    draw = np.random.default_rng(3)
    noise = draw.standard_normal((200, arms, seeds))
    cells = {f"arm {i}": i for i in range(arms)}
    alarms = sum(
        bool(named({cell: 3 + 0.01 * one[i] for cell, i in cells.items()})) for one in noise
    )
    assert alarms <= at_most


@given(
    shift=st.floats(-10, 10),
    factor=st.floats(0.01, 100),
    place=st.integers(0, 4),
)
def test_neither_the_unit_nor_the_size_of_the_metric_matters(shift, factor, place):
    finals = np.array([3.01, 3.02, 2.99, 3.0, 3.015])
    finals[place] += 1
    assert named({"arm": shift + factor * finals}) == [("arm", place)]


@pytest.mark.parametrize(
    "arms",
    [
        {"two seeds have no middle": [1.0, 9.0]},
        {"all alike": [1.0, 1.0, 1.0, 1.0]},
        {"no number": [np.nan, np.inf, 1.0, 1.1, 1.2]},
    ],
    ids=lambda arms: next(iter(arms)),
)
def test_where_there_is_no_spread_nothing_is_named(arms):
    assert named(arms) == []
