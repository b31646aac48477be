"""In MLflow every trial is a flat run: numbers to sort and plot by, tags to filter by."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from ablab.experiments.track.mlflow_sync import sync
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.saved_views import study_view

sys.path.append(str(Path(__file__).parents[1] / "tune"))
import valley  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += [
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1600,1000",
    "--virtual-time-budget=60000",
]
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


def test_the_best_rate_at_each_width_can_be_asked_of_mlflow_alone(shown):
    held, record, _ = shown
    view = MlflowView(held.store)
    for width in (16, 32, 64):
        where = f"params.`model.width` = '{width}' and tags.`ablab.cell` = 'base' and tags.`ablab.trial_state` = 'complete'"
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


# -- the pictures ------------------------------------------------------------------------------------------------------
class Served:
    """`ablab ui` in a process of its own."""

    def __init__(self, root: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = f"from pathlib import Path; from ablab.experiments.track.ui import serve; serve(Path({str(root)!r}), port={port})"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.address = f"http://127.0.0.1:{port}"
        self.lines = [self.process.stdout.readline(), self.process.stdout.readline()]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=20)


def compared(address: str, runs: list) -> str:
    """The compare page of these runs, as a user reaches it by selecting them: parallel coordinates in front, then the scatter plot."""
    listed = {
        "runs": [run.info.run_id for run in runs],
        "experiments": [runs[0].info.experiment_id],
    }
    return f"{address}/#/compare-runs?" + "&".join(
        f"{key}={quote(json.dumps(ids))}" for key, ids in listed.items()
    )


def test_the_saved_view_of_a_study_charts_every_searched_path(shown):
    held, _, _ = shown
    view = study_view(held.store, held.plan())
    assert [
        (chart["type"], chart.get("xaxis", {}).get("key")) for chart in view["compareRunCharts"]
    ] == [
        ("PARALLEL", None),
        ("SCATTER", "optim.lr"),
        ("SCATTER", "model.width"),
        ("CONTOUR", "optim.lr"),
    ]
    parallel = view["compareRunCharts"][0]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (
        ["model.width", "optim.lr"],
        ["val/loss"],
    )
    assert (
        len({chart["uuid"] for chart in view["compareRunCharts"]}) == 4
        and len(json.dumps(view)) < 5000
    )  # MLflow's limit of a tag


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_ui_answers_which_rate_at_which_width(shown, tmp_path):
    """Look at the pictures: study-chart.png, study-table.png and study-compare.png in $ABLAB_PICTURES, else in pytest's temporary folder."""
    held, _, runs = shown
    twelve = [run for run in runs if run.data.tags["ablab.cell"] == "base"]
    assert len(twelve) == 12
    view = MlflowView(held.store)
    view.client.set_experiment_tag(
        view.experiment("valley@study"),
        "mlflow.sharedViewState.study",
        json.dumps(study_view(held.store, held.plan())),
    )
    served = Served(held.store.root)
    try:
        link = (
            served.lines[1]
            .split(": ", 1)[-1]
            .strip()
            .replace("ShareKey=arms", "ShareKey=study")
        )
        pages = {
            "chart": (
                link,
                ("Parallel Coordinates", "optim.lr vs. val/loss", "model.width vs. val/loss"),
            ),
            "table": (
                link.replace("=CHART", "=TABLE"),
                ("optim.lr", "model.width", "0.009524", "out_of_memory"),
            ),
            "compare": (
                compared(served.address, twelve),
                (
                    "Comparing 12 Runs",
                    "Parallel Coordinates Plot",
                    "Scatter Plot",
                    "optim.lr",
                    "model.width",
                ),
            ),
        }
        assert {
            name: lacks(page, words, f"study-{name}", tmp_path)
            for name, (page, words) in pages.items()
        } == dict.fromkeys(pages, [])
    finally:
        served.stop()


def lacks(page: str, words: tuple[str, ...], name: str, folder: Path) -> list[str]:
    """The words that the page does not show.  A busy machine loads its tables late, so look up to three times."""
    for _ in range(3):
        html = pictured(page, name, folder)
        if not (absent := [word for word in words if word not in html]):
            return []
    return absent


def pictured(page: str, name: str, folder: Path) -> str:
    """Photograph a page; returns what it says."""
    picture = Path(os.environ.get("ABLAB_PICTURES", folder)) / f"{name}.png"
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / 'chromium'}",
        f"--screenshot={picture}",
        "--dump-dom",
        page,
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert picture.stat().st_size > 40_000
    return said
