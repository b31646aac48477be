"""An MLflow server that stands still, at each request of a run and of its report.

It may have received the request or not, may do it late or twice; whoever asked was told nothing.  Whatever happened,
the next `ablab sync` leaves what an undisturbed view shows: no twin, no point twice, no run that never ends.
"""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.track.cards import card_of, summary_of
from ablab.experiments.track.mlflow_home import database
from ablab.experiments.track.mlflow_sync import sync
from ablab.experiments.track.mlflow_tracker import MlflowTracker
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.summary import NAME as REPORT

RUN = "0123456789abcdef"
WRITES = (
    *("create_experiment", "create_run", "update_run", "set_terminated"),
    *("log_batch", "log_inputs", "log_artifact", "set_tag"),
)
Request = Callable[[], Any]


class StoodStill(OSError):
    """No answer came in time."""


class Unsure:
    """MLflow's client, of whose writing requests one, the `at`-th, meets a fate."""

    def __init__(self, client: Any, at: int, fate: "Callable[[Unsure, Request], Any]"):
        self.client = client
        self.at = at
        self.fate = fate
        self.asked: list[str] = []
        self.late: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        return partial(self._write, name, method) if name in WRITES else method

    def _write(self, name: str, method: Callable, *arguments: Any, **named: Any) -> Any:
        self.asked.append(name)
        request = partial(method, *arguments, **named)
        if len(self.asked) - 1 == self.at:
            return self.fate(self, request)
        return request()


def never_done(server: Unsure, request: Request) -> Any:
    raise StoodStill


def done_unanswered(server: Unsure, request: Request) -> Any:
    request()
    raise StoodStill


def sent_again_and_done_twice(server: Unsure, request: Request) -> Any:
    request()
    return request()


def done_twice_late(server: Unsure, request: Request) -> Any:
    """After the command that asked, which asked again in vain, and after the next one."""
    server.late = [request, request]
    raise StoodStill


FATES = (never_done, done_unanswered, sent_again_and_done_twice, done_twice_late)


# -- one run, shown by each of many experiments ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def store(tmp_path_factory, migrated) -> Store:
    root = tmp_path_factory.mktemp("unsure")
    shutil.copy(migrated[0], root / "mlflow.db")
    store = Store(root)
    record = store.run(RUN)
    record.folder.mkdir(parents=True)
    record.recipe_path.write_text("data: {name: web, digest: 0123abcd}\n")
    record.about_path.write_text('{"started": 1.7e9, "params": {"optim.lr": 0.01}}')
    for step in range(1, 5):
        record.log(step, {"tokens": 10 * step, "train/loss": 3 / step}, {"seconds": 0.5 * step})
    record.finish(Result(RUN, FINISHED, 4, 40, {"val/loss": 1.0}, 2.0, 20.0))
    return store


def plan_of(store: Store, name: str) -> GridPlan:
    plan = GridPlan(name, "?", "val/loss", "lower", "replicate", [Planned("base", 0, 0, RUN)])
    store.write_plan(plan)
    report = store.root / "reports" / name
    report.mkdir(parents=True)
    for page in ("report.html", "report.md"):
        (report / page).write_text("It helps.")
    return plan


def show(store: Store, plan: GridPlan, view: MlflowView) -> None:
    """As while it trains, and at the end of its command."""
    record = store.run(RUN)
    tracker = MlflowTracker(view)
    tracker.open(card_of(store, plan, plan.rows[0]))
    for line in record.metrics():
        step = int(line.pop("step"))
        tracker.log(step, line, 0.5 * step)
        if step == 2:
            tracker.flush()
    result = record.result()
    tracker.close(result.status, summary_of(result))
    with suppress(UserError):
        if not view.lost:
            sync(store, [plan.name], view=view)


def shown(store: Store, name: str) -> list[dict]:
    """The runs of an experiment that are not retired, with all that is known of them but random ids."""
    with sqlite3.connect(database(store.root)) as base:
        runs = base.execute(
            "select run_uuid, runs.name, status, start_time, end_time, artifact_uri from runs "
            "join experiments using (experiment_id) "
            "where experiments.name = ? and runs.lifecycle_stage = 'active' order by runs.name",
            [f"ablab/{name}"],
        ).fetchall()
        return [_told(base, name, *run) for run in runs]


def _told(base: sqlite3.Connection, name: str, id: str, *about: Any) -> dict:
    *about, artifacts = about
    told = {
        "about": about
        if about[0] != REPORT
        else about[:2],  # a report is dated when it is shown
        "files": sorted(
            path.name for path in Path(artifacts.removeprefix("file://")).iterdir()
        ),
    }
    for table, columns in {
        "tags": "key, value",
        "params": "key, value",
        "metrics": "key, step, timestamp, value",
        "latest_metrics": "key, step, timestamp, value",
    }.items():
        rows = base.execute(f"select {columns} from {table} where run_uuid = ?", [id])  # noqa: S608
        told[table] = sorted(rows)
    told["tags"] = [(key, value.replace(name, "NAME")) for key, value in told["tags"]]
    return told


def view_of(store: Store, at: int = -1, fate: Callable = never_done) -> MlflowView:
    view = MlflowView(store, warn=lambda line: None)
    view.client = Unsure(view.client, at, fate)
    return view


@pytest.fixture(scope="module")
def calm(store) -> tuple[list[str], list[dict]]:
    """The requests of an undisturbed view, and what it shows."""
    view = view_of(store)
    show(store, plan_of(store, "calm"), view)
    assert not view.lost
    return view.client.asked, shown(store, "calm")


@pytest.mark.parametrize("fate", FATES, ids=lambda fate: fate.__name__)
def test_a_run_is_shown_once_and_whole_whatever_became_of_a_request(store, calm, fate):
    asked, undisturbed = calm
    lost = []
    for at, request in enumerate(asked):
        name = f"{fate.__name__} {at} {request}"
        view = view_of(store, at, fate)
        show(store, plan_of(store, name), view)
        sync(store, [name])
        for late in view.client.late:
            with suppress(Exception):
                late()
        if view.client.late:
            sync(store, [name])
        if shown(store, name) != undisturbed:
            lost.append(request)
            print(name, undisturbed, shown(store, name), sep="\n   ")
    assert lost == []
