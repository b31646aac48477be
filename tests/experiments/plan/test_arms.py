"""Arms that a sheet writes out: how they differ from their reference, and what is refused."""

import pytest

from ablab.core.errors import UserError
from ablab.core.store.planned import notes_on_design
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import grid_plan_of

ZEROS = "0" * 16
OTHERS = "1" * 16
WIDE = {"name": "wide", "set": {"model.width": 32}}


@pytest.fixture(scope="module")
def read(lab):
    """Load a sheet with these arms: read(*arms, overrides={}, **keys of the file)."""

    def of(*written, overrides={}, **keys):
        lab.sheet("sheet", written=list(written), **keys)
        path = lab.root / "sheet.yaml"
        return load(str(path), overrides, lambda data: OTHERS if data == "other" else ZEROS)

    return of


def alone(read, *written, **more):
    """Without a design of its own, as a sheet that names none."""
    return read(*written, design="arms", **more)


def recipe(experiment, cell):
    return experiment.run(experiment.cell_named[cell], 0).recipe


def test_without_a_design_arms_are_compared_with_base_which_has_all_of_with(lab):
    text = (
        "question: Wide?\nbase: [base, mini]\nwith: [qk_norm]\n"
        "arms: [{name: wide, set: {model.width: 32}}]\n"
    )
    (lab.root / "plain.yaml").write_text(text)
    experiment = load(str(lab.root / "plain.yaml"), {}, lambda data: ZEROS)
    assert {cell.name: cell.reference for cell in experiment.cells} == {
        "base": None,
        "wide": "base",
    }
    base, wide = recipe(experiment, "base"), recipe(experiment, "wide")
    assert (base.model.width, wide.model.width) == (16, 32)
    for one in (base, wide):
        assert [part.kind for part in one.model.attention.on_qk] == ["qk_norm"]


def test_beside_a_design_an_arm_is_the_reference_of_its_others_with_what_it_changes(read):
    experiment = read(
        {"name": "both", "with": ["z_loss"], "without": ["qk_norm"]},
        {"name": "strong", "set": {"with.z_loss.weight": 0.5}, "reference": "both"},
        {**WIDE, "reference": "base"},
    )
    names = [cell.name for cell in experiment.cells]
    assert names == ["full", "base", "- qk_norm", "- value_residual", "both", "strong", "wide"]
    cells = experiment.cell_named
    assert list(cells["both"].treatment) == ["value_residual", "z_loss"]
    assert cells["strong"].treatment["z_loss"].weight == 0.5
    assert list(cells["wide"].treatment) == []
    assert [cells[name].reference for name in ("both", "strong", "wide")] == [
        "full",
        "both",
        "base",
    ]


def test_an_arm_of_an_arm_has_what_that_one_sets(read):
    wider = {"name": "hot", "set": {"optim.lr": 0.5}, "reference": "wide"}
    hot = recipe(alone(read, WIDE, wider), "hot")
    assert (hot.model.width, hot.optim.lr) == (32, 0.5)


def test_an_arm_that_reads_other_data_has_their_digest(read):
    experiment = alone(read, {"name": "other", "set": {"data.name": "other"}})
    assert recipe(experiment, "base").data.digest == ZEROS
    assert recipe(experiment, "other").data.digest == OTHERS


def test_what_an_arm_sets_stands_over_overrides_which_all_others_follow(read):
    experiment = alone(read, WIDE, overrides={"model.width": 64})
    assert recipe(experiment, "base").model.width == 64
    assert recipe(experiment, "wide").model.width == 32
    own = alone(read, WIDE, overrides={"arms.wide.model.width": 48})
    assert recipe(own, "wide").model.width == 48
    assert own.name == "sheet@arms.wide.model.width=48"


def test_an_arm_may_set_a_path_of_one_stage(read):
    stages = [{"name": "first"}, {"name": "last", "set": {"budget.tokens": 640}}]
    arm = {"name": "hot", "set": {"stages.last.optim.lr": 0.5}}
    runs = {run.cell: run.chain for run in alone(read, arm, stages=stages, seeds=[0]).runs()}
    assert [one.recipe.optim.lr for one in runs["hot"]] == [
        runs["base"][0].recipe.optim.lr,
        0.5,
    ]
    assert runs["hot"][0].id == runs["base"][0].id


def test_the_plan_says_what_an_arm_sets_and_which_arms_are_one_recipe(read):
    experiment = alone(read, WIDE, {"name": "same"})
    plan = grid_plan_of(experiment, experiment.runs())
    assert plan.settings == {"wide": {"model.width": 32}}
    assert plan.set_apart("wide", "base") == {"model.width": 32}
    runs = [(row.cell, row.run) for row in plan.rows]
    notes = list(notes_on_design(None, {}, runs))
    assert notes == ["base and same are one recipe: the same runs answer them"]


def test_another_dose_is_told_with_that_of_the_reference(read):
    arm = {"name": "scaled", "with": [{"qk_norm": {"scale": 2.0}}]}
    experiment = alone(read, arm)
    plan = grid_plan_of(experiment, experiment.runs())
    assert list(plan.doses_apart("scaled", "base")) == [("qk_norm", {"scale": 1.0})]


REFUSED = {
    "arms: 'wide' names two cells; rename one": [WIDE, WIDE],
    "arms: 'base' names two cells": [{**WIDE, "name": "base"}],
    "arms: 'a/b' cannot name an arm": [{"name": "a/b"}],
    "arms: '!a' cannot name an arm": [{"name": "!a"}],
    "arms.a.without names 'z_loss', which base does not have": [
        {"name": "a", "without": ["z_loss"]}
    ],
    "arms.a.reference='wid' is no cell of the design and no arm before it. Did you mean 'wide'": [
        WIDE,
        {"name": "a", "reference": "wid"},
    ],
    "arms.a.set: runtime.dtype is a key of the sheet": [
        {"name": "a", "set": {"runtime.dtype": "fp32"}}
    ],
    "arm 'a': seed=3 would be overwritten": [{"name": "a", "set": {"seed": 3}}],
    "arm 'a': unknown path 'model.wdth'": [{"name": "a", "set": {"model.wdth": 3}}],
    "arm 'a': unknown path 'with.ema.mix'": [{"name": "a", "set": {"with.ema.mix": 0.5}}],
    "arm 'a': model.width=17": [{"name": "a", "set": {"model.width": 17}}],
    "arm 'a' cannot be built: normuon builds on muon": [{"name": "a", "with": ["normuon"]}],
    "arms.a.with.z_loss.weight=[1, 2] must be a number": [
        {"name": "a", "with": [{"z_loss": {"weight": [1, 2]}}]}
    ],
    "unknown key 'arms[0].sett'. Did you mean 'set'?": [{"name": "a", "sett": {}}],
    "arms[0].with='ema' must be a list of interventions": [{"name": "a", "with": "ema"}],
}


@pytest.mark.parametrize("said", REFUSED)
def test_an_arm_that_cannot_be_is_one_line(read, said):
    with pytest.raises(UserError) as refusal:
        alone(read, *REFUSED[said])
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_arms_stand_beside_no_design_that_reads_effects_over_all_cells(read):
    with pytest.raises(UserError, match="drop arms, or choose design: leave_one_out"):
        read(WIDE, design="factorial")


def test_an_override_for_an_arm_that_is_not_there_names_the_nearest(read):
    with pytest.raises(UserError, match=r"unknown path 'arms.wid.x'. Did you mean 'arms.wide"):
        alone(read, WIDE, overrides={"arms.wid.x": 1})


def test_the_arms_can_be_replaced_on_the_command_line(read):
    experiment = alone(read, WIDE, overrides={"arms": [{"name": "mu", "with": ["muon"]}]})
    assert [cell.name for cell in experiment.cells] == ["base", "mu"]
