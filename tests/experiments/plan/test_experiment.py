"""An experiment file, read: which runs it wants, how they are named, and what a plan remembers."""

import json
from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.language.part import Part
from ablab.core.recipe import recipe as recipes
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import run_id
from ablab.experiments.plan.experiment import catalog, chosen, load, merged_plan


@pytest.fixture(scope="module")
def read(lab):
    """Write an experiment file and load it: read(overrides, **keys of the file)."""

    def of(overrides={}, **keys):
        return load(
            str(lab.root / lab.sheet("sheet", **keys)), overrides, lambda data: "0" * 16
        )

    return of


@pytest.mark.parametrize("name", catalog())
def test_every_experiment_of_the_catalog_loads_and_its_cells_build(name):
    experiment = load(name)
    assert (
        experiment.recipes.keys() == {cell.name for cell in experiment.cells}
        and f" {name}" in experiment.sheet.command
    )
    runs = experiment.runs([0])
    assert [run.cell for run in runs] == [cell.name for cell in experiment.cells]


def test_seeds_come_round_by_round_so_that_early_runs_cover_every_cell(read):
    runs = read(seeds=[4, 2]).runs()
    assert [run.pair for run in runs] == [4] * 4 + [2] * 4 and [
        run.cell for run in runs[:4]
    ] == [run.cell for run in runs[4:]]
    assert all(run.recipe.seed == run.pair and run.id == run_id(run.recipe) for run in runs)


def test_cells_of_one_pair_share_the_seed_and_replicas_never_do(read):
    assert {run.recipe.seed for run in read().runs([3])} == {3}
    seeds = [run.recipe.seed for run in read(design="replicate").runs(range(5))]
    assert len(set(seeds)) == len(seeds) == 10
    with pytest.raises(UserError, match="seed 1000 of sheet would run in both A and B"):
        read(design="replicate").runs([1000])


def test_how_a_run_is_executed_and_which_seeds_are_asked_for_rename_nothing(read):
    usual = read()
    for overrides in (
        {"runtime.threads": 2},
        {"runtime.micro_batch": 2, "runtime.log_every": 7},
        {"seeds": [0]},
    ):
        other = read(overrides)
        assert other.name == usual.name and other.runs([0]) == usual.runs([0])


def test_what_a_run_computes_renames_the_experiment_and_exactly_the_runs_it_touches(read):
    ids = {run.cell: run.id for run in read().runs([0])}
    for overrides, touched in (
        ({"optim.lr": 0.5}, {"full", "base", "- qk_norm", "- value_residual"}),
        ({"with.qk_norm.scale": 2.5}, {"full", "- value_residual"}),
    ):
        other = read(overrides)
        assert {run.cell for run in other.runs([0]) if run.id != ids[run.cell]} == touched
        assert other.name == "sheet" + "".join(
            f"@{path}={value}" for path, value in overrides.items()
        )
    assert read({"design": "add_one"}).name == "sheet@design=add_one"


def test_a_name_is_always_a_file_name(read):
    long = read(
        {
            f"optim.chains.{role}.lr": 0.123456789 + i
            for i, role in enumerate(("embedding", "hidden", "readout", "vector", "gate"))
        }
    )
    assert len(long.name) < 100 and long.name.startswith("sheet@")
    assert "/" not in read({"data.digest": "a/b"}).name


def test_other_data_is_not_held_to_the_digest_of_the_config():
    assert load("quickstart").base.data.digest == "f1114b0699edd867"
    assert (
        load(
            "quickstart", {"data.name": "mine"}, lambda data: f"digest of {data}"
        ).base.data.digest
        == "digest of mine"
    )
    assert (
        load("quickstart", {"data.name": "mine", "data.digest": "given"}).base.data.digest
        == "given"
    )


def test_data_named_in_the_file_is_not_held_to_the_digest_of_the_config_either(read):
    named = {"base": ["base", "size/tiny", "data/embedded"], "set": {"data.name": "mine"}}
    assert read(**named).base.data.digest == "0" * 16
    assert (
        read(**named | {"set": {"data.name": "mine", "data.digest": "given"}}).base.data.digest
        == "given"
    )


def test_a_recipe_has_one_name_however_its_numbers_are_written(read):
    assert (
        read({"budget.tokens": 2e4}).name
        == read({"budget.tokens": 20000}).name
        == "sheet@budget.tokens=20000"
    )


def test_a_config_beside_the_file_comes_before_a_shipped_one(lab, read):
    (lab.root / "size").mkdir(exist_ok=True)
    (lab.root / "size" / "tiny.yaml").write_text("model: {width: 48}\n")
    assert read(base=["base", "mini", "size/tiny"]).base.model.width == 48
    (lab.root / "size" / "tiny.yaml").unlink()
    assert read(base=["base", "mini", "size/tiny"]).base.model.width == 64


def test_a_later_config_replaces_a_part_of_another_kind_and_merges_one_of_the_same(lab, read):
    (lab.root / "flat.yaml").write_text("schedule: {kind: constant}\n")
    (lab.root / "low.yaml").write_text("schedule: {kind: cosine, floor: 0.5}\n")
    assert read(base=["base", "mini", "flat"]).base.schedule.kind == "constant"
    low = read(base=["base", "mini", "low"]).base.schedule
    assert (low.floor, low.warmup_steps) == (0.5, 3)  # mini's warm-up stays


def test_a_run_of_an_edited_plugin_has_another_id_and_no_other_run_has(read, monkeypatch):
    before = {run.cell: run.id for run in read().runs([0])}
    monkeypatch.setitem(Part.foreign, "qk_norm", "0123456789ab")
    after = {run.cell: run.id for run in read().runs([0])}
    assert {cell for cell in before if before[cell] != after[cell]} == {
        "full",
        "- value_residual",
    }


def test_a_pattern_chooses_what_a_shell_would_and_a_word_what_stands_in_the_name(read):
    runs = read(**{"with": ["muon", "normuon", "qk_norm"]}).runs([0])
    assert [run.cell for run in chosen(runs, ["normuon"])] == [
        "- muon (and normuon)",
        "- normuon",
    ]  # and not muon alone
    assert [run.cell for run in chosen(runs, ["- *", "!*muon*"])] == ["- qk_norm"]
    assert chosen(runs, []) == runs
    for pattern in ("norm", "!norm", "FULL"):
        with pytest.raises(UserError, match="fits no cell"):
            chosen(runs, [pattern])


# -- the plan ----------------------------------------------------------------------------------------------------------
def test_a_plan_keeps_earlier_seeds_while_their_recipes_are_the_same(read):
    experiment = read()
    old = merged_plan(experiment, experiment.runs([0, 5]), None)
    assert [row.pair for row in merged_plan(experiment, experiment.runs([0, 1]), old).rows] == [
        0
    ] * 4 + [1] * 4 + [5] * 4
    other = read(**{"set": {"optim.lr": 0.5}})
    assert {row.pair for row in merged_plan(other, other.runs([0, 1]), old).rows} == {
        0,
        1,
    }  # seed 5 was of another recipe
    fewer = read(**{"with": ["qk_norm"]})
    rows = merged_plan(fewer, fewer.runs([0]), old).rows
    assert {row.cell for row in rows} == {"full", "base", "- qk_norm"} and {
        row.cell for row in rows if row.pair == 5
    } == {"base"}


def test_a_plan_remembers_what_was_found_inert_until_it_is_asked_again(read):
    experiment = read()
    runs = experiment.runs([0])
    noted = merged_plan(experiment, runs, None, {"- qk_norm": "full"})
    assert {row.cell: row.note for row in noted.rows if row.note} == {
        "- qk_norm": "inert: same bits as full"
    }
    again = merged_plan(experiment, runs, noted, {"base": "full"})
    assert {row.cell for row in again.rows if row.note} == {"- qk_norm", "base"}
    alive = merged_plan(experiment, runs, again, {"- qk_norm": ""})
    assert {row.cell for row in alive.rows if row.note} == {"base"}


def test_a_plan_of_thousands_merges_in_a_time_that_grows_with_its_length(read):
    """Twice the rows, about twice the calls: counted, not timed."""
    import cProfile
    import pstats

    experiment = read()

    def calls(seeds: int) -> int:
        old = merged_plan(experiment, experiment.runs(range(seeds)), None)
        profile = cProfile.Profile()
        profile.runcall(merged_plan, experiment, experiment.runs([0]), old)
        return pstats.Stats(profile).total_calls

    assert calls(200) < 2.2 * calls(100)


def test_what_a_tracker_shows_names_the_toggles_the_dials_and_what_differs(read):
    experiment = read(**{"with": ["qk_norm", {"gating": {"per": "elementwise"}}]})
    run = next(run for run in experiment.runs([3]) if run.cell == "- qk_norm")
    shown = experiment.params(run)
    assert (
        shown["with.qk_norm"] is False
        and shown["with.gating"] is True
        and shown["seed"] == 3
        and shown["model.width"] == 16
    )
    assert shown["model.attention.on_heads.gating.per"] == "elementwise" and not any(
        "qk_norm." in name for name in shown
    )
    assert json.dumps(shown)


def test_a_later_slot_leaves_no_trace_in_an_identity_until_it_is_used(tiny, monkeypatch):
    """So a slot that is added to the house renames no run that does not use it."""
    unused = run_id(tiny())
    used = run_id(assign(tiny(), "model.on_features", ["ln_scaling"]))
    assert used != unused
    loud = [replace(slot, silent=False) for slot in recipes.SLOTS]
    monkeypatch.setattr(recipes, "SLOTS", loud)
    assert run_id(tiny()) != unused


def test_a_recipe_that_is_not_plain_data_has_no_id(read):
    recipe = read().base
    for value in (float("nan"), b"bytes", object(), {1, 2}):
        with pytest.raises(UserError, match=r"recipe.model.norm_eps=.* is not plain data"):
            run_id(replace(recipe, model=replace(recipe.model, norm_eps=value)))
