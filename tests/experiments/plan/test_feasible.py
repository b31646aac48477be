"""Cells that cannot be built are listed with the reason, and the grid goes on without them."""

import json

import pytest

from ablab.core.errors import UserError
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import merged_plan


@pytest.fixture
def read(lab):
    def of(**keys):
        return load(str(lab.root / lab.sheet("sheet", **keys)), {}, lambda data: "0" * 16)

    return of


def names(experiment) -> list[str]:
    return [cell.name for cell in experiment.cells]


def test_the_cells_of_a_factorial_that_clash_are_listed_and_the_others_run(read):
    experiment = read(arms=["muon", "soap", "qk_norm"], design="factorial")
    assert names(experiment) == [
        "base",
        "+ qk_norm",
        "+ soap",
        "+ soap, qk_norm",
        "+ muon",
        "+ muon, qk_norm",
    ]
    assert set(experiment.infeasible) == {"+ muon, soap", "full"}
    assert "soap and muon exclude each other" in experiment.infeasible["full"]
    assert ["muon", "soap"] not in experiment.factors.interactions
    assert set(experiment.factors.levels) == set(names(experiment))


def test_a_plan_keeps_the_reasons_and_the_levels_and_tags_each_run_with_its_own(read):
    experiment = read(arms=["muon", "normuon"], design="factorial")
    plan = merged_plan(experiment, experiment.runs([0]), None)
    assert plan.design == "factorial"
    assert list(plan.infeasible) == ["+ normuon"]
    assert plan.factors == experiment.factors
    tags = {row.cell: row.tags for row in plan.rows}
    assert tags["+ muon"] == {"ablab.factor.muon": "on", "ablab.factor.normuon": "off"}


def test_an_arm_whose_reference_cannot_be_built_is_left_out_with_it(read):
    """- soap (under muon) can be built, but against full (under base) it would be measured across optimizers."""
    twice = {"twice": {"optimizers": ["base", "muon"]}}
    experiment = read(arms=["muon", "soap", "qk_norm"], design=twice)
    assert names(experiment) == [
        "full (under base)",
        "- soap (under base)",
        "- qk_norm (under base)",
    ]
    assert experiment.infeasible["- soap (under muon)"] == (
        "it is measured against full (under muon), which cannot be"
    )


def test_where_no_arm_can_be_built_the_reason_is_the_error(read):
    experiment = read(arms=["normuon"], design="add_one")
    with pytest.raises(
        UserError, match="cell '[+] normuon' of sheet cannot be built: normuon builds"
    ):
        experiment.runs([0])


def test_where_the_reference_cannot_be_built_the_reason_is_the_error(read):
    experiment = read(arms=["muon", "soap"], design="leave_one_out")
    with pytest.raises(
        UserError, match="cell 'full' of sheet cannot be built: .*soap and muon"
    ):
        experiment.runs([0])


def test_a_dry_run_and_show_name_what_is_left_out_and_what_cannot_be_told_apart(lab, ablab):
    arms = ["qk_norm", "gating", "muon", "normuon"]
    sheet = lab.sheet("quarter", arms=arms, design={"fractional": {"resolution": 4}})
    for words in (["run", sheet, "--dry-run"], ["show", sheet]):
        said = ablab(*words).out
        assert "design: a fraction of resolution 4: normuon = qk_norm x gating x muon" in said
        left_out = (
            "2 cells (+ gating, normuon; + qk_norm, normuon) are left out, they cannot be built"
        )
        assert f"{left_out}: normuon builds on muon" in said
    found = ablab("run", sheet, "--dry-run", "--json").json
    assert found["factors"]["generators"] == ["normuon = qk_norm x gating x muon"]
    assert len(found["infeasible"]) == 2
    json.dumps(found)
