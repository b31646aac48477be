"""Arms that a sheet writes out, from the command to the report; and what a new name or metric trains: nothing."""

import pytest

HOT = {"name": "hot", "set": {"optim.lr": 0.02}}
SHEET = {
    "arms": ["qk_norm"],
    "design": "arms",
    "seeds": [0],
    "written": [HOT, {"name": "same"}],
}
QUICK = ("--no-mlflow", "--jobs", "1")


@pytest.fixture(scope="module")
def first(lab):
    ended = lab.run("run", lab.sheet("own", **SHEET), *QUICK, "--json")
    assert ended.code == 0, ended.err
    return ended


def test_an_arm_trains_what_it_sets_and_one_that_changes_nothing_is_inert(lab, first):
    base, hot = (lab.result("own", cell) for cell in ("base", "hot"))
    assert sorted(first.trained) == sorted([base["run"], hot["run"]])
    assert base["weights"] != hot["weights"]
    assert first.json["outcome"]["inert"] == {"same": "base"}
    assert "base and same are one recipe: the same runs answer them" in first.err
    recipe = (lab.run_folder(hot["run"]) / "recipe.yaml").read_text()
    assert "lr: 0.02" in recipe


def test_the_report_names_each_arm_and_what_stands_there_without_it(first, ablab):
    effects = {
        one["cell"]: one for one in ablab("report", "own.yaml", "--json").json["effects"]
    }
    assert list(effects) == ["base", "hot", "same"]
    assert effects["hot"]["off"] == "without optim.lr=0.02"
    assert effects["hot"]["reference"] == "base"
    assert effects["same"]["verdict"] == "inert"


def test_arms_are_chosen_explained_and_shown_by_their_names(lab, first, ablab):
    chosen = ablab("run", "own.yaml", "--only", "hot", "--dry-run", "--json").json
    assert [(row["cell"], row["state"]) for row in chosen["rows"]] == [("hot", "finished")]
    assert "it is reused" in ablab("why", "own.yaml", "hot").out
    shown = ablab("show", "own.yaml", "--cell", "hot", "--diff", "base").out
    assert "optim.lr: " in shown and "-> 0.02" in shown and "qk_norm" not in shown


def test_another_metric_under_a_name_of_its_own_retrains_nothing_and_replaces_nothing(
    lab, first, ablab
):
    plan = (lab.store / "experiments" / "own.json").read_bytes()
    words = ("own.yaml", "name=mine", "metric.name=train/loss", "question=Which trains?")
    ended = ablab("run", *words, *QUICK, "--json")
    assert ended.code == 0, ended.err
    assert ended.trained == []
    told = ablab("report", "mine", "--json").json
    assert (told["question"], told["metric"]["name"]) == ("Which trains?", "train/loss")
    measured = {one["cell"]: one["mean"] for one in told["effects"]}
    assert measured["hot"] == lab.result("mine", "hot")["metrics"]["train/loss"]
    assert (lab.store / "experiments" / "own.json").read_bytes() == plan
    by_its_name = ablab("run", "mine", "--dry-run")
    assert by_its_name.code == 2
    again = "ablab run own.yaml metric.name=train/loss name=mine 'question=Which trains?'"
    assert by_its_name.err.endswith(f"it was asked for as: {again}\n")
    clash = ablab("run", "own.yaml", "name=mine", "optim.lr=0.5", *QUICK)
    assert clash.code == 2
    assert "was asked for with other words: ablab run own.yaml" in clash.err


@pytest.mark.parametrize("metric", ["tokens_per_second", "seconds", "optim/lr"])
def test_every_kind_of_metric_has_a_report_and_a_page(lab, first, ablab, metric):
    better = ["metric.better=lower"] if metric == "optim/lr" else []
    ended = ablab("run", "own.yaml", f"metric.name={metric}", *better, *QUICK)
    assert ended.code == 0, ended.err
    name = "@".join(["own", *better, f"metric.name={metric.replace('/', '_')}"])
    page = (lab.store / "reports" / name / "report.html").read_text()
    assert f"{metric}, " in page
    assert "is no mean over held-out tokens" in page


def test_arms_of_other_data_are_let_through_though_random_tokens_show_no_difference(
    lab, write_token_folder
):
    from ablab.core.store.store import Store
    from ablab.experiments.plan.experiment import load
    from ablab.experiments.run.gate import Gate

    arm = {"name": "other", "set": {"data.name": "elsewhere"}}
    lab.sheet("data", **{**SHEET, "written": [arm, HOT]})
    experiment = load(str(lab.root / "data.yaml"), {}, lambda data: f"{len(data):016}")
    runs = experiment.runs([0])
    gate = Gate(
        experiment, Store(lab.store), runs, lambda inert: None, experiment.sheet.runtime
    )
    assert set(gate.reference_of) == {"hot"}
