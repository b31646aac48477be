"""Designs: which cells a treatment becomes, and what each is measured against."""

import itertools

import pytest

from ablab.ablations.design import DESIGNS, Cell, cells_of
from ablab.core.errors import UserError
from ablab.core.recipe.intervention import resolve, treatment_of
from ablab.core.recipe.recipe import run_id

IMU1 = [
    "qk_norm",
    {"gating": {"per": "head"}},
    "value_residual",
    "ln_scaling",
    "mup",
    "muon",
    "normuon",
    "cautious_wd",
    "wsd",
    "z_loss",
]


# A way to write each design, for the whole recipe and for gating and qk_norm alone.
WRITTEN = {name: name for name in DESIGNS} | {
    "factorial": {"factorial": {"factors": ["qk_norm", "gating"]}},
    "fractional": {"fractional": {"factors": ["qk_norm", "gating"]}},
    "pairs": {"pairs": {"of": ["qk_norm", "gating"]}},
    "twice": {"twice": {"optimizers": ["base", "gating"]}},
}


def cells(design, *names) -> dict[str, Cell]:
    listed = cells_of(design, treatment_of(names))
    found = {cell.name: cell for cell in listed}
    assert len(found) == len(listed)
    return found


def names(cell: Cell) -> set[str]:
    return set(cell.treatment)


def test_leave_one_out_removes_each_ingredient_once_from_the_full_set():
    found = cells("leave_one_out", "qk_norm", "ema", "z_loss")
    assert list(found) == ["full", "base", "- qk_norm", "- ema", "- z_loss"]
    assert names(found["full"]) == {"qk_norm", "ema", "z_loss"}
    assert names(found["base"]) == set()
    assert all(
        names(found[f"- {one}"]) == names(found["full"]) - {one}
        for one in ("qk_norm", "ema", "z_loss")
    )
    assert [cell.reference for cell in found.values()] == [None, "full", "full", "full", "full"]


def test_leaving_out_what_another_builds_on_takes_that_along_and_says_so():
    found = cells("leave_one_out", "muon", "normuon", "ema")
    assert names(found["- muon (and normuon)"]) == {"ema"}
    assert names(found["- normuon"]) == {
        "muon",
        "ema",
    }


def test_add_one_measures_what_builds_on_another_against_that_other_alone():
    found = cells("add_one", "normuon", "muon", "ema")  # whatever the order in the file
    assert names(found["+ muon"]) == {"muon"}
    assert found["+ muon"].reference == "base"
    assert names(found["+ normuon (on muon)"]) == {"muon", "normuon"}
    assert found["+ normuon (on muon)"].reference == "+ muon"
    assert names(found["+ ema"]) == {"ema"}
    assert found["+ ema"].reference == "base"
    assert names(found["base"]) == set()


def test_replicate_is_the_same_treatment_twice_with_seeds_of_its_own():
    a, b = cells("replicate", "qk_norm").values()
    assert a.treatment == b.treatment
    assert (a.reference, b.reference) == (None, "A")
    assert (a.replica, b.replica) == (0, 1)


def test_single_trains_the_whole_treatment_and_compares_it_with_nothing():
    (full,) = cells("single", "qk_norm", "ema").values()
    assert names(full) == {"qk_norm", "ema"}
    assert full.reference is None


def test_a_dose_stays_with_its_ingredient_in_every_cell():
    for design in WRITTEN.values():
        for cell in cells(design, {"gating": {"per": "elementwise"}}, "qk_norm").values():
            assert (
                "gating" not in cell.treatment or cell.treatment["gating"].per == "elementwise"
            )


@pytest.mark.parametrize("design", DESIGNS)
def test_every_cell_of_the_full_recipe_builds_and_has_a_reference_that_exists(design, tiny):
    found = cells(WRITTEN[design], *IMU1)
    assert all(cell.reference in found for cell in found.values() if cell.reference)
    assert [cell for cell in found.values() if cell.reference is None]
    ids = {name: run_id(resolve(tiny(), cell.treatment)) for name, cell in found.items()}
    # No two arms ask for one run.
    assert len(set(ids.values())) == (1 if design == "replicate" else len(found))


def test_the_order_in_the_file_changes_no_run(tiny):
    for order in itertools.islice(
        itertools.permutations(["muon", "normuon", "cautious_wd", "mup"]), 0, None, 5
    ):
        ids = {
            cell.name.split(" (")[0]: run_id(resolve(tiny(), cell.treatment))
            for cell in cells("leave_one_out", *order).values()
        }
        assert ids == {
            cell.name.split(" (")[0]: run_id(resolve(tiny(), cell.treatment))
            for cell in cells("leave_one_out", *sorted(order)).values()
        }


REFUSED = {
    "unknown option": ({"fractional": {"res": 4}}, r"unknown key 'design.fractional.res'"),
    "unknown resolution": (
        {"fractional": {"resolution": 2}},
        "resolution=2 must be one of 3, 4, 5",
    ),
    "two designs": ({"single": {}, "add_one": {}}, "must be one design, as leave_one_out or"),
    "no design": ({}, "must be one design, as leave_one_out or"),
    "unknown factor": (
        {"factorial": {"factors": ["qk_norm", "gatin"]}},
        "names 'gatin', which `with` does not list. Did you mean 'gating'",
    ),
    "a factor twice": ({"pairs": {"of": ["ema", "ema"]}}, "design.pairs.of names 'ema' twice"),
    "one factor": ({"factorial": {"factors": ["ema"]}}, "crosses two factors or more, not 1"),
    "no pairs named": ("pairs", "design.pairs.of is missing"),
    "no optimizers named": ("twice", "design.twice.optimizers is missing"),
    "one optimizer": (
        {"twice": {"optimizers": ["base"]}},
        r"must name two, such as \[base, muon\]",
    ),
    "unknown optimizer": (
        {"twice": {"optimizers": ["base", "muom"]}},
        "names 'muom', which `with`",
    ),
    "only optimizers": (
        {"twice": {"optimizers": ["qk_norm", "gating"]}},
        "has no arm besides its optimizers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_design_that_cannot_be_laid_out_is_refused_with_what_to_change(case):
    written, said = REFUSED[case]
    arms = ["qk_norm", "gating", *(["ema"] if case != "only optimizers" else [])]
    with pytest.raises(UserError, match=said):
        cells(written, *arms)


def test_a_factorial_of_many_factors_is_refused_with_how_many_it_may_have():
    with pytest.raises(UserError, match="of 10 factors has 1,024 cells; name at most 8 in"):
        cells("factorial", *IMU1)


def test_a_name_that_is_no_design_and_a_design_of_nothing_are_refused():
    with pytest.raises(
        UserError, match="unknown design 'leave_1_out'. Did you mean 'leave_one_out'"
    ):
        cells("leave_1_out", "qk_norm")
    with pytest.raises(
        UserError, match="nothing to leave out; list interventions under `with`"
    ):
        cells("leave_one_out")
    assert list(cells("add_one")) == ["base"]
    assert list(cells("replicate")) == ["A", "B"]
    assert list(cells("single")) == ["full"]
