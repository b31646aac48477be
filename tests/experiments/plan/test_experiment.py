"""An experiment file, read: which runs it wants, how they are named, and what a plan remembers."""

import cProfile
import json
import pstats
from dataclasses import replace

import pytest

from ablab.core.data.mixture import digest_of_data
from ablab.core.errors import UserError
from ablab.core.language.part import Part
from ablab.core.recipe.recipe import Data, run_id
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import merged_plan
from ablab.experiments.plan.selection import chosen
from ablab.experiments.plan.sheets import catalog

ZEROS = "0" * 16


@pytest.fixture(scope="module")
def read(lab):
    """Write an experiment file and load it: read(overrides, **keys of the file)."""

    def of(overrides={}, **keys):
        path = lab.root / lab.sheet("sheet", **keys)
        return load(str(path), overrides, lambda data: ZEROS)

    return of


def cells_of(runs) -> list[str]:
    """Of runs, or of the rows of a plan."""
    return [run.cell for run in runs]


def pairs_of(runs) -> list[int]:
    return [run.pair for run in runs]


def seeds_of(runs) -> list[int]:
    return [run.recipe.seed for run in runs]


def ids_of(experiment) -> dict[str, str]:
    """Cell -> run id, of seed 0."""
    return {run.cell: run.id for run in experiment.runs([0])}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The cells whose run ids differ."""
    return {cell for cell, id in after.items() if id != before[cell]}


@pytest.mark.parametrize("name", catalog())
def test_every_experiment_of_the_catalog_loads_and_its_cells_build(name):
    experiment = load(name)
    cells = [cell.name for cell in experiment.cells]
    assert list(experiment.recipes) == cells
    assert cells_of(experiment.runs([0])) == cells
    assert f" {name}" in experiment.sheet.command


# -- runs --------------------------------------------------------------------------------------------------------------
def test_seeds_come_round_by_round_so_that_early_runs_cover_every_cell(read):
    runs = read(seeds=[4, 2]).runs()
    first, second = runs[:4], runs[4:]
    assert pairs_of(first) == [4] * 4
    assert pairs_of(second) == [2] * 4
    assert cells_of(first) == cells_of(second)
    for run in runs:
        assert run.recipe.seed == run.pair
        assert run.id == run_id(run.recipe)


def test_cells_of_one_pair_share_the_seed_and_replicas_never_do(read):
    assert set(seeds_of(read().runs([3]))) == {3}
    replicate = read(design="replicate")
    seeds = seeds_of(replicate.runs(range(5)))
    assert len(set(seeds)) == len(seeds) == 10
    with pytest.raises(UserError, match="seed 1000 of sheet would run in both A and B"):
        replicate.runs([1000])


@pytest.mark.parametrize(
    "overrides",
    [
        {"runtime.threads": 2},
        {"runtime.micro_batch": 2, "runtime.log_every": 7},
        {"seeds": [0]},
        {"equivalence": 0.002},
    ],
)
def test_how_a_run_is_executed_and_which_seeds_are_asked_for_rename_nothing(read, overrides):
    usual = read()
    other = read(overrides)
    assert other.name == usual.name
    assert other.runs([0]) == usual.runs([0])


@pytest.mark.parametrize(
    ("path", "value", "touched"),
    [
        ("optim.lr", 0.5, {"full", "base", "- qk_norm", "- value_residual"}),
        ("with.qk_norm.scale", 2.5, {"full", "- value_residual"}),
    ],
)
def test_what_a_run_computes_renames_the_experiment_and_exactly_the_runs_it_touches(
    read, path, value, touched
):
    usual = ids_of(read())
    other = read({path: value})
    assert changed(usual, ids_of(other)) == touched
    assert other.name == f"sheet@{path}={value}"


def test_the_plan_holds_the_smallest_effect_of_interest(read):
    assert merged(read(), [0], None).equivalence is None
    assert merged(read({"equivalence": 0.002}), [0], None).equivalence == 0.002


def test_another_design_is_another_experiment(read):
    assert read({"design": "add_one"}).name == "sheet@design=add_one"


def test_a_run_of_an_edited_plugin_has_another_id_and_no_other_run_has(read, monkeypatch):
    before = ids_of(read())
    monkeypatch.setitem(Part.foreign, "qk_norm", "0123456789ab")
    assert changed(before, ids_of(read())) == {"full", "- value_residual"}


EXOTIC = [float("nan"), b"bytes", object(), {1, 2}]


@pytest.mark.parametrize("value", EXOTIC)
def test_a_recipe_that_is_not_plain_data_has_no_id(read, value):
    recipe = read().base
    model = replace(recipe.model, norm_eps=value)
    with pytest.raises(UserError, match=r"recipe.model.norm_eps=.* is not plain data"):
        run_id(replace(recipe, model=model))


# -- names -------------------------------------------------------------------------------------------------------------
def test_a_name_is_always_a_file_name(read):
    roles = ("embedding", "hidden", "readout", "vector", "gate")
    rates = {f"optim.chains.{role}.lr": 0.123456789 + i for i, role in enumerate(roles)}
    long = read(rates).name
    assert len(long) < 100
    assert long.startswith("sheet@")
    assert "/" not in read({"data.digest": "a/b"}).name


def test_a_recipe_has_one_name_however_its_numbers_are_written(read):
    by_float = read({"budget.tokens": 2e4}).name
    by_int = read({"budget.tokens": 20000}).name
    assert by_float == by_int == "sheet@budget.tokens=20000"


# -- data and configs --------------------------------------------------------------------------------------------------
def test_other_data_is_not_held_to_the_digest_of_the_config():
    def digest_with(overrides):
        experiment = load("quickstart", overrides, lambda data: f"digest of {data}")
        return experiment.base.data.digest

    assert digest_with({}) == "f1114b0699edd867"
    assert digest_with({"data.name": "mine"}) == "digest of mine"
    assert digest_with({"data.name": "mine", "data.digest": "given"}) == "given"


def test_a_mix_has_the_digest_of_its_sources_and_its_weights_are_leaves():
    def loaded(overrides):
        return load("quickstart", overrides, lambda data: f"digest of {data}").base

    mix = {"data.mix": {"web": 3.0, "code": 1.0}}
    data = Data("any", mix={"web": 1.0, "code": 1.0})
    expected = digest_of_data(data, lambda source: f"digest of {source}")
    assert loaded(mix).data.digest == expected
    more = loaded(mix | {"data.mix.code": 2.0})
    assert (more.data.digest, more.data.mix) == (expected, {"web": 3.0, "code": 2.0})
    assert run_id(more) != run_id(loaded(mix))
    with pytest.raises(UserError, match=r"unknown path 'data\.mix\.kode'"):
        loaded(mix | {"data.mix.kode": 2.0})


def test_data_named_in_the_file_is_not_held_to_the_digest_of_the_config_either(read):
    def digest_with(paths):
        experiment = read(base=["base", "size/tiny", "data/embedded"], set=paths)
        return experiment.base.data.digest

    assert digest_with({"data.name": "mine"}) == ZEROS
    assert digest_with({"data.name": "mine", "data.digest": "given"}) == "given"


def test_a_config_beside_the_file_comes_before_a_shipped_one(lab, read):
    def width():
        return read(base=["base", "mini", "size/tiny"]).base.model.width

    (lab.root / "size").mkdir(exist_ok=True)
    own = lab.root / "size" / "tiny.yaml"
    own.write_text("model: {width: 48}\n")
    assert width() == 48
    own.unlink()
    assert width() == 64


def test_a_later_config_replaces_a_part_of_another_kind_and_merges_one_of_the_same(lab, read):
    (lab.root / "flat.yaml").write_text("schedule: {kind: constant}\n")
    (lab.root / "low.yaml").write_text("schedule: {kind: cosine, floor: 0.5}\n")
    flat = read(base=["base", "mini", "flat"]).base.schedule
    low = read(base=["base", "mini", "low"]).base.schedule
    assert flat.kind == "constant"
    assert low.floor == 0.5
    assert low.warmup_steps == 3  # mini's


# -- which cells -------------------------------------------------------------------------------------------------------
def test_a_pattern_chooses_what_a_shell_would_and_a_word_what_stands_in_the_name(read):
    experiment = read(arms=["muon", "normuon", "qk_norm"])
    runs = experiment.runs([0])
    assert cells_of(chosen(runs, ["normuon"])) == ["- muon (and normuon)", "- normuon"]
    assert cells_of(chosen(runs, ["- *", "!*muon*"])) == ["- qk_norm"]
    assert chosen(runs, []) == runs
    for pattern in ("norm", "!norm", "FULL"):
        with pytest.raises(UserError, match="fits no cell"):
            chosen(runs, [pattern])


# -- the plan ----------------------------------------------------------------------------------------------------------
def merged(experiment, seeds, *more):
    return merged_plan(experiment, experiment.runs(seeds), *more)


def noted(plan) -> dict[str, str]:
    return {row.cell: row.note for row in plan.rows if row.note}


def test_a_plan_keeps_earlier_seeds_while_their_recipes_are_the_same(read):
    experiment = read()
    old = merged(experiment, [0, 5], None)
    again = merged(experiment, [0, 1], old)
    assert pairs_of(again.rows) == [0] * 4 + [1] * 4 + [5] * 4
    other = merged(read(set={"optim.lr": 0.5}), [0, 1], old)
    assert set(pairs_of(other.rows)) == {0, 1}  # seed 5 was of another recipe


def test_a_plan_keeps_earlier_seeds_of_the_cells_that_it_still_has(read):
    old = merged(read(), [0, 5], None)
    fewer = read(arms=["qk_norm"])
    rows = merged(fewer, [0], old).rows
    assert set(cells_of(rows)) == {"full", "base", "- qk_norm"}
    earlier = [row for row in rows if row.pair == 5]
    assert cells_of(earlier) == ["base"]


def test_a_plan_remembers_what_was_found_inert_until_it_is_asked_again(read):
    experiment = read()
    first = merged(experiment, [0], None, {"- qk_norm": "full"})
    assert noted(first) == {"- qk_norm": "inert: no difference from full in the liveness check"}
    again = merged(experiment, [0], first, {"base": "full"})
    assert set(noted(again)) == {"- qk_norm", "base"}
    alive = merged(experiment, [0], again, {"- qk_norm": ""})
    assert set(noted(alive)) == {"base"}


def test_a_plan_of_thousands_merges_in_a_time_that_grows_with_its_length(read):
    """Twice the rows, about twice the calls: counted, not timed."""
    experiment = read()

    def calls(seeds: int) -> int:
        old = merged(experiment, range(seeds), None)
        runs = experiment.runs([0])
        profile = cProfile.Profile()
        profile.runcall(merged_plan, experiment, runs, old)
        return pstats.Stats(profile).total_calls

    assert calls(200) < 2.2 * calls(100)


def test_what_a_tracker_shows_names_the_toggles_the_dials_and_what_differs(read):
    gating = {"gating": {"per": "elementwise"}}
    experiment = read(arms=["qk_norm", gating])
    [run] = chosen(experiment.runs([3]), ["- qk_norm"])
    shown = experiment.params(run)
    assert shown["with.qk_norm"] is False
    assert shown["with.gating"] is True
    assert shown["seed"] == 3
    assert shown["model.width"] == 16
    assert shown["model.attention.on_heads.gating.per"] == "elementwise"
    assert not any("qk_norm." in name for name in shown)
    assert json.dumps(shown)
