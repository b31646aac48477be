"""Stages in a sheet: each over the experiment's own recipe, each named by its whole history."""

import pytest

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import run_id
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import grid_plan_of

STAGES = [
    {"name": "stable", "set": {"budget.tokens": 1280}},
    {"name": "decay", "set": {"data.context": 8, "with.z_loss.weight": 0.5}, "takes": []},
    {"name": "last", "base": ["short"], "with": ["ema"]},
]


@pytest.fixture
def sheet(lab):
    """keys -> the path of a staged sheet."""
    (lab.root / "short.yaml").write_text("budget: {tokens: 640}\n")

    def write(**keys):
        arms = keys.pop("arms", ["qk_norm", "z_loss"])
        staged = {"seeds": [0], "stages": STAGES, "arms": arms} | keys
        return str(lab.root / lab.sheet("staged", **staged))

    return write


def chains(path, overrides={}):
    """Cell -> its runs, the first stage first."""
    return {run.cell: run.chain for run in load(path, overrides).runs()}


def test_each_stage_is_the_experiments_recipe_with_its_own_changes(sheet):
    stable, decay, last = (run.recipe for run in chains(sheet())["full"])
    assert [one.budget.tokens for one in (stable, decay, last)] == [1280, 1280, 640]
    assert [one.data.context for one in (stable, decay, last)] == [16, 8, 16]
    assert [one.objective[0].weight for one in (stable, decay, last)] == [1e-4, 0.5, 1e-4]
    assert [len(one.after_step) for one in (stable, decay, last)] == [0, 0, 1]
    assert (stable.init, decay.init.run, last.init.run) == (None, run_id(stable), run_id(decay))
    assert (decay.init.takes, last.init.takes) == ((), ("optimizer",))


def test_arms_that_differ_in_a_later_stage_share_the_earlier_ones(sheet):
    runs = chains(sheet())
    full, without, plain = runs["full"], runs["- ema"], runs["base"]
    assert [run.id for run in without[:2]] == [run.id for run in full[:2]]
    assert without[2].id != full[2].id
    assert not {run.id for run in plain} & {run.id for run in full}


def test_seeds_share_no_stage(sheet):
    runs = load(sheet(seeds=[0, 1])).runs()
    full = [run.chain for run in runs if run.cell == "full"]
    assert len({one.id for chain in full for one in chain}) == 6
    assert {one.recipe.seed for one in full[1]} == {1}


def test_the_plan_compares_the_last_stage_and_names_each_trunk_once(sheet):
    experiment = load(sheet())
    runs = experiment.runs()
    plan = grid_plan_of(experiment, runs)
    assert [row.run for row in plan.rows] == [run.id for run in runs]
    trunks = [row.run for row in plan.trunks]
    assert len(trunks) == len(set(trunks)) == 2 * 4  # `- ema` has those of `full`
    assert plan.trunks[0].cell == "full · stable"
    assert plan.trunks[0].tags == {"ablab.stage": "stable"}
    assert plan.trunks[0].params["stage"] == "stable"


def test_one_stage_can_be_overridden(sheet):
    path = sheet()
    before = chains(path)["full"]
    after = chains(
        path, {"stages.decay.optim.lr": 0.01, "stages.decay.with.z_loss.weight": 0.25}
    )
    stable, decay, last = after["full"]
    assert stable.id == before[0].id
    assert decay.recipe.optim.lr == 0.01
    assert decay.recipe.objective[0].weight == 0.25
    assert last.recipe.optim == before[2].recipe.optim and last.id != before[2].id
    titled = load(path, {"stages.decay.optim.lr": 0.01}).name
    assert titled == "staged@stages.decay.optim.lr=0.01"


def test_an_override_of_all_stages_reaches_each(sheet):
    runs = chains(sheet(), {"model.width": 32, "with.qk_norm.scale": 1.5})["full"]
    assert {run.recipe.model.width for run in runs} == {32}
    assert {run.recipe.model.attention.on_qk[0].scale for run in runs} == {1.5}


@pytest.mark.parametrize(
    ("keys", "overrides", "said"),
    [
        (
            {},
            {"data.context": 4},
            "data.context is set by stage decay for itself; write stages.decay.",
        ),
        (
            {},
            {"stages.decya.optim.lr": 1},
            "unknown path .* Did you mean 'stages.decay.<path>'",
        ),
        ({}, {"stages.decay": 1}, "unknown path 'stages.decay'"),
        ({}, {"stages.decay.optim.rate": 1}, "stage 'decay': unknown path 'optim.rate'"),
        ({}, {"stages.last.seed": 1}, "stages.last.seed would be overwritten"),
        ({"stages": [{"name": "a b"}]}, {}, "'a b' cannot name a stage"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, {}, "'a' stands there twice"),
        (
            {"stages": [{"name": "a", "with": ["z_loss"]}]},
            {},
            "z_loss stands in `with` of stage 'a'",
        ),
        ({"stages": [{"name": "a", "treatment": []}]}, {}, "unknown key 'treatment'"),
        (
            {"stages": [{"name": "a", "takes": ["all"]}]},
            {},
            r"stages\[0\].takes.*must be a list, each one of",
        ),
        ({"stages": [{"naem": "a"}]}, {}, r"unknown key 'stages\[0\].naem'"),
        (
            {"stages": [{"name": "a"}, {"name": "b", "set": {"model.width": 32}}]},
            {},
            "stage 'b': embedding.table is .* keep the model",
        ),
        (
            {"stages": [{"name": "a"}, {"name": "b", "with": ["muon"]}], "arms": []},
            {},
            "stage 'b': optim.chains.hidden keeps state as momentum here and as adam",
        ),
        (
            {"stages": [{"name": "a", "set": {"with.zloss.weight": 1}}]},
            {},
            "stage 'a': unknown path",
        ),
        (
            {},
            {"stages.stable.with.ema.beta": 1},
            "stage 'stable': unknown path 'with.ema.beta'",
        ),
    ],
)
def test_what_cannot_be_a_stage_is_one_line(sheet, keys, overrides, said):
    path = sheet(**keys)
    with pytest.raises(UserError, match=said) as refusal:
        load(path, overrides).runs()
    assert len(str(refusal.value)) <= 320
