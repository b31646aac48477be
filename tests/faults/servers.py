"""The faults that kill and stop real servers: PostgreSQL, where its programs are installed, and MLflow's."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from kinds import REFUSED, Case, check, kind
from postgres import Postgres, free_port, lacking

SECONDS_TO_START = 120.0


class NotHere(Exception):
    """What a fault needs is not installed."""


# -- PostgreSQL --------------------------------------------------------------------------------------------------------
class Started:
    """The one server of the campaign."""

    postgres: Postgres | None = None
    folder: tempfile.TemporaryDirectory | None = None
    databases = 0


def stop() -> None:
    """End it."""
    if Started.postgres and Started.folder:
        Started.postgres.stop()
        Started.folder.cleanup()


def fresh_database(case: Case) -> Postgres:
    """The server, with an empty database that the case's commands use."""
    if why := lacking():
        raise NotHere(why)
    if not Started.postgres:
        Started.folder = tempfile.TemporaryDirectory(prefix="ablab-pg-")
        Started.postgres = Postgres(Path(Started.folder.name))
    Started.databases += 1
    name = f"study{Started.databases}"
    Started.postgres.create(name)
    case.environment = {"ABLAB_STORAGE": Started.postgres.url_of(name)}
    return Started.postgres


@kind(3, name="PostgreSQL crashes", scene="journal")
def postgres_crashes(case: Case) -> None:
    server = fresh_database(case)
    running = case.begin_and_wait()
    server.stop()
    check(running.end(), 0, REFUSED)
    server.start()


@kind(3, name="PostgreSQL stands still for a while", scene="journal")
def postgres_stands_still(case: Case) -> None:
    server = fresh_database(case)
    running = case.begin_and_wait()
    server.send(signal.SIGSTOP)
    time.sleep(case.draw.uniform(0.2, 2))
    server.send(signal.SIGCONT)
    check(running.end(), 0)


@kind(3, name="killed while PostgreSQL is written", scene="journal")
def killed_on_postgres(case: Case) -> None:
    fresh_database(case)
    running = case.begin_and_wait()
    running.send(signal.SIGKILL)
    running.end()


# -- MLflow ------------------------------------------------------------------------------------------------------------
class MlflowServer:
    """MLflow's own, on a database that is empty."""

    def __init__(self, case: Case):
        self.database = case.lab.root / "server.db"
        shutil.copy(case.lab.root / "empty.db", self.database)
        self.uri = f"http://127.0.0.1:{free_port()}"
        port = self.uri.rpartition(":")[2]
        artifacts = (case.lab.store / "mlartifacts").as_uri()
        words = ["mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        words += ["--default-artifact-root", artifacts, "--no-serve-artifacts"]
        words += ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            assert time.monotonic() < until, "MLflow's server does not start"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def send(self, sign: signal.Signals) -> None:
        os.killpg(self.process.pid, sign)


def on_mlflow(harm: Callable[[Case, MlflowServer], None]) -> Callable[[Case], None]:
    """What the server holds in the end is the view that the next command finds in its store."""

    def does(case: Case) -> None:
        server = MlflowServer(case)
        case.environment = {"MLFLOW_TRACKING_URI": server.uri}
        try:
            running = case.begin_and_log()
            harm(case, server)
            check(running.end(), 0)
        finally:
            server.send(signal.SIGKILL)
            server.process.wait()
        case.environment = {}
        for rest in case.lab.root.glob("server.db*"):
            shutil.move(rest, case.lab.store / rest.name.replace("server", "mlflow"))

    return does


@kind(2, name="MLflow's server killed", scene="shown")
@on_mlflow
def mlflow_killed(case: Case, server: MlflowServer) -> None:
    server.send(signal.SIGKILL)


@kind(2, name="MLflow's server stands still for a while", scene="shown")
@on_mlflow
def mlflow_stands_still(case: Case, server: MlflowServer) -> None:
    server.send(signal.SIGSTOP)
    time.sleep(case.draw.uniform(0.5, 8))
    server.send(signal.SIGCONT)
