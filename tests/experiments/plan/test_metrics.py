"""What an experiment may be judged by, and how that, its ideas, question and name are overridden."""

import pytest

from ablab.core.errors import UserError
from ablab.core.store.metrics import LOGGED, MEASURED, known
from ablab.core.store.planned import command
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import grid_plan_of

ZEROS = "0" * 16


@pytest.fixture(scope="module")
def read(lab):
    def of(overrides={}, name="sheet", **keys):
        path = lab.root / lab.sheet(name, **keys)
        return load(str(path), overrides, lambda data: ZEROS)

    return of


def ids(experiment) -> dict[str, str]:
    return {run.cell: run.id for run in experiment.runs([0])}


def test_the_direction_of_a_known_metric_need_not_be_said(read):
    for name, about in {**LOGGED, **MEASURED}.items():
        if about.better:
            assert read(metric={"name": name}).sheet.metric.better == about.better
        else:
            for better in ("lower", "higher"):
                told = read(metric={"name": name, "better": better}).sheet.metric
                assert told.better == better
    asked = {"core": "bundle", "blimp": "pairs", "bpb": "val.jsonl"}
    ways = {"eval/core": "higher", "eval/blimp/wh_island": "higher", "eval/bpb/sea": "lower"}
    for name, better in ways.items():
        sheet = read(metric={"name": name}, evaluate=asked).sheet
        assert sheet.metric.better == better


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("eval/core", "higher"),
        ("eval/core@100/arc_easy", "higher"),
        ("eval/core_20_of_22@100", "higher"),
        ("eval/blimp", "higher"),
        ("eval/bpb/web", "lower"),
        ("eval/corer", None),
        ("train/grad_norm", None),
        ("layer/3/loss", "lower"),
    ],
)
def test_the_direction_of_an_evaluation_is_that_of_its_suite(name, better):
    assert known(name).better == better


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (
            {"name": "val/loss", "better": "higher"},
            "metric.better=higher contradicts val/loss, of which lower is better",
        ),
        (
            {"name": "tokens_per_second", "better": "lower"},
            "metric.better=lower contradicts tokens_per_second",
        ),
        (
            {"name": "train/grad_norm"},
            "metric train/grad_norm: which way is better is not known",
        ),
        ({"name": "val/los"}, "Did you mean 'val/loss'?"),
        (
            {"name": "optim/grad_norm", "better": "lower"},
            "metric.name='optim/grad_norm' is nothing that these runs leave. "
            "Did you mean 'train/grad_norm'? They leave: val/bits_per_byte, val/loss",
        ),
        ({"name": "val/bits_per_byte/web"}, "is nothing that these runs leave"),
        ({"name": 3}, "metric.name=3 must be a word"),
        ({"name": "eval/core"}, "say on what: evaluate: {core: PATH}"),
        ({"name": "eval/cores", "better": "higher"}, "known: eval/core, eval/blimp, eval/bpb"),
    ],
)
def test_a_metric_that_cannot_judge_is_refused_before_anything_runs(read, metric, said):
    with pytest.raises(UserError) as refusal:
        read(metric=metric)
    assert said in str(refusal.value)


def test_weights_before_averaging_are_judged_where_every_arm_averages(read):
    raw = {"name": "raw/val/loss"}
    with pytest.raises(
        UserError, match="left by runs with an average such as ema alone, not by"
    ):
        read(metric=raw, arms=["ema"])
    averaging = read(metric=raw, arms=["ema"], design="single")
    assert averaging.sheet.metric.better == "lower"


def test_a_source_of_a_mix_is_a_metric(read):
    mixed = {"data.mix": {"tiny": 1.0, "other": 2.0}, "data.name": "both"}
    metric = {"name": "val/bits_per_byte/other"}
    assert read(metric=metric, set=mixed).sheet.metric.better == "lower"


def test_a_pruner_needs_what_evaluations_log(read):
    study = {"space": {"optim.lr": {"log": [1e-3, 1e-2]}}, "pruner": "median"}
    with pytest.raises(UserError, match="study.pruner=median judges by what every evaluation"):
        read(metric={"name": "train/loss"}, study=study)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"metric.name": "train/loss"}, "sheet@metric.name=train_loss"),
        ({"question": "Why?"}, "sheet@question=Why?"),
        ({"name": "mine"}, "mine"),
        ({"name": "mine", "metric.name": "train/loss"}, "mine"),
    ],
)
def test_another_metric_question_or_name_is_another_experiment_of_the_same_runs(
    read, overrides, name
):
    usual = read()
    other = read(overrides)
    assert other.name == name
    assert ids(other) == ids(usual)


def test_other_interventions_keep_the_runs_that_they_share(read):
    usual = read()
    other = read({"with": ["qk_norm"]})
    assert other.name == "sheet@with=['qk_norm']"
    assert ids(other)["base"] == ids(usual)["base"]
    assert ids(other)["full"] == ids(usual)["- value_residual"]


def test_the_direction_of_the_file_is_that_of_the_metric_which_it_names(read):
    told = read(
        {"metric.name": "tokens_per_second"}, metric={"name": "val/loss", "better": "lower"}
    )
    assert told.sheet.metric.better == "higher"


def test_a_list_given_for_a_dose_makes_an_arm_of_each(read):
    experiment = read({"with.qk_norm.scale": [1, 2]}, design="add_one")
    names = [cell.name for cell in experiment.cells]
    assert names == ["base", "+ qk_norm scale=1", "+ qk_norm scale=2", "+ value_residual"]


def test_a_name_goes_with_what_was_asked_for_and_with_nothing_else(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "store")
    first = read({"name": "mine", "metric.name": "train/loss"})
    plan = grid_plan_of(first, first.runs())
    store.write_plan(plan)
    store.write_plan(plan)
    again = command(plan.name, sheet=plan.sheet, asked=plan.asked)
    assert again.endswith("sheet.yaml metric.name=train/loss name=mine")
    other = read({"name": "mine", "optim.lr": 0.5})
    with pytest.raises(
        UserError, match="was asked for with other words: ablab run .*train/loss"
    ):
        store.write_plan(grid_plan_of(other, other.runs()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quickstart", "name=quickstart is that of a shipped experiment"),
        ("a/b", "name='a/b' cannot name an experiment"),
        ("-x", "name='-x' cannot name an experiment"),
        ("sheet", "name=sheet is its name already"),
        (3, "name=3 must be a word"),
    ],
)
def test_a_name_that_would_replace_another_or_name_no_file_is_refused(read, name, said):
    with pytest.raises(UserError) as refusal:
        read({"name": name})
    assert said in str(refusal.value)


def test_a_sheet_may_name_itself(lab):
    path = lab.root / "file.yaml"
    path.write_text("question: Why?\nname: mine\nbase: [base, mini]\nwith: [qk_norm]\n")
    assert load(str(path), {}, lambda data: ZEROS).name == "mine"
