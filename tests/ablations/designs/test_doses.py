"""What each design makes of several doses of one idea."""

import pytest

from ablab.ablations.design import DESIGNS, layout_of_menu
from ablab.core.errors import UserError
from ablab.core.recipe.doses import menu_of

WITH = [{"z_loss": {"weight": [1.0, 2.0]}}, {"muon": {"lr": [3.0, 4.0]}}, "normuon"]
ONE_DOSE = {
    "cumulative": "cumulative",
    "factorial": "factorial",
    "fractional": "fractional",
    "pairs": {"pairs": {"of": ["z_loss", "normuon"]}},
    "twice": {"twice": {"optimizers": ["base", "muon"]}},
    "replicate": "replicate",
    "single": "single",
    "arms": "arms",
}


def cells(design, listed=WITH):
    return {cell.name: cell for cell in layout_of_menu(design, menu_of(listed)).cells}


def doses(cell) -> dict[str, float]:
    fields = {"z_loss": "weight", "muon": "lr"}
    return {
        name: getattr(one, fields[name])
        for name, one in cell.treatment.items()
        if name in fields
    }


def test_leave_one_out_has_the_first_dose_in_full_and_an_arm_for_each_other_one():
    found = cells("leave_one_out")
    assert list(found) == [
        "full",
        "base",
        "- z_loss",
        "- muon (and normuon)",
        "- normuon",
        "z_loss weight=2",
        "muon lr=4",
    ]
    assert doses(found["full"]) == {"z_loss": 1.0, "muon": 3.0}
    assert doses(found["z_loss weight=2"]) == {"z_loss": 2.0, "muon": 3.0}
    assert doses(found["muon lr=4"]) == {"z_loss": 1.0, "muon": 4.0}
    assert {cell.reference for cell in found.values()} == {None, "full"}


def test_add_one_adds_each_dose_and_builds_on_the_first():
    found = cells("add_one")
    assert list(found) == [
        "base",
        "+ z_loss weight=1",
        "+ z_loss weight=2",
        "+ muon lr=3",
        "+ muon lr=4",
        "+ normuon (on muon lr=3)",
    ]
    assert doses(found["+ z_loss weight=2"]) == {"z_loss": 2.0}
    assert doses(found["+ normuon (on muon lr=3)"]) == {"muon": 3.0}
    assert found["+ normuon (on muon lr=3)"].reference == "+ muon lr=3"
    assert found["+ muon lr=4"].reference == "base"


@pytest.mark.parametrize("name", ONE_DOSE)
def test_a_design_that_cannot_mean_several_doses_says_so_with_the_cure(name):
    with pytest.raises(UserError) as refusal:
        cells(ONE_DOSE[name])
    assert str(refusal.value) == (
        f"design {name} takes one dose of each ingredient, and with.z_loss lists 2; "
        "keep one of them, or choose design: leave_one_out or add_one"
    )


def test_every_shipped_design_is_decided_about_here():
    assert {*ONE_DOSE, "leave_one_out", "add_one"} == set(DESIGNS)
