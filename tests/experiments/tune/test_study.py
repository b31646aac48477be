"""Studies with the real runner on tiny runs, and what is refused before anything runs."""

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from ablab.core.data.corpus import load_meta
from ablab.core.errors import UserError
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FINISHED, PRUNED
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.run.runner import execute
from ablab.experiments.tune import study as studies
from ablab.experiments.tune.confirmation import confirm
from ablab.experiments.tune.pruning import Past
from ablab.experiments.tune.study import Study

sys.path.append(str(Path(__file__).parent))
import valley  # noqa: E402

TWO_STAGES = [
    {"name": "early", "set": {"budget.tokens": 1280}},
    {"name": "late", "set": {"budget.tokens": 640, "optim.lr": 0.002}},
]

COMPLETE, FAIL = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL
GATED = {
    "with": [{"gating": {"per": "head"}}],
    "design": "add_one",
    "seeds": [0],
    "runtime": {"evaluations": 2},
}
SPACE = {
    "optim.lr": {"log": [1e-4, 4e-4]},
    "with.gating.per": {"choices": ["head", "elementwise"]},
}
BLOCK = {
    "space": SPACE,
    "sampler": "tpe",
    "trials_per_cell": 4,
    "generation": 2,
    "hard": {"optim.lr": [0.0001, 0.0012]},
    "widenings": 3,
}


def watcher():
    said: list[str] = []
    quiet = lambda *_: None  # noqa: E731
    return SimpleNamespace(
        planned=quiet,
        started=quiet,
        logged=quiet,
        finished=quiet,
        arms=quiet,
        note=quiet,
        say=said.append,
        said=said,
    )


def study(lab, name="study", block=BLOCK, **keys):
    return Study(asked(lab, name, **(GATED | keys), study=block), Store(lab.store), watcher())


def asked(lab, name, **keys):
    """The experiment of a sheet with these keys."""
    path = lab.root / lab.sheet(name, **keys)
    return load(str(path), {}, lambda data: load_meta(lab.store / "data" / data).digest)


def content(held):
    return [shown(search, one) for search in held.searches for one in search.stored]


def shown(search, trial):
    attrs = dict(trial.user_attrs)
    told = attrs["told"] | {"seconds": None}
    return (
        search.name,
        trial.number,
        trial.state,
        trial.params,
        trial.value,
        attrs["state"],
        told,
    )


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(studies, "Pool", None)


@pytest.fixture(scope="module")
def tuned(lab):
    """Two cells, a dose that only one of them has, a range whose upper edge wins; tuned and confirmed by one worker."""
    held = study(lab)
    record = held.tune(1, (), ())
    confirm(held.experiment, held.store, held.watcher, record, 1, (), ())
    return held, record


# -- a study, end to end -----------------------------------------------------------------------------------------------
def test_each_trial_is_a_run_whose_final_metric_is_its_value(lab, tuned):
    _, record = tuned
    assert [trial.state for trial in record.trials] == ["complete"] * len(record.trials)
    for trial in record.trials:
        (run,) = trial.runs
        result = Record(lab.store / "runs" / run).result()
        assert result.status == FINISHED
        assert result.metrics["val/loss"] == trial.value
        assert trial.values == {"100": trial.value}


def test_a_dose_is_searched_only_in_cells_that_have_the_intervention(lab, tuned):
    _, record = tuned
    assert set(record.cells) == {"base", "+ gating"}
    base, gated = record.cells["base"], record.cells["+ gating"]
    assert all(set(trial.params) == {"optim.lr"} for trial in base)
    assert all(set(trial.params) == {"optim.lr", "with.gating.per"} for trial in gated)
    assert {trial.params["with.gating.per"] for trial in gated} == {"head", "elementwise"}
    for trial in gated:
        recipe = (lab.store / "runs" / trial.runs[0] / "recipe.yaml").read_text()
        assert f"per: {trial.params['with.gating.per']}" in recipe


def test_an_edge_that_wins_is_widened_within_the_hard_bounds_and_then_called_inadmissible(
    lab, tuned
):
    """The rate at which this model stops improving lies far above; so every widening wins until the bound."""
    held, record = tuned
    base = [trial.params["optim.lr"] for trial in record.cells["base"]]
    even, widened = base[:4], base[4:]
    assert even == [1e-4, 1.587e-4, 2.52e-4, 4e-4]
    assert 1 <= len(widened) <= 3
    assert widened == sorted(widened)
    assert widened[0] > 4e-4
    assert widened[-1] == 1.2e-3
    wrong = "base: its best setting says nothing yet (inadmissible): "
    why = "lr=0.0012 won, but it is the edge of the hard bounds"
    assert any(wrong + why in line for line in held.watcher.said)


def test_the_winners_are_confirmed_on_other_seeds_beside_the_shared_values(lab, tuned):
    held, record = tuned
    shared = held.store.read_plan("study").rows
    best = held.store.read_plan("study@tuned").rows
    for rows in (shared, best):
        assert [(row.cell, row.seed) for row in rows] == [("base", 0), ("+ gating", 0)]
        assert [row.reference for row in rows] == [None, "base"]
        for row in rows:
            assert held.store.run(row.run).result().status == FINISHED
    for row in best:
        won = min(record.cells[row.cell], key=lambda trial: trial.value)
        recipe = (lab.store / "runs" / row.run / "recipe.yaml").read_text()
        assert f"lr: {won.params['optim.lr']}" in recipe
    searched = {run for trial in record.trials for run in trial.runs}
    assert not searched & {row.run for row in best}


def test_a_second_call_trains_nothing_and_adds_nothing(lab, tuned, no_training):
    held, record = tuned
    before = files_of_runs(lab)
    again = study(lab)
    assert again.tune(1, (), ()) == record
    assert content(again) == content(held)
    assert files_of_runs(lab) == before


def test_what_is_asked_of_trials_that_have_ended_and_cannot_be_had_is_said_once(
    lab, tuned, no_training
):
    again = study(lab, runtime={"keep_weights": True})
    again.tune(1, (), ())
    [line] = again.watcher.said
    assert "runtime.keep_weights=True is asked, but" in line
    assert "of the runs ended with False and are kept" in line


def files_of_runs(lab):
    return {name: stat for name, stat in lab.files().items() if name.startswith("runs/")}


def test_trials_whose_runs_exist_cost_nothing(lab, tuned, no_training):
    _, record = tuned
    known = {trial.params["optim.lr"]: trial.value for trial in record.cells["base"][:4]}
    block = {"space": {"optim.lr": {"choices": list(known)}}, "sampler": "grid"}
    found = study(lab, "other", block, **{"with": []}).tune(1, (), ())
    assert {trial.params["optim.lr"]: trial.value for trial in found.trials} == known


@pytest.mark.slow
def test_two_workers_find_the_same_trials_and_values(new_lab, tuned):
    other = study(new_lab())
    other.tune(2, (), ())
    assert content(other) == content(tuned[0])


def test_the_plan_of_a_study_holds_every_trial_with_its_tags(tuned):
    held, record = tuned
    rows = held.store.read_plan("study@study").rows
    assert [(row.cell, row.run) for row in rows] == [
        (trial.cell, run) for trial in record.trials for run in trial.runs
    ]
    params = [(row.params["optim.lr"], row.params["seed"]) for row in rows]
    assert params == [(trial.params["optim.lr"], 100) for trial in record.trials]
    assert [row.tags for row in rows] == [
        {
            "ablab.study": "study",
            "ablab.trial": str(trial.number),
            "ablab.trial_state": "complete",
        }
        for trial in record.trials
    ]


# -- what can become of a trial ----------------------------------------------------------------------------------------
def test_two_seeds_make_one_trial_with_their_mean_and_a_diverged_one_is_stored_as_failed_with_its_reason(
    lab,
):
    block = {
        "space": {"optim.lr": {"choices": [0.01, 1e30]}},
        "sampler": "grid",
        "seeds": [100, 101],
    }
    held = study(lab, "wild", block, **{"with": []})
    record = held.tune(1, (), ())
    assert [trial.state for trial in record.trials] == ["complete", "diverged"]
    fine, wild = held.searches[0].stored

    told = fine.user_attrs["told"]
    values = [held.store.run(run).result().metrics["val/loss"] for run in told["runs"]]
    assert len(set(values)) == 2
    assert (fine.state, fine.value) == (COMPLETE, sum(values) / 2)
    assert told["values"] == {"100": values[0], "101": values[1]}
    assert "error" not in told

    told = wild.user_attrs["told"]
    results = [held.store.run(run).result() for run in told["runs"]]
    assert [result.status for result in results] == [DIVERGED] * 2
    assert (wild.state, wild.value, wild.user_attrs["state"]) == (FAIL, None, "diverged")
    assert told["error"] == results[0].error != ""


@pytest.mark.slow
def test_a_pruned_run_ends_early_and_a_grid_that_asks_for_it_finishes_it_to_the_same_bits(
    lab, write_token_folder
):
    from ablab.core.train.run import run as train

    data = write_token_folder(lab.store / "data" / "long", train=20_000)
    paths = {"data.name": "long", "budget.tokens": 19_200}  # 300 steps
    sheet = {"with": [], "set": paths, "runtime": {"evaluations": 10, "log_every": 10}}
    rates = [0.004, 0.005, 0.006, 0.007, 1e-7]
    block = {
        "space": {"optim.lr": {"choices": rates}},
        "sampler": "grid",
        "pruner": "median",
        "generation": 4,
    }
    held = study(lab, "cut", block, **sheet)
    *fine, bad = held.tune(1, (), ()).trials
    assert [trial.state for trial in fine] == ["complete"] * 4
    frozen = held.searches[0].stored[4]
    assert (bad.state, frozen.state.name, frozen.value) == ("pruned", "PRUNED", None)
    assert list(frozen.intermediate_values) == [30]
    assert frozen.user_attrs["told"]["error"] == "pruned at step 30"
    record = held.store.run(bad.runs[0])
    result = record.result()
    assert result.status == PRUNED
    assert 30 <= result.step < 300
    assert list((record.folder / "checkpoints").iterdir())

    grid = replace(
        held.experiment, name="grid", sheet=replace(held.experiment.sheet, study=None)
    )
    base = replace(grid.base, optim=replace(grid.base.optim, lr=1e-7))
    grid = replace(grid, stages=[replace(grid.stages[0], base=base)])
    runs = grid.runs([100])
    execute(grid, held.store, runs, watcher(), 1, tracked=())
    (wanted,) = runs
    assert wanted.id == bad.runs[0]
    assert record.result().status == FINISHED
    assert not (record.folder / "checkpoints").exists()
    whole = Record(lab.root / "whole")
    train(wanted.recipe, grid.sheet.runtime, data, whole, warn=lambda line: None)
    assert record.result().weights == whole.result().weights
    assert record.metrics_path.read_bytes() == whole.metrics_path.read_bytes()


# -- pruning -----------------------------------------------------------------------------------------------------------
def past(count: int, pruner: str):
    """The Past of a cell, and its `count` finished trials, whose curves fall from 4 to their value."""
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    trials = []
    for i in range(count):
        value = 3 + (7 * i % 10) / 10
        curve = {step: value + (20 - step) * 0.05 for step in EVALUATIONS}
        trial = optuna.trial.create_trial(
            params={"x": 0.5}, distributions=space, value=value, intermediate_values=curve
        )
        trials.append(trial)
    return Past(pruner, "minimize", steps=20, evaluations=4), trials


EVALUATIONS = (5, 10, 15, 20)
BAD = dict.fromkeys(EVALUATIONS, 9.0)
GOOD = dict.fromkeys(EVALUATIONS, 1.0)


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_a_curve_above_all_others_is_stopped_and_one_below_is_not(pruner):
    arm, trials = past(12, pruner)
    numbers = range(12, 24)
    stopped = []
    for number in numbers:
        assert arm.referee(trials, number).verdict(GOOD) is None
        if step := arm.referee(trials, number).verdict(BAD):
            stopped.append(step)
    assert stopped
    assert set(stopped) <= {5, 10, 15}
    if pruner != "hyperband":
        assert len(stopped) == len(numbers)


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_a_verdict_is_the_same_from_a_fresh_replay_and_however_the_curve_arrives(pruner):
    arm, trials = past(12, pruner)
    middle = {5: 3.9, 10: 3.8, 15: 3.75, 20: 3.7}
    for number in range(12, 16):
        grown, others = past(12, pruner)
        for count in (2, 7, 12):
            grown.of(trials[:count])
        referee = grown.referee(trials, number)
        for count in (1, 1, 2, 3, 4):
            verdict = referee.verdict(dict(islice(middle.items(), count)))
        assert verdict == arm.referee(trials, number).verdict(middle)


def test_peers_of_a_generation_do_not_see_each_other():
    arm, trials = past(12, "asha")
    alone = arm.referee(trials, 13).verdict(BAD)
    peer = arm.referee(trials, 12)
    peer.verdict({step: 20.0 for step in (5, 10, 15)})
    assert arm.referee(trials, 13).verdict(BAD) == alone
    assert len(arm.of(trials)) == 12


def test_nothing_is_stopped_before_there_is_something_to_compare_with():
    arm, trials = past(3, "median")
    assert arm.referee(trials, 3).verdict(BAD) is None


def test_a_finished_run_is_not_stopped_at_its_last_step():
    arm, trials = past(12, "median")
    assert arm.referee(trials, 12).verdict({20: 99.0}) is None


def test_an_arm_whose_curves_cross_late_is_never_pruned(lab):
    block = {"space": {"optim.lr": {"log": [0.001, 0.1]}}, "pruner": "median"}
    held = study(lab, "late", block, **{"with": ["cautious_wd", "qk_norm"]})
    assert {search.cell.name: search.past is not None for search in held.searches} == {
        "base": True,
        "+ cautious_wd": False,
        "+ qk_norm": True,
    }


# -- bad input, before anything runs -----------------------------------------------------------------------------------
RATES = {"optim.lr": {"log": [0.1, 1]}}
MANY_POINTS = {
    "optim.lr": {"log": [0.1, 1], "points": 1000},
    "optim.clip": {"log": [0.1, 1], "points": 1000},
}


@pytest.mark.parametrize(
    ("block", "keys", "said"),
    [
        (
            {"space": {"optim.lrr": {"log": [0.1, 1]}}},
            {},
            r"unknown path 'optim.lrr': no 'lrr'. Did you mean 'lr'\?",
        ),
        (
            {"space": {"with.gatin.per": {"choices": ["head"]}}},
            {},
            r"unknown path 'with.gatin.per'. Did you mean 'with.gating.per'\?",
        ),
        (
            {"space": {"with.gating.pr": {"choices": ["head"]}}},
            {},
            r"unknown path 'with.gating.pr'. Did you mean 'with.gating.per'\?",
        ),
        (
            {"space": {"with.gating": {"choices": ["head"]}}},
            {},
            "unknown path 'with.gating'. .*Doses of this experiment: with.gating.per",
        ),
        (
            {"space": {"with.muon.momentum": {"uniform": [0.1, 1]}}},
            {"with": []},
            "Doses of this experiment: none",
        ),
        (
            {"space": {"with.gating.per": {"choices": ["head", "tail"]}}},
            {},
            "with.gating.per|per='tail'",
        ),
        (
            {"space": {"with.gating.per": {"choices": ["head"]}}},
            {},
            "cell 'base' has nothing to tune: none of with.gating.per is in it; add a recipe path",
        ),
        ({"space": {"optim.lr": {"log": [1, 0.1]}}}, {}, r"\[1, 0.1\] is empty or inverted"),
        ({"space": {}}, {}, "study.space is empty"),
        (
            {"space": {"seed": {"choices": [1, 2]}}},
            {},
            "seed cannot be searched: each trial runs on study.seeds",
        ),
        (
            {"space": {"data.name": {"choices": ["tiny", "web"]}}},
            {},
            "data.name cannot be searched: all trials of a study read one token folder",
        ),
        (
            {"space": {"model.width": {"choices": [16, 20]}}},
            {},
            r"the corner model.width=20 of cell 'base' cannot be built: model.width=20",
        ),
        (
            {"space": {"model.width": {"int": [16, 32]}}},
            {},
            "the point model.width=17 of cell 'base' cannot be built",
        ),
        (
            {"space": {"model.width": {"choices": [32, 64]}}},
            {},
            r"width=\[32, 64\] lacks 16, the width at which arms are confirmed; add it, or",
        ),
        (
            {"space": RATES, "trials_per_cell": 10**12},
            {},
            "study.trials_per_cell ask for 1,000,000,000,000 trials a cell; at most 100,000",
        ),
        (
            {"space": MANY_POINTS, "sampler": "grid"},
            {},
            "the points of study.space ask for 1,000,000 trials a cell; at most 100,000",
        ),
        (
            {"space": RATES, "seeds": [0]},
            {},
            r"study.seeds and seeds share \[0\]",
        ),
        (
            {"space": RATES, "seeds": []},
            {},
            "must name at least one seed",
        ),
        (
            {"space": RATES, "seeds": [5, 6], "pruner": "median"},
            {},
            "works with one selection seed, not 2",
        ),
        (
            {"space": RATES, "hard": {"optim.rl": [0.01, 2]}},
            {},
            r"'optim.rl' is not searched. Did you mean 'optim.lr'\?",
        ),
        (
            {"space": RATES, "hard": {"optim.lr": [0.2, 2]}},
            {},
            r"around the searched range \[0.1, 1.0\]",
        ),
        (
            {"space": RATES, "hard": {"optim.lr": [0.2]}},
            {},
            r"must be \[low, high\]",
        ),
        (
            {"space": RATES},
            {"stages": TWO_STAGES},
            "optim.lr is set by stage late for itself; search stages.late.optim.lr, or a path",
        ),
        (
            {"space": {"stages.lat.optim.lr": {"log": [0.1, 1]}}},
            {"stages": TWO_STAGES},
            r"no stage 'lat'. Did you mean 'late'\? Stages: early, late",
        ),
        (
            {"space": {"stages.late.optim.lrr": {"log": [0.1, 1]}}},
            {"stages": TWO_STAGES},
            r"unknown path 'optim.lrr': no 'lrr'. Did you mean 'lr'\?",
        ),
        (
            {"space": {"stages.early.data.name": {"choices": ["tiny", "web"]}}},
            {"stages": TWO_STAGES},
            "stages.early.data.name cannot be searched: all trials",
        ),
        (
            {"space": {"stages.early.with.ema.decay": {"uniform": [0.8, 0.9]}}},
            {"stages": [TWO_STAGES[0], TWO_STAGES[1] | {"with": ["ema"]}]},
            "stages.early.with.ema.decay: ema acts in other stages than 'early'",
        ),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    new_lab, block, keys, said
):
    lab = new_lab()
    before = lab.files()
    with pytest.raises(UserError, match=said) as refusal:
        study(lab, "bad", block, **keys)
    assert "\n" not in str(refusal.value) and lab.files() == before


# -- stages ------------------------------------------------------------------------------------------------------------
def test_a_path_of_one_stage_is_searched_over_runs_that_share_the_stage_before(tmp_path):
    """Three rates of the late stage in two arms: the early one is trained once an arm."""
    block = {
        "space": {"stages.late.optim.lr": {"log": [6e-3, 2.4e-2], "points": 3}},
        "sampler": "grid",
    }
    held, record, _ = valley.tune(tmp_path, block, stages=TWO_STAGES, **valley.TWO_CELLS)
    assert len(valley.Formula.trained) == 2 + 6
    assert len(set(valley.Formula.trained)) == 8
    for search in held.searches:
        chains = [
            search._candidate(i, trial.params).runs[0].chain
            for i, trial in enumerate(search.spent())
        ]
        assert len({early.id for early, _ in chains}) == 1
        assert {early.recipe.optim.lr for early, _ in chains} == {
            held.experiment.stages[0].base.optim.lr
        }
        rates = [trial.params["stages.late.optim.lr"] for trial in search.spent()]
        assert [late.recipe.optim.lr for _, late in chains] == rates == [0.006, 0.012, 0.024]
        values = [trial.value for trial in search.spent()]
        assert values == [valley.valley(late.recipe) for _, late in chains]
        best = rates[values.index(min(values))]
        assert best == (0.024 if "qk_norm" in search.cell.treatment else valley.OPTIMUM)
    assert record.base == {"stages.late.optim.lr": 0.002}
    rows = held.plan().rows
    assert [row.params["stages.late.optim.lr"] for row in rows] == [0.006, 0.012, 0.024] * 2


def test_an_experiment_without_a_study_says_what_to_add(lab):
    experiment = asked(lab, "plain")
    with pytest.raises(
        UserError,
        match="has no study: block; add one with a space, or start it with: ablab run .*/plain.yaml",
    ):
        Study(experiment, Store(lab.store), watcher())


def test_the_report_of_a_study_that_confirms_nothing_is_the_studys(lab, ablab):
    study(
        lab,
        "unconfirmed",
        {"space": RATES, "trials_per_cell": 1},
        seeds=[],
    ).tune(1, (), ())
    for name in ("unconfirmed", "unconfirmed.yaml"):
        ended = ablab("report", name)
        assert (
            ended.code == 0
            and "winner" in ended.out
            and "reports/unconfirmed/study.md" in ended.out
        )


def test_a_study_without_a_finished_trial_is_not_confirmed_and_not_reported(lab, no_training):
    from ablab.analysis.pages import study_report

    held = study(lab, "none", {"space": RATES, "hours": 0.0})
    record = held.tune(1, (), ())
    said = (
        r"study 'none' has zero finished trials \(none started\); "
        "continue it with: ablab study .*none.yaml"
    )
    with pytest.raises(UserError, match=said):
        confirm(held.experiment, held.store, held.watcher, record, 1, (), ())
    with pytest.raises(UserError, match=said):
        study_report.read(held.store, "none")
    left = json.loads((lab.store / "studies" / "none.json").read_text())
    assert left["trials"] == []


# -- choices that are few, or words ------------------------------------------------------------------------------------
GATING = {"with": ["gating"], "design": "add_one"}
WORDS = {"with.gating.per": {"choices": ["head", "elementwise"]}}


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random", "qmc"])
@pytest.mark.parametrize(
    "space",
    [
        WORDS | {"model.width": {"choices": [16]}},
        WORDS | {"optim.lr": {"log": [1e-3, 1e-1]}},
        {"model.width": {"choices": [16]}},
        {"model.layers": {"int": [1, 2]}},
    ],
    ids=["words and one", "words and rates", "one", "two numbers"],
)
def test_a_study_of_few_choices_spends_its_trials_and_goes_on(tmp_path, sampler, space):
    block = {"sampler": sampler, "trials_per_cell": 10, "space": space}
    _, record, _ = valley.tune(tmp_path, block, **GATING)
    assert len(record.trials) == 20
    if "with.gating.per" in space:
        words = {one.params.get("with.gating.per") for one in record.trials}
        assert words == {None, "head", "elementwise"}
    if sampler != "qmc":  # all of its points are fixed beforehand
        more, record, _ = valley.tune(tmp_path, block | {"trials_per_cell": 12}, **GATING)
        assert len(record.trials) == 24
