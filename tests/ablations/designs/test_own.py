"""A function of the user's own as a design: what it is given, what it may return, what is refused."""

import pytest

from ablab.ablations.design import (
    DESIGNS,
    Cell,
    layout_of,
    layout_of_menu,
    register_design,
    summary_of,
)
from ablab.core.errors import UserError
from ablab.core.recipe.doses import menu_of
from ablab.core.recipe.intervention import treatment_of


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr("ablab.ablations.design.DESIGNS", dict(DESIGNS))


def ladder(treatment, rungs: int = 3):
    """base, then the first ingredients.

    More of it.
    """
    cells = [Cell("base")]
    chosen = {}
    for name in list(treatment)[:rungs]:
        chosen = chosen | {name: treatment[name]}
        cells.append(Cell(f"up to {name}", chosen, "base"))
    return cells


def test_it_is_a_design_like_any_other_and_takes_options():
    register_design("ladder")(ladder)
    assert summary_of("ladder") == "base, then the first ingredients."
    treatment = treatment_of(["qk_norm", "ema", "z_loss"])
    names = [cell.name for cell in layout_of("ladder", treatment).cells]
    assert names == ["base", "up to qk_norm", "up to ema", "up to z_loss"]
    short = layout_of({"ladder": {"rungs": 1}}, treatment).cells
    assert [cell.name for cell in short] == ["base", "up to qk_norm"]
    with pytest.raises(UserError, match="design.ladder.rungs='x' must be a whole number"):
        layout_of({"ladder": {"rungs": "x"}}, treatment)


def test_each_dose_stands_in_the_treatment_under_its_label_and_in_the_cell_under_its_idea():
    register_design("each")(
        lambda treatment: [
            Cell("base"),
            *(Cell(label, {label: dose}, "base") for label, dose in treatment.items()),
        ]
    )
    cells = layout_of_menu("each", menu_of([{"z_loss": {"weight": [1, 2]}}, "ema"])).cells
    assert [cell.name for cell in cells] == [
        "base",
        "z_loss weight=1",
        "z_loss weight=2",
        "ema",
    ]
    assert [list(cell.treatment) for cell in cells] == [[], ["z_loss"], ["z_loss"], ["ema"]]


def breaks(treatment):
    raise ValueError("no such thing")


NONSENSE = {
    "returned nothing; it must return a list of Cell": lambda treatment: None,
    "returned 0 cells": lambda treatment: [],
    "returned a str among its cells": lambda treatment: ["base"],
    "returned two cells called 'a'": lambda treatment: [Cell("a"), Cell("a")],
    "cannot name a cell": lambda treatment: [Cell("a/b")],
    "its first cell 'a' is measured against 'b'": lambda treatment: [Cell("a", {}, "b")],
    "measured against 'c', which is no cell before it": lambda treatment: [
        Cell("a"),
        Cell("b", {}, "c"),
    ],
    "holds 'ema', which it was not given": lambda treatment: [Cell("a", treatment_of(["ema"]))],
    "holds nothing as 'qk_norm'": lambda treatment: [Cell("a", dict.fromkeys(treatment))],
    "the treatment of 'a' is a list": lambda treatment: [Cell("a", ["qk_norm"])],
    "holds two doses of z_loss": lambda treatment: [Cell("a", treatment)],
    "breaks, at ": breaks,
}


@pytest.mark.parametrize("said", NONSENSE)
def test_nonsense_is_one_line_that_names_the_design(said):
    register_design("odd")(NONSENSE[said])
    with pytest.raises(UserError) as refusal:
        layout_of_menu("odd", menu_of(["qk_norm", {"z_loss": {"weight": [1, 2]}}]))
    assert "design odd" in str(refusal.value) and said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def bare():
    return []


def untyped(treatment, rungs=3):
    return []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (bare, "must be a function of a treatment"),
        (untyped, "give its option rungs a type and a default"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_when_it_is_registered(function, said):
    with pytest.raises(UserError, match=said):
        register_design("odd")(function)


def test_a_name_is_taken_once():
    with pytest.raises(UserError, match="two designs are called 'add_one'"):
        register_design("add_one")(ladder)
