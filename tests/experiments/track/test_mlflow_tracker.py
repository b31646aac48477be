"""MLflow as a view: what is shown, what a second telling changes (nothing), and what a failure costs (a warning)."""

import json
import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest

from ablab.core.errors import UserError, without_password
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, PRUNED, Result
from ablab.core.store.store import Store
from ablab.experiments.track import mlflow_tracker, ports, ui
from ablab.experiments.track import trackers as trackers_module
from ablab.experiments.track.cards import card_of, summary_of
from ablab.experiments.track.chosen import USUAL
from ablab.experiments.track.mlflow_home import database, local_uri
from ablab.experiments.track.mlflow_sync import replay, sync
from ablab.experiments.track.mlflow_tracker import MlflowTracker
from ablab.experiments.track.mlflow_view import MlflowView, experiment_tags
from ablab.experiments.track.trackers import Trackers

STARTED = 1.76e9  # unix seconds
RECIPE = "data: {name: web, digest: 0123abcd}\nseed: 0\n"


# -- a store, a plan, and two ways of showing it -----------------------------------------------------------------------
@pytest.fixture
def store(tmp_path, migrated, monkeypatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_store(tmp_path / "store", migrated)


def new_store(root: Path, migrated: tuple[Path, str]) -> Store:
    root.mkdir(parents=True)
    shutil.copy(migrated[0], root / "mlflow.db")
    return Store(root)


def planned(store: Store, cells=("base", "+ gating"), seeds=2, name="demo") -> GridPlan:
    """A plan whose run folders have begun."""
    rows = [
        Planned(cell, seed, seed, f"{c:08x}{seed:08x}", "base" if c else None)
        for c, cell in enumerate(cells)
        for seed in range(seeds)
    ]
    plan = GridPlan(name, "Which arm helps?", "val/loss", "lower", "add_one", rows)
    store.write_plan(plan)
    for i, row in enumerate(rows):
        folder = store.run(row.run).folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(RECIPE)
        about = {
            "started": STARTED + 1000 * i,
            "params": {"optim.lr": 0.01 * (i + 1), "optim.chains[hidden]": row.cell},
        }
        (folder / "run.json").write_text(json.dumps(about))
    return plan


def line(row: Planned, step: int) -> dict[str, float]:
    values = {
        "tokens": step * 1000,
        "train/loss": 2.5
        + 6 * math.exp(-step / 80)
        - 0.1 * int(row.run[:8], 16)
        + 0.01 * row.seed,
    }
    return values | ({"val/loss": values["train/loss"] + 0.05} if step % 50 == 0 else {})


def train(
    store: Store,
    plan: GridPlan,
    row: Planned,
    steps: range,
    tracker: MlflowTracker | None,
    status: str | None = FINISHED,
    pace: float = 0.5,  # seconds a step
) -> None:
    """What a worker writes and the runner hears, step by step; status None: it was killed after the last step."""
    record = store.run(row.run)
    if tracker:
        tracker.open(card_of(store, plan, row))
    for step in steps:
        record.log(
            step, line(row, step), {"seconds": step * pace, "tokens_per_second": 2000.0 + step}
        )
        if tracker:
            tracker.log(
                step, line(row, step) | {"tokens_per_second": 2000.0 + step}, step * pace
            )
    if status:
        last = steps[-1]
        final = line(row, last)
        tokens = final.pop("tokens")
        result = Result(
            run=row.run,
            status=status,
            step=last,
            tokens=tokens,
            metrics=final,
            seconds=last * pace,
            tokens_per_second=2000.0,
            peak_bytes=3 * 2**30,
            error="" if status == FINISHED else "why",
        )
        record.finish(result)
        if tracker:
            tracker.close(status, summary_of(record.result()))


def train_all(store: Store, plan: GridPlan, view: MlflowView | None) -> None:
    for row in plan.rows:
        train(store, plan, row, range(10, 101, 10), view and MlflowTracker(view))


def content(store: Store) -> dict:
    """Everything that the database says, read with SQL, by run name; the runs' random ids and folders left out."""
    with sqlite3.connect(database(store.root)) as base:
        ask = lambda query, *values: sorted(base.execute(query, values).fetchall())  # noqa: E731
        runs = {}
        for id, *about in base.execute(
            "select run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri from runs"
        ).fetchall():
            folder = Path(about.pop().removeprefix("file://"))
            runs[about[0]] = {
                "about": about,
                "tags": ask("select key, value from tags where run_uuid = ?", id),
                "params": ask("select key, value from params where run_uuid = ?", id),
                "metrics": ask(
                    "select key, step, timestamp, value, is_nan from metrics where run_uuid = ?",
                    id,
                ),
                "latest": ask(
                    "select key, step, timestamp, value from latest_metrics where run_uuid = ?",
                    id,
                ),
                "data": ask(
                    "select name, digest from inputs join datasets on source_id = dataset_uuid "
                    "where destination_id = ?",
                    id,
                ),
                "files": sorted((path.name, path.read_text()) for path in folder.glob("*")),
            }
        tags = ask(
            "select name, key, value from experiment_tags join experiments using (experiment_id)"
        )
        return {
            "runs": runs,
            "experiments": tags,
            "rows": base.execute("select count(*) from runs").fetchone(),
        }


def only_run(store: Store):
    (run,) = MlflowView(store).runs("demo")
    return run


# -- what is shown -----------------------------------------------------------------------------------------------------
def test_the_database_is_made_by_one_silent_process_that_leaves_nothing_else(migrated):
    path, said = migrated
    assert said == ""
    assert [entry.name for entry in path.parent.iterdir()] == ["mlflow.db"]
    assert [entry.name for entry in path.parent.parent.iterdir()] == ["store"]


def test_importing_the_tracker_imports_neither_mlflow_nor_torch():
    code = (
        "import sys, ablab.experiments.track.mlflow_sync, ablab.experiments.track.ui; "
        "assert not {'mlflow', 'torch', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_live_run_reads_back_through_mlflow(store):
    plan = planned(store, cells=("base", "+ gating (per head)"), seeds=1)
    row, view = plan.rows[1], MlflowView(store)
    train(store, plan, row, range(10, 101, 10), MlflowTracker(view))
    run = only_run(store)
    assert view.client.get_experiment(run.info.experiment_id).name == "ablab/demo"
    assert (run.info.run_name, run.info.status) == ("+ gating (per head) · seed 0", "FINISHED")
    assert run.data.params == {"optim.lr": "0.02", "optim.chains.hidden": "+ gating (per head)"}
    tags = {
        key.removeprefix("ablab."): value
        for key, value in run.data.tags.items()
        if key.startswith("ablab.")
    }
    assert tags.pop("result")
    assert tags == {
        "experiment": "demo",
        "cell": "+ gating (per head)",
        "pair": "0",
        "seed": "0",
        "run_id": row.run,
        "design": "add_one",
        "reference": "base",
        "status": "finished",
        "step": "100",
    }
    history = view.client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [
        (step, line(row, step)["train/loss"]) for step in range(10, 101, 10)
    ]
    assert history[3].timestamp == (STARTED + 1000 + 40 * 0.5) * 1000
    assert run.data.metrics == line(row, 100) | {"tokens_per_second": 2000.0, "peak_gib": 3.0}
    assert (
        run.info.end_time - run.info.start_time == 50_001
    )  # 50 s of training, and the final values 1 ms later
    assert sorted(file.path for file in view.client.list_artifacts(run.info.run_id)) == [
        "recipe.yaml",
        "result.json",
    ]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("web", "0123abcd")


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (FINISHED, "FINISHED"),
        (DIVERGED, "FAILED"),
        (FAILED, "FAILED"),
        (OUT_OF_MEMORY, "FAILED"),
        (PRUNED, "KILLED"),
    ],
)
def test_each_status_has_its_mlflow_word_and_a_failure_its_reason(store, status, shown):
    plan = planned(store, cells=("base",), seeds=1)
    tracker = MlflowTracker(MlflowView(store))
    train(store, plan, plan.rows[0], range(10, 31, 10), tracker, status)
    run = only_run(store)
    assert (run.info.status, run.data.tags["ablab.status"]) == (shown, status)
    why = "" if status == FINISHED else "\n\nwhy"
    assert run.data.tags["mlflow.note.content"] == f"Arm `base`, seed 0.{why}"


def test_a_value_that_is_not_finite_leaves_a_gap_and_spares_its_batch(store):
    plan = planned(store, cells=("base",), seeds=1)
    tracker = MlflowTracker(MlflowView(store))
    tracker.open(card_of(store, plan, plan.rows[0]))
    for step, value in enumerate([1.0, math.nan, math.inf, None, 2.0]):
        tracker.log(step, {"loss": value, "other": step}, step)
    tracker.close(DIVERGED, {"loss": math.nan})
    (run,) = content(store)["runs"].values()
    points = [(key, step, value) for key, step, _, value, _ in run["metrics"]]
    assert [point for point in points if point[0] == "loss"] == [
        ("loss", 0, 1.0),
        ("loss", 4, 2.0),
    ]
    assert sum(key == "other" for key, *_ in points) == 5


def test_no_batch_exceeds_mlflows_limits(store, monkeypatch):
    plan = planned(store, cells=("base",), seeds=1)
    row = plan.rows[0]
    about = {"params": {f"part.{i}": "x" * 7000 for i in range(250)}, "started": STARTED}
    (store.run(row.run).folder / "run.json").write_text(json.dumps(about))
    view, batches = MlflowView(store), []
    send = view.client.log_batch

    def counted(id, metrics=(), params=(), tags=()):
        steps = {metric.step for metric in metrics}
        batches.append((len(metrics), len(params), len(steps)))
        send(id, metrics, params, tags)

    monkeypatch.setattr(view.client, "log_batch", counted)
    tracker = MlflowTracker(view, strict=True)
    tracker.open(card_of(store, plan, row))
    for step in range(1, 251):
        tracker.log(step, {f"key{i}": float(step) for i in range(22)}, step)
    tracker.close(FINISHED, {})
    metrics, params, steps = zip(*batches, strict=True)
    assert sum(metrics) == 250 * 22
    assert max(metrics) <= 1000
    assert max(steps) <= 100
    assert (sum(params), max(params)) == (250, 100)
    assert sum(size > 0 for size in metrics) == math.ceil(250 / (1000 // 22))


def test_a_steady_trickle_is_shown_within_seconds(store, monkeypatch):
    plan = planned(store, cells=("base",), seeds=1)
    clock = [0.0]
    monkeypatch.setattr(mlflow_tracker.time, "monotonic", lambda: clock[0])
    tracker = MlflowTracker(MlflowView(store), strict=True)
    tracker.open(card_of(store, plan, plan.rows[0]))
    for step in range(1, 8):
        clock[0] += 2.0
        tracker.log(step, {"loss": 1.0 * step}, step)
    assert only_run(store).data.metrics["loss"] == 6.0  # sent at 6 s and at 12 s


def test_the_first_25_metrics_get_a_curve_and_a_warning_names_the_next(store):
    plan, said = planned(store, cells=("base",), seeds=1), []
    tracker = MlflowTracker(MlflowView(store, warn=said.append))
    tracker.open(card_of(store, plan, plan.rows[0]))
    for step in (1, 2):
        tracker.log(step, {f"key{i}": 1.0 for i in range(40)}, step)
    tracker.close(FINISHED, {"final": 1.0})
    assert set(only_run(store).data.metrics) == {f"key{i}" for i in range(25)} | {"final"}
    assert len(said) == 1 and "'key25'" in said[0]


def test_looks_into_layers_stand_beside_the_25_live_and_replayed(store):
    plan, said = planned(store, cells=("base",), seeds=1), []
    row = plan.rows[0]
    record = store.run(row.run)
    seen = {f"layer/kurtosis/{i:02}": float(i) for i in range(40)}
    others = {f"key{i}": 1.0 for i in range(25)}
    record.log(10, others, {"seconds": 1.0, "tokens_per_second": 9.0})
    record.note_look(10, seen)
    tracker = MlflowTracker(MlflowView(store, warn=said.append))
    tracker.open(card_of(store, plan, row))
    tracker.log(10, seen | others, 1.0)
    tracker.flush()
    assert only_run(store).data.metrics == seen | others and not said
    MlflowView(store).client.delete_run(only_run(store).info.run_id)
    replay(record, card_of(store, plan, row), MlflowTracker(MlflowView(store)))
    assert seen.items() <= only_run(store).data.metrics.items()


# -- telling it twice --------------------------------------------------------------------------------------------------
def test_replaying_a_finished_run_twice_changes_nothing(store):
    plan = planned(store, cells=("base",), seeds=1)
    row, record = plan.rows[0], store.run(plan.rows[0].run)
    train(store, plan, row, range(10, 101, 10), MlflowTracker(MlflowView(store)))
    once = content(store)
    for _ in range(2):
        tracker = MlflowTracker(MlflowView(store), strict=True)
        replay(record, card_of(store, plan, row), tracker, record.result())
        assert tracker.points == 0
    assert content(store) == once


def test_a_resumed_run_continues_its_mlflow_run_and_shows_no_step_twice(store):
    plan = planned(store, cells=("base",), seeds=1)
    row, record = plan.rows[0], store.run(plan.rows[0].run)
    first = MlflowTracker(MlflowView(store))
    train(store, plan, row, range(10, 61, 10), first, status=None)
    first.flush()
    record.rewind(40)  # the last checkpoint
    train(store, plan, row, range(50, 101, 10), MlflowTracker(MlflowView(store)))
    assert content(store)["rows"] == (1,)
    (run,) = content(store)["runs"].values()
    assert [step for key, step, *_ in run["metrics"] if key == "train/loss"] == list(
        range(10, 101, 10)
    )
    assert run["about"][1] == "FINISHED"


def test_a_kill_between_points_and_their_tag_repeats_no_point(store):
    plan = planned(store, cells=("base",), seeds=1)
    row, record = plan.rows[0], store.run(plan.rows[0].run)
    train(store, plan, row, range(10, 101, 10), MlflowTracker(MlflowView(store)))
    once = content(store)
    with sqlite3.connect(database(store.root)) as base:
        base.execute("delete from tags where key in ('ablab.step', 'ablab.result')")
    replay(
        record,
        card_of(store, plan, row),
        MlflowTracker(MlflowView(store), strict=True),
        record.result(),
    )
    assert content(store) == once


def test_points_without_their_tag_have_no_twins_when_the_run_takes_those_steps_again(store):
    """At another pace than before the kill: other times, and so other points to MLflow."""
    plan = planned(store, cells=("base",), seeds=1)
    row, record = plan.rows[0], store.run(plan.rows[0].run)
    first = MlflowTracker(MlflowView(store))
    train(store, plan, row, range(10, 61, 10), first, status=None)
    first.flush()
    with sqlite3.connect(database(store.root)) as base:
        base.execute("delete from tags where key = 'ablab.step'")
    record.rewind(40)
    train(store, plan, row, range(50, 101, 10), MlflowTracker(MlflowView(store)), pace=0.7)
    (run,) = content(store)["runs"].values()
    steps = [step for key, step, *_ in run["metrics"] if key == "train/loss"]
    assert steps == list(range(10, 101, 10))


# -- ablab sync --------------------------------------------------------------------------------------------------------
def test_sync_into_an_empty_database_equals_the_live_view(store, tmp_path, migrated):
    train_all(store, planned(store), MlflowView(store))
    live = content(store)
    copy = new_store(tmp_path / "copy", migrated)
    for name in ("runs", "experiments"):
        shutil.copytree(store.root / name, copy.root / name)
    assert sync(copy) == {"added": 4, "continued": 0, "current": 0, "missing": 0}
    assert content(copy) == live


def test_a_second_sync_sends_nothing(store, monkeypatch):
    plan = planned(store)
    train_all(store, plan, None)
    store.write_plan(
        GridPlan(
            plan.name,
            plan.question,
            plan.metric,
            plan.better,
            plan.design,
            [*plan.rows, Planned("+ muon", 0, 0, "f" * 16)],
        )
    )
    assert sync(store) == {"added": 4, "continued": 0, "current": 0, "missing": 1}
    once = content(store)
    monkeypatch.setattr(MlflowTracker, "open", None)
    assert sync(store, ["demo"]) == {"added": 0, "continued": 0, "current": 4, "missing": 1}
    assert content(store) == once
    store.run(plan.rows[0].run).result_path.write_bytes(b'{"run": "\xff"}')
    costs = {"added": 0, "continued": 0, "current": 3, "missing": 1, "damaged": 1}
    assert sync(store) == costs  # one damaged record costs one run


def test_sync_sends_only_what_a_lost_connection_left_out(store, tmp_path, migrated):
    plan, said = planned(store), []
    view = MlflowView(store, warn=said.append)
    train(store, plan, plan.rows[0], range(10, 101, 10), MlflowTracker(view))
    tracker, record = MlflowTracker(view), store.run(plan.rows[1].run)
    train(store, plan, plan.rows[1], range(10, 51, 10), tracker, status=None)
    tracker.flush()
    view.client.log_batch = lambda *_, **__: 1 / 0
    train(store, plan, plan.rows[1], range(60, 101, 10), tracker)
    train(store, plan, plan.rows[2], range(10, 101, 10), MlflowTracker(view))
    del view.client.log_batch
    train(store, plan, plan.rows[3], range(10, 101, 10), None)
    (line,) = said
    assert "training goes on" in line
    assert "ablab sync" in line
    assert "\n" not in line
    assert record.result() and only_status(store, plan.rows[1]) == "running"
    # Given up once for the whole view: the third run, too, is left to the sync.
    assert sync(store) == {"added": 2, "continued": 1, "current": 1, "missing": 0}
    live = new_store(tmp_path / "live", migrated)
    train_all(live, planned(live), MlflowView(live))
    assert content(store) == content(live)


def only_status(store: Store, row: Planned) -> str:
    (run,) = MlflowView(store).runs("demo", row.run)
    return run.data.tags["ablab.status"]


def test_sync_sees_that_a_failed_run_was_run_again(store):
    plan = planned(store, cells=("base",), seeds=1)
    train(store, plan, plan.rows[0], range(10, 51, 10), None, FAILED)
    sync(store)
    train(store, plan, plan.rows[0], range(60, 101, 10), None, FAILED)
    assert sync(store)["continued"] == 1
    assert only_run(store).data.tags["ablab.step"] == "100"
    assert content(store)["rows"] == (1,)


def test_an_interrupted_run_is_shown_as_running_up_to_its_last_step(store):
    plan = planned(store, cells=("base",), seeds=1)
    train(store, plan, plan.rows[0], range(10, 51, 10), None, status=None)
    assert sync(store) == {"added": 1, "continued": 0, "current": 0, "missing": 0}
    assert sync(store) == {"added": 0, "continued": 0, "current": 1, "missing": 0}
    run = only_run(store)
    assert run.info.status == "RUNNING"
    assert run.data.tags["ablab.status"] == "running"
    assert run.data.tags["ablab.step"] == "50"


def test_one_recipe_in_two_cells_is_two_mlflow_runs(store):
    plan = planned(store, cells=("base",), seeds=1)
    train(store, plan, plan.rows[0], range(10, 31, 10), None)
    row = plan.rows[0]
    twin = Planned("A/A", 1, row.seed, row.run)
    store.write_plan(GridPlan("demo", "", "val/loss", "lower", "add_one", [row, twin]))
    assert sync(store)["added"] == 2
    assert sync(store)["current"] == 2
    assert {run.info.run_name for run in MlflowView(store).runs("demo")} == {
        "base · seed 0",
        "A/A · seed 0",
    }


def test_what_is_no_longer_planned_is_marked_and_leaves_the_views_until_it_is_planned_again(
    store,
):
    plan = planned(store)
    train_all(store, plan, MlflowView(store))
    kept = [row for row in plan.rows if row.cell == "base"]
    other = [replace(row, run=f"{90 + i:016x}") for i, row in enumerate(plan.rows[2:])]
    changed = replace(plan, rows=kept + other)
    store.write_plan(changed)
    for row in other:
        folder = store.run(row.run).folder
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(RECIPE)
    train_all(store, replace(plan, rows=other), None)
    assert sync(store) == {"added": 2, "continued": 0, "current": 2, "missing": 0}
    view = MlflowView(store)
    shown = {run.data.tags["ablab.run_id"] for run in view.runs("demo")}
    assert shown == {row.run for row in changed.rows}
    gone = view.retired("demo")
    assert {run.data.tags["ablab.run_id"] for run in gone} == {row.run for row in plan.rows[2:]}
    assert {run.data.tags["ablab.planned"] for run in gone} == {"no"}
    store.write_plan(plan)
    assert sync(store) == {"added": 0, "continued": 0, "current": 4, "missing": 0}
    assert content(store)["rows"] == (6,)  # the same ones were revived
    assert {run.data.tags["ablab.run_id"] for run in view.runs("demo")} == {
        row.run for row in plan.rows
    }


def test_a_run_that_is_planned_again_is_shown_again_while_it_trains(store):
    plan = planned(store, cells=("base",), seeds=1)
    row = plan.rows[0]
    train(store, plan, row, range(10, 51, 10), None, status=None)
    sync(store)
    store.write_plan(replace(plan, rows=[]))
    sync(store)
    assert MlflowView(store).runs("demo") == []
    store.write_plan(plan)
    train(store, plan, row, range(60, 101, 10), MlflowTracker(MlflowView(store)))
    assert only_run(store).data.tags["ablab.planned"] == "yes"
    assert content(store)["rows"] == (1,)


@pytest.mark.parametrize("recipe", [b"data: \xff", b"- a", b"data: 3", b"data: {name: [", b""])
def test_a_damaged_recipe_or_card_costs_its_data_and_its_parameters_alone(store, recipe):
    plan = planned(store, cells=("base",), seeds=1)
    folder = store.run(plan.rows[0].run).folder
    train_all(store, plan, None)
    (folder / "recipe.yaml").write_bytes(recipe)
    (folder / "run.json").write_text('{"started": "today", "tags": 3, "params": [1]}')
    assert sync(store)["added"] == 1
    run = only_run(store)
    assert run.data.tags["ablab.status"] == FINISHED
    assert run.data.params == {}


def test_a_run_that_two_experiments_share_shows_each_ones_own_parameters(store):
    plan = planned(store, cells=("base",), seeds=1)
    train_all(store, plan, None)
    row = replace(plan.rows[0], params={"optim.lr": 0.5, "with.gating": True})
    store.write_plan(replace(plan, name="second", rows=[row]))
    sync(store)
    (own,), (second,) = MlflowView(store).runs("demo"), MlflowView(store).runs("second")
    assert own.data.params == {"optim.lr": "0.01", "optim.chains.hidden": "base"}
    assert second.data.params == {"optim.lr": "0.5", "with.gating": "True"}


def test_what_a_person_deleted_or_wrote_in_the_ui_is_revived_or_kept(store):
    plan = planned(store, cells=("base",), seeds=1)
    train_all(store, plan, MlflowView(store))
    run, client = only_run(store), MlflowView(store).client
    client.set_experiment_tag(run.info.experiment_id, "mlflow.note.content", "my own words")
    client.set_tag(run.info.run_id, "mlflow.runColor", "#123456")
    client.delete_run(run.info.run_id)
    client.delete_experiment(run.info.experiment_id)
    assert sum(sync(store).values()) == 1
    assert (
        client.get_experiment(run.info.experiment_id).tags["mlflow.note.content"]
        == "my own words"
    )
    assert only_run(store).info.status == "FINISHED"


# -- where MLflow is, and when it is not -------------------------------------------------------------------------------
def test_the_environment_variable_names_another_place(store, tmp_path, monkeypatch):
    shutil.move(store.root / "mlflow.db", tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    train_all(store, planned(store, cells=("base",), seeds=1), None)
    assert sync(store)["added"] == 1
    assert not database(store.root).exists()
    with sqlite3.connect(tmp_path / "other.db") as base:
        assert base.execute("select name from runs").fetchall() == [("base · seed 0",)]


@pytest.mark.parametrize("name", ["a b", "50%20off", "what?", "a#b", "é·"])
def test_a_store_may_have_any_name(tmp_path, migrated, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = new_store(tmp_path / name, migrated)
    train_all(store, planned(store, cells=("base",), seeds=1), None)
    assert sync(store)["added"] == 1
    assert content(store)["rows"] == (1,)
    assert len(list((store.root / "mlartifacts").rglob("recipe.yaml"))) == 1


@pytest.mark.parametrize(
    "uri", ["sqlite:////proc/nowhere/mlflow.db", "http://me:secret@127.0.0.1:9", "nonsense://x"]
)
def test_a_broken_uri_costs_one_warning_and_stops_nothing(store, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plan, said = planned(store), []
    view = MlflowView(store, uri, warn=said.append)
    assert view.ensure() is False
    train_all(store, plan, view)
    assert all(store.run(row.run).result() for row in plan.rows)
    (line,) = said
    assert "\n" not in line
    assert "ablab sync" in line
    assert "secret" not in line
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        sync(store, uri=uri)


def test_a_damaged_database_is_named_with_its_cure(store, free_port):
    train_all(store, planned(store), None)
    database(store.root).write_bytes(b"not a database" * 100)
    said = "not a database.*delete .*mlflow.db and make it anew with `ablab sync`"
    with pytest.raises(UserError, match=said):
        sync(store)
    with pytest.raises(UserError, match=said):
        ui.serve(store.root, port=free_port())


class Hung:
    """A server that takes connections and never answers; `asked` are those that it took."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.asked: list[socket.socket] = []
        self.uri = f"http://me:secret@127.0.0.1:{self.socket.getsockname()[1]}"
        Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                self.asked.append(self.socket.accept()[0])


@pytest.fixture
def hung(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Hung()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.socket.close()


def test_a_server_that_hangs_is_asked_once_for_the_whole_grid(store, hung):
    plan, said = planned(store, seeds=4), []
    trackers = Trackers(store, plan, said.append, USUAL)
    for row in plan.rows:
        train(store, plan, row, range(10, 31, 10), None)
        trackers.log(row.run, 10, {"train/loss": 1.0}, 1.0)
        trackers.close(row.run)
    trackers.finish()
    assert len(hung.asked) == 1
    (line,) = said
    assert "ablab sync" in line and "secret" not in line and "\n" not in line


def test_a_server_that_is_slow_holds_a_command_up_for_a_bounded_time(store, monkeypatch):
    """One that answers each time, but after long: the wait at the end is bounded in total."""
    monkeypatch.setattr(trackers_module, "FINISH_SECONDS", 0.2)
    plan, said = planned(store), []
    train_all(store, plan, None)
    trackers = Trackers(store, plan, said.append, USUAL)
    release = Event()
    (feed,) = trackers.feeds
    feed.view.view.experiment = lambda name: release.wait()
    trackers.finish()
    assert feed.thread.is_alive()
    (line,) = said
    assert "not done after 0 s" in line and "`ablab sync` repairs the view" in line
    release.set()


def test_a_folder_in_the_place_of_the_database_is_named_at_once(tmp_path, monkeypatch):
    """MLflow would try ten times, for minutes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, said = Store(tmp_path / "store"), []
    plan = planned(store)
    database(store.root).mkdir()
    naps = []
    monkeypatch.setattr("mlflow.store.db.utils.time.sleep", naps.append)
    trackers = Trackers(store, plan, said.append, USUAL)
    train_all(store, plan, None)
    trackers.finish()
    (line,) = said
    assert "unable to open database file" in line and "ablab sync" in line
    with pytest.raises(UserError, match="unable to open .*delete .*mlflow.db and make it anew"):
        sync(store)
    with pytest.raises(UserError, match="unable to open .*delete .*mlflow.db and make it anew"):
        ui.serve(store.root)
    assert naps == []


def test_a_store_that_moved_keeps_its_artifacts_beside_it(store, tmp_path):
    plan = planned(store)
    train(store, plan, plan.rows[0], range(10, 31, 10), MlflowTracker(MlflowView(store)))
    moved = Store(tmp_path / "50% off?")
    store.root.rename(moved.root)
    for row in plan.rows[1:]:
        train(moved, plan, row, range(10, 31, 10), MlflowTracker(MlflowView(moved)))
    assert sync(moved)["current"] == 4
    view = MlflowView(moved)
    for run in view.runs("demo"):
        names = sorted(file.path for file in view.client.list_artifacts(run.info.run_id))
        assert names == ["recipe.yaml", "result.json"]
    assert not store.root.exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@host/db",
        "postgresql://me:se@secret@host/db",
        "postgresql://me:a/secret@host/db",
        "postgresql://:secret@host",
        "http://secret@host:5000",
        "postgresql://host/db?user=me&password=secret&sslmode=require",
        "mysql+pymysql://host/db?PASSWD=secret",
        "https://host/?access_token=secret",
        "could not connect to postgresql://me:secret@host (as me)",
    ],
)
def test_no_form_of_a_url_shows_its_password(url):
    shown = without_password(url)
    assert "secret" not in shown and "host" in shown


@pytest.mark.parametrize(
    "url", ["sqlite:////home/a@b/mlflow.db", "http://host:5000/a", "journal:/a:b@c"]
)
def test_a_url_without_a_password_is_shown_as_it_is(url):
    assert without_password(url) == url


# -- ablab ui ----------------------------------------------------------------------------------------------------------
def test_a_taken_port_is_named_with_a_free_one(store):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} on 127.0.0.1 .*in use; try: ablab ui --port \d+$"
        ):
            ui.serve(store.root, port=port)


def test_a_store_with_nothing_to_show_says_what_to_do(store, tmp_path):
    with pytest.raises(UserError, match="holds no runs yet; start one with `ablab run`"):
        ui.serve(tmp_path / "nothing")
    planned(store)
    database(store.root).unlink()
    with pytest.raises(UserError, match="make it with: ablab sync"):
        ui.serve(store.root)


def test_a_remote_server_is_named_and_none_is_started(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    said = []
    ui.serve(store.root, say=said.append)
    assert len(said) == 1 and "https://mlflow.example.org" in said[0]


def test_the_ui_links_to_the_arms_and_leaves_nothing_behind_after_ctrl_c(
    store, serve, wait_until
):
    train_all(store, planned(store), None)
    sync(store)
    served = serve(store.root)
    try:
        assert served.head.startswith(f"MLflow UI at {served.address}")
        about = MlflowView(store).runs("demo")[0].info
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
        assert local_uri(store.root) not in running.stdout  # it might hold a password
        page = f"{served.address}/#/experiments/{about.experiment_id}/runs"
        assert served.link == page + "?workflowType=machine_learning&viewStateShareKey=arms"
        artifact = f"{served.address}/get-artifact?path=recipe.yaml&run_id={about.run_id}"
        assert urllib.request.urlopen(artifact, timeout=60).read().decode() == RECIPE
    finally:
        said = served.stop()
    assert (said, served.process.returncode) == ("stopped\n", 0)
    wait_until(lambda: ports.refusal("127.0.0.1", served.port) is None, "the port is taken")

    def is_over() -> bool:
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
        return str(store.root) not in processes.stdout

    wait_until(is_over, "a process of the server lives")


def test_the_saved_view_of_a_grid_draws_its_own_metric_first(store):
    plan = planned(store)
    view = json.loads(experiment_tags(store, plan.name)["mlflow.sharedViewState.arms"])
    charts = view["compareRunCharts"]
    drawn = [(chart["metricKey"], chart.get("selectedXAxisMetricKey")) for chart in charts]
    assert drawn[0][0] == plan.metric
    assert len(set(drawn)) == len(drawn)
    assert len({chart["uuid"] for chart in charts}) == len(drawn)
    assert len(json.dumps(view)) < 5000  # MLflow's limit of a tag


@pytest.mark.slow
def test_the_ui_shows_four_arms_of_three_seeds(store, serve, photograph):
    cells = ("base", "+ gating", "+ muon", "− qk_norm")
    train_all(store, planned(store, cells, seeds=3), None)
    sync(store)
    groups = {f"Group: {cell}" for cell in cells}
    runs = {f"{cell} · seed {seed}" for cell in cells for seed in range(3)}
    served = serve(store.root)
    try:
        for mode in ("TABLE", "CHART"):
            page = f"{served.link}&compareRunsMode={mode}"
            html = photograph(f"ui-{mode}", page, least_bytes=50_000)
            words = {"Which arm helps?"} | groups | runs
            assert {word for word in words if word not in html} == set()
    finally:
        served.stop()
