"""In MLflow every trial is a flat run: numbers to sort and plot by, tags to filter by."""

import json
import sys
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from ablab.experiments.track.cards import card_of
from ablab.experiments.track.mlflow_sync import sync
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.saved_views import study_view

sys.path.append(str(Path(__file__).parents[1] / "tune"))
import valley  # noqa: E402

BLOCK = {
    "space": {
        "optim.lr": {"log": [1.5e-3, 2.4e-2], "points": 4},
        "model.width": {"choices": [16, 32, 64]},
    },
    "sampler": "grid",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A grid of 4 rates x 3 widths in two cells, and its MLflow runs."""
    held, record, _ = valley.tune(tmp_path_factory.mktemp("mlflow"), BLOCK, **valley.TWO_CELLS)
    return held, record, made_visible(held)


def made_visible(held):
    sync(held.store, ["valley@study"])
    return MlflowView(held.store).runs("valley@study")


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_every_trial_is_one_flat_run_with_its_study_number_cell_and_state(shown):
    _, record, runs = shown
    tags = [
        {
            key: run.data.tags.get(f"ablab.{key}")
            for key in ("study", "trial", "cell", "trial_state", "run_id")
        }
        for run in runs
    ]
    assert len(tags) == len(record.trials) == 24 and not any(
        "mlflow.parentRunId" in run.data.tags for run in runs
    )
    key = lambda tag: (tag["cell"], int(tag["trial"]))  # noqa: E731
    expected = [
        {
            "study": "valley",
            "trial": str(trial.number),
            "cell": trial.cell,
            "trial_state": trial.state,
            "run_id": trial.runs[0],
        }
        for trial in record.trials
    ]
    assert sorted(tags, key=key) == sorted(expected, key=key)
    assert {tag["trial_state"] for tag in tags} == {"complete", "out_of_memory"}


def test_rate_and_width_are_numbers_and_the_final_metric_is_the_trials_value(shown):
    _, record, runs = shown
    trials = {(trial.cell, str(trial.number)): trial for trial in record.trials}
    for run in runs:
        trial = trials[run.data.tags["ablab.cell"], run.data.tags["ablab.trial"]]
        assert (
            float(run.data.params["optim.lr"]) == trial.params["optim.lr"]
            and int(run.data.params["model.width"]) == trial.params["model.width"]
        )
        assert trial.value is None or run.data.metrics["val/loss"] == trial.value


def test_a_trial_that_another_experiment_trained_shows_its_parameters_seen_from_this_study(
    tmp_path,
):
    block = BLOCK | {"space": {"optim.lr": {"choices": [0.003, 0.006]}}}
    first, _, _ = valley.tune(tmp_path, block, name="first", **valley.TWO_CELLS)
    second, _, _ = valley.tune(tmp_path, block, name="second", **{"with": ["gating"]})
    shared = {row.run for row in first.plan().rows} & {row.run for row in second.plan().rows}
    assert len(shared) == 2  # the base of both
    for held, own, other in ((first, "qk_norm", "gating"), (second, "gating", "qk_norm")):
        for row in held.plan().rows:
            shown = card_of(held.store, held.plan(), row).params
            assert f"with.{own}" in shown
            assert f"with.{other}" not in shown


def test_the_best_rate_at_each_width_can_be_asked_of_mlflow_alone(shown):
    held, record, _ = shown
    view = MlflowView(held.store)
    for width in (16, 32, 64):
        where = (
            f"params.`model.width` = '{width}' and tags.`ablab.cell` = 'base' "
            "and tags.`ablab.trial_state` = 'complete'"
        )
        best = view.client.search_runs(
            [view.experiment("valley@study")],
            where,
            order_by=["metrics.`val/loss` asc"],
            max_results=1,
        )[0]
        found = min(
            (
                t
                for t in record.cells["base"]
                if t.params["model.width"] == width and t.value is not None
            ),
            key=lambda t: t.value,
        )
        assert float(best.data.params["optim.lr"]) == found.params["optim.lr"]


def test_a_second_sync_of_a_study_sends_nothing(shown):
    held, _, runs = shown
    assert sync(held.store, ["valley@study"]) == {
        "added": 0,
        "continued": 0,
        "current": 24,
        "missing": 0,
    }
    assert len(MlflowView(held.store).runs("valley@study")) == len(runs)


# -- the saved view ----------------------------------------------------------------------------------------------------
def test_the_saved_view_of_a_study_charts_every_searched_path(shown):
    held, _, _ = shown
    view = study_view(held.store, held.plan())
    charts = view["compareRunCharts"]
    drawn = [(chart["type"], chart.get("xaxis", {}).get("key")) for chart in charts]
    assert drawn == [
        ("PARALLEL", None),
        ("SCATTER", "optim.lr"),
        ("SCATTER", "model.width"),
        ("CONTOUR", "optim.lr"),
    ]
    assert charts[0]["selectedParams"] == ["model.width", "optim.lr"]
    assert charts[0]["selectedMetrics"] == ["val/loss"]
    assert len({chart["uuid"] for chart in charts}) == 4
    assert len(json.dumps(view)) < 5000  # MLflow's limit of a tag


# What the pages must show: the saved view as charts and as a table, and the page on which runs are compared.
CHARTS = {"Parallel Coordinates", "optim.lr vs. val/loss", "model.width vs. val/loss"}
TABLE = {"optim.lr", "model.width", "0.009524", "out_of_memory"}
COMPARED = {
    "Comparing 12 Runs",
    "Parallel Coordinates Plot",
    "Scatter Plot",
    "optim.lr",
    "model.width",
}


@pytest.mark.slow
def test_the_ui_answers_which_rate_at_which_width(shown, serve, photograph, lacking):
    held, _, runs = shown
    twelve = [run for run in runs if run.data.tags["ablab.cell"] == "base"]
    assert len(twelve) == 12
    view = MlflowView(held.store)
    view.client.set_experiment_tag(
        view.experiment("valley@study"),
        "mlflow.sharedViewState.study",
        json.dumps(study_view(held.store, held.plan())),
    )
    served = serve(held.store.root)
    try:
        link = served.link.replace("ShareKey=arms", "ShareKey=study")
        pages = {
            "study-chart": (link, CHARTS),
            "study-table": (link.replace("=CHART", "=TABLE"), TABLE),
            "study-compare": (compared(served.address, twelve), COMPARED),
        }
        for name, (page, words) in pages.items():
            assert lacking(words, partial(photograph, name, page, least_bytes=40_000)) == set()
    finally:
        served.stop()


def compared(address: str, runs: list) -> str:
    """The compare page of these runs, as a user reaches it by selecting them: parallel coordinates in front."""
    ids = json.dumps([run.info.run_id for run in runs])
    experiments = json.dumps([runs[0].info.experiment_id])
    return f"{address}/#/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}"
