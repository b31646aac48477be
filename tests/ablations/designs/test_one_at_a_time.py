"""Designs whose arms differ from their reference by one ingredient."""

from ablab.ablations.design import cells_of
from ablab.core.recipe.intervention import treatment_of


def cumulative(*names):
    return cells_of("cumulative", treatment_of(names))


def test_cumulative_adds_in_the_order_of_the_file_and_measures_against_the_cell_before():
    cells = cumulative("ema", "qk_norm", "gating")
    assert [cell.name for cell in cells] == ["base", "+ ema", "+ qk_norm", "+ gating"]
    assert [list(cell.treatment) for cell in cells] == [
        [],
        ["ema"],
        ["ema", "qk_norm"],
        ["ema", "qk_norm", "gating"],
    ]
    assert [cell.reference for cell in cells] == [None, "base", "+ ema", "+ qk_norm"]


def test_what_stands_before_its_requirement_comes_in_with_it():
    cells = cumulative("normuon", "ema", "muon", "qk_norm")
    assert [cell.name for cell in cells] == [
        "base",
        "+ ema",
        "+ muon (and normuon)",
        "+ qk_norm",
    ]
    assert set(cells[2].treatment) == {"ema", "muon", "normuon"}
    assert cells[2].reference == "+ ema"


def test_what_builds_on_something_that_is_not_listed_has_a_cell_that_says_so_when_it_is_built():
    cells = cumulative("normuon", "ema")
    assert [cell.name for cell in cells] == ["base", "+ normuon", "+ ema"]
