"""Servers that others use too: MLflow's over HTTP with its artifacts behind it, and PostgreSQL beneath."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.track import trackers as trackers_module
from ablab.experiments.track.chosen import USUAL
from ablab.experiments.track.mlflow_sync import sync
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.trackers import Trackers

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "faults")]
from postgres import Postgres, free_port, lacking  # noqa: E402
from test_mlflow_tracker import line, planned, train, train_all  # noqa: E402

STEPS = range(10, 101, 10)


@pytest.fixture(scope="module")
def postgres():
    if why := lacking():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="ablab-pg-") as root:
        server = Postgres(Path(root))
        yield server
        server.stop()


class MlflowServer:
    """`mlflow server` as a team runs it: it hands artifacts on, to a folder that it alone knows."""

    def __init__(self, root: Path, database: str):
        self.uri = f"http://127.0.0.1:{free_port()}"
        self.said = root / "said"
        words = ["--backend-store-uri", database, "--serve-artifacts", "--workers", "1"]
        words += ["--artifacts-destination", str(root / "artifacts")]
        words += ["--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2]]
        with open(self.said, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def answers(self) -> bool:
        assert self.process.poll() is None, self.said.read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def send(self, sign: signal.Signals) -> None:
        os.killpg(self.process.pid, sign)


@pytest.fixture
def server(tmp_path, postgres, wait_until, monkeypatch):
    postgres.create("shown")
    started = MlflowServer(tmp_path, postgres.url_of("shown"))
    wait_until(started.answers, "MLflow's server does not start", seconds=200)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield started
    started.send(signal.SIGKILL)
    started.process.wait()


def shown(view: MlflowView) -> dict:
    """What MLflow says of each run, without its ids; a point that it holds twice is there twice."""
    runs = {}
    for run in view.runs("demo"):
        keys = sorted(run.data.metrics)
        history = {key: view.client.get_metric_history(run.info.run_id, key) for key in keys}
        where = view.client.download_artifacts(run.info.run_id, "")
        runs[run.info.run_name] = {
            "status": run.info.status,
            "params": run.data.params,
            "points": {
                key: sorted((point.step, point.value) for point in points)
                for key, points in history.items()
            },
            "files": {path.name: path.read_bytes() for path in Path(where).iterdir()},
        }
    return runs


@pytest.mark.timeout(290)
def test_a_server_that_hangs_for_a_while_misses_nothing_and_what_it_lost_is_rebuilt(
    tmp_path, server, postgres, wait_until, monkeypatch
):
    """Live, then hung in the midst of a run, then there again; later another database, empty, in its place."""
    store = Store(tmp_path / "store")
    plan = planned(store, seeds=1)
    said = []
    trackers = Trackers(store, plan, said.append, USUAL)
    [feed] = trackers.feeds

    def log(row, steps, status=None) -> float:
        """Seconds that the runner has spent on telling the trackers."""
        train(store, plan, row, steps, None, status)
        began = time.perf_counter()
        for step in steps:
            trackers.log(row.run, step, line(row, step), step * 0.5)
        return time.perf_counter() - began

    first, second = plan.rows
    log(first, STEPS, "finished")
    trackers.close(first.run)
    log(second, range(10, 41, 10))
    wait_until(lambda: second.run in feed.live, "the live view does not follow", seconds=120)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    server.send(signal.SIGSTOP)
    spent = log(second, range(50, 71, 10))
    feed.put(lambda: feed.live[second.run].flush())  # as a batch that is due
    wait_until(lambda: feed.view.lost, "it waits for a server that hangs")
    assert spent < 1.0  # nobody waited for the server's 2 s
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    server.send(signal.SIGCONT)
    wait_until(server.answers, "it does not wake up")
    monkeypatch.setattr(trackers_module, "AGAIN_SECONDS", 0.0)
    log(second, range(80, 101, 10), "finished")
    trackers.close(second.run)
    trackers.finish()
    lost, found = said
    assert "training goes on" in lost
    assert found == "MLflow is there again, and shows what it missed"

    live = shown(MlflowView(store))
    assert len(live) == 2
    for run in live.values():
        assert run["status"] == "FINISHED"
        assert set(run["files"]) == {"recipe.yaml", "result.json"}
        steps = [step for step, _ in run["points"]["train/loss"]]
        assert steps == [*STEPS]  # each once
        assert max(Counter(run["points"]["val/loss"]).values()) == 1

    postgres.create("rebuilt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.url_of("rebuilt"))
    assert sync(store)["added"] == 2
    assert shown(MlflowView(store)) == live


# -- schemas of other versions -----------------------------------------------------------------------------------------
def tables(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as base:
        return dict(base.execute("select name, sql from sqlite_master where type = 'table'"))


@pytest.fixture
def older(tmp_path, migrated) -> Path:
    """A database as an older MLflow leaves it: an earlier revision, and a table that did not exist yet."""
    path = tmp_path / "team.db"
    path.write_bytes(migrated[0].read_bytes())
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("update alembic_version set version_num = 'f5a4f2784254'")
        base.execute("drop table webhook_events")
    return path


def test_a_shared_database_of_an_older_mlflow_is_named_with_its_cure_and_not_migrated(
    tmp_path, older, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{older}")
    before = tables(older)
    store = Store(tmp_path / "store")
    plan = planned(store)
    train_all(store, plan, None)
    with pytest.raises(UserError, match="schema f5a4f2784254 .*mlflow db upgrade") as refused:
        sync(store)
    assert "\n" not in str(refused.value)
    said = []
    trackers = Trackers(store, plan, said.append, USUAL)
    trackers.finish()
    [warned] = said
    assert "mlflow db upgrade" in warned
    assert "training goes on" in warned
    assert tables(older) == before
