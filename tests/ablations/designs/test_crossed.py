"""Designs that cross factors: which cells, and what they can and cannot tell apart."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.ablations.design import layout_of
from ablab.ablations.designs.crossed import factors_of
from ablab.core.recipe.intervention import treatment_of

POOL = [
    "qk_norm",
    "gating",
    "value_residual",
    "ema",
    "z_loss",
    "wsd",
    "ln_scaling",
    "cautious_wd",
    "smear",
    "soft_cap",
    "unet_skips",
]


def laid_out(written, *names):
    return layout_of(written, treatment_of(names or POOL[:5]))


def fraction(factors: int, resolution: int):
    written = {"fractional": {"resolution": resolution, "factors": POOL[:factors]}}
    return laid_out(written, *POOL[:factors])


def matrix_of(layout) -> np.ndarray:
    """Levels, [cells, factors], each -1 or +1."""
    names = list(layout.factors.names)
    return np.array(
        [[levels[name] for name in names] for levels in layout.factors.levels.values()]
    )


def column(levels: np.ndarray, names: list[str], effect: tuple[str, ...]) -> np.ndarray:
    chosen = [names.index(name) for name in effect]
    return levels[:, chosen].prod(axis=1)


def shortest_word(levels: np.ndarray) -> int:
    """The resolution: the fewest columns whose product does not change; one more than there are, where none does so."""
    factors = levels.shape[1]
    for size in range(1, factors + 1):
        for chosen in combinations(range(factors), size):
            if abs(levels[:, chosen].prod(axis=1).sum()) == len(levels):
                return size
    return factors + 1


def test_a_factorial_is_every_combination_measured_against_the_cell_without_factors():
    layout = laid_out({"factorial": {"factors": ["ema", "gating"]}}, "gating", "ema", "qk_norm")
    cells = {cell.name: set(cell.treatment) for cell in layout.cells}
    assert cells == {
        "rest": {"qk_norm"},
        "+ gating": {"qk_norm", "gating"},
        "+ ema": {"qk_norm", "ema"},
        "full": {"qk_norm", "ema", "gating"},
    }
    assert [cell.reference for cell in layout.cells] == [None, "rest", "rest", "rest"]
    assert layout.factors.levels["+ ema"] == {"ema": 1, "gating": -1}
    assert layout.factors.interactions == [["ema", "gating"]]
    whole = laid_out("factorial", *POOL[:4])
    assert sorted(map(tuple, matrix_of(whole))) == sorted(product((-1, 1), repeat=4))
    assert whole.cells[0].name == "base"


@pytest.mark.parametrize("resolution", [3, 4, 5])
@pytest.mark.parametrize("factors", range(3, 12))
def test_a_fraction_is_balanced_has_its_resolution_and_holds_the_cell_without_factors(
    factors, resolution
):
    layout = fraction(factors, resolution)
    levels = matrix_of(layout)
    assert not levels.sum(axis=0).any()
    assert (levels.T @ levels == len(levels) * np.eye(factors)).all()
    assert shortest_word(levels) >= min(resolution, factors + 1)
    assert layout.cells[0].name == "base"
    assert layout.cells[0].reference is None
    assert (levels[0] == -1).all()


@pytest.mark.parametrize(
    ("factors", "resolution", "cells"), [(5, 5, 16), (7, 4, 16), (7, 3, 8)]
)
def test_a_fraction_has_as_few_cells_as_the_catalogues_say(factors, resolution, cells):
    """Box, Hunter and Hunter, Statistics for Experimenters, table 6.22: 2^(5-1) V, 2^(7-3) IV, 2^(7-4) III."""
    assert len(fraction(factors, resolution).cells) == cells


@pytest.mark.parametrize(("factors", "resolution"), [(4, 4), (5, 3), (5, 5), (6, 4), (7, 3)])
def test_every_equation_of_a_fraction_holds_in_its_levels(factors, resolution):
    found = fraction(factors, resolution)
    names = list(found.factors.names)
    levels = matrix_of(found)
    equations = found.factors.generators + found.factors.aliases
    assert equations
    for equation in equations:
        first, *others = equation.split(" = ")
        for other in others:
            sign = -1 if other.startswith("- ") else 1
            right = column(levels, names, tuple(other.removeprefix("- ").split(" x ")))
            assert (column(levels, names, tuple(first.split(" x "))) == sign * right).all()


def test_resolution_5_tells_every_interaction_of_two_and_resolution_3_none_of_a_full_house():
    five = fraction(5, 5).factors
    assert five.interactions == [list(pair) for pair in combinations(POOL[:5], 2)]
    assert not five.aliases
    assert five.resolution == 5
    assert five.generators == ["z_loss = - qk_norm x gating x value_residual x ema"]
    three = fraction(7, 3).factors
    assert not three.interactions
    assert len(three.aliases) == 7


def test_the_fraction_of_few_factors_is_the_whole_factorial_and_names_no_generators():
    found = fraction(3, 5)
    assert len(found.cells) == 8
    assert not found.factors.generators
    assert found.factors.resolution is None


@given(st.lists(st.integers(0, 31), min_size=1, max_size=32, unique=True))
def test_the_interactions_that_are_named_can_be_estimated_from_any_cells_that_are_left(cells):
    """With the mean and the factors that vary they have full column rank, whatever cells are missing."""
    names = {name: ["off", "on"] for name in POOL[:5]}
    levels = {
        str(cell): {name: 1 if cell >> i & 1 else -1 for i, name in enumerate(names)}
        for cell in cells
    }
    found = factors_of(names, levels)
    rows = np.array([list(level.values()) for level in levels.values()])
    mains = np.column_stack([np.ones(len(rows)), rows])
    listed = list(names)
    pairs = [column(rows, listed, tuple(pair)) for pair in found.interactions]
    whole = np.column_stack([mains, *pairs])
    extra = np.linalg.matrix_rank(whole) - np.linalg.matrix_rank(mains)
    assert extra == len(pairs)


def test_a_factor_that_never_varies_is_named_beside_the_mean():
    names = {"a": ["off", "on"], "b": ["off", "on"]}
    levels = {"one": {"a": -1, "b": 1}, "other": {"a": -1, "b": -1}}
    assert factors_of(names, levels).aliases == ["mean = - a", "b = - a x b"]


def test_pairs_are_the_full_set_without_each_and_without_each_two_of_the_named():
    layout = laid_out({"pairs": {"of": ["ema", "gating", "qk_norm"]}}, *POOL[:4])
    left_out = {cell.name: set(POOL[:4]) - set(cell.treatment) for cell in layout.cells}
    assert left_out == {
        "full": set(),
        "- ema": {"ema"},
        "- gating": {"gating"},
        "- qk_norm": {"qk_norm"},
        "- ema, gating": {"ema", "gating"},
        "- ema, qk_norm": {"ema", "qk_norm"},
        "- gating, qk_norm": {"gating", "qk_norm"},
    }
    assert {cell.reference for cell in layout.cells[1:]} == {"full"}
    assert len(layout.factors.interactions) == 3


def test_a_pair_of_which_one_takes_the_other_along_is_listed_and_no_cell():
    layout = laid_out({"pairs": {"of": ["muon", "normuon"]}}, "muon", "normuon", "ema")
    assert [cell.name for cell in layout.cells] == ["full", "- muon (and normuon)", "- normuon"]
    assert layout.infeasible == {"- muon, normuon": "it is - muon (and normuon)"}
    assert not layout.factors.interactions
