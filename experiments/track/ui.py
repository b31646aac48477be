"""`ablab ui`: the MLflow UI over the local store."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ablab.core.errors import UserError, without_password
from ablab.experiments.track import ui_app
from ablab.experiments.track.mlflow_home import (
    DATABASES,
    QUIET,
    artifacts,
    cure,
    database,
    follow_the_store,
    local_uri,
    tracking_uri,
)
from ablab.experiments.track.mlflow_view import ARMS, PREFIX
from ablab.experiments.track.ports import check_port

START_SECONDS = 60.0  # a first start on two busy cores takes about 8 s
STOP_SECONDS = 5.0  # of patience with each signal
USUAL_PORT = 5000
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  hosts that listen on every address, where asked for


def serve(
    store_root: Path,
    host: str = "127.0.0.1",
    port: int = USUAL_PORT,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the UI until Ctrl-C.  Raises UserError for a taken port, a store with no view yet, a server that dies.

    MLFLOW_TRACKING_URI may name another database, which is served; of a remote server the address is said.
    """
    uri = tracking_uri(store_root)
    if not uri.startswith(DATABASES):
        return say(
            f"runs are shown by the MLflow server at {without_password(uri)} (MLFLOW_TRACKING_URI); "
            "open that, or unset it for the local store"
        )
    if uri == local_uri(store_root):
        _check_database(store_root)
    check_port(host, port, USUAL_PORT, "ablab ui")
    address = f"http://{'127.0.0.1' if host in EVERYWHERE else host}:{port}"
    with tempfile.TemporaryFile() as log, _server(uri, store_root, host, port, log) as server:
        # `kill` and a closed terminal end us like Ctrl-C, also where a shell made us ignore that.
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, signal.default_int_handler)
        try:
            if not _answers(server, address):
                raise UserError(
                    f"the MLflow server did not start ({_last_line(log)}); {cure(uri, store_root)}"
                )
            say(f"MLflow UI at {address}  (Ctrl-C stops it)")
            for name, link in _links(address).items():
                say(f"  {name}: {link}")
            server.wait()
            raise UserError(
                f"the MLflow server on port {port} stopped ({_last_line(log)}); "
                f"start it again with: ablab ui --port {port}"
            )
        except KeyboardInterrupt:
            say("stopped")
        finally:
            _stop(server)


def _check_database(root: Path) -> None:
    """Refuse a store without one, or with something else in its place."""
    if not database(root).exists():
        raise UserError(_nothing_to_show(root))
    try:
        follow_the_store(root)
    except sqlite3.Error as flaw:
        raise UserError(
            f"{database(root)} cannot be shown ({flaw}); {cure(local_uri(root), root)}"
        ) from None


def _nothing_to_show(root: Path) -> str:
    if (root / "experiments").is_dir():
        return f"{root} has runs but no {database(root).name}; make it with: ablab sync"
    return f"{root} holds no runs yet; start one with `ablab run`, or name another store with --store"


def _server(
    uri: str, root: Path, host: str, port: int, log: BinaryIO
) -> subprocess.Popen[bytes]:
    """MLflow's server in a process group of its own: Ctrl-C reaches us alone, and we stop all of it.

    The URI may hold a password, so it stands in the environment: anyone may read a command line.
    """
    options = {
        "--default-artifact-root": artifacts(root).as_uri(),
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    if ui_app.is_installed():
        options["--app-name"] = ui_app.APP
    command = [sys.executable, "-m", "mlflow", "server", "--no-serve-artifacts"]
    for option, value in options.items():
        command += [option, value]
    return subprocess.Popen(  # noqa: S603  a list, no shell: its words are ours
        command,
        env=QUIET
        | os.environ
        | {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_BACKEND_STORE_URI": uri},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the group politely, then what is left of it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
            server.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _answers(server: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until the server answers; False if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310  http, ours
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _last_line(log: BinaryIO) -> str:
    log.seek(0)
    for line in reversed(log.read().decode(errors="replace").splitlines()):
        if line.strip() and not line.startswith(("(Background", "[SQL")):
            return without_password(line)[:200]
    return "it said nothing"


def _links(address: str) -> dict[str, str]:
    """Our experiments, each with the address of its saved view; that of a study opens on its charts."""
    asked = f"{address}/api/2.0/mlflow/experiments/search?max_results=1000"
    with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310  http, ours
        found = json.load(answer).get("experiments", [])
    links = {}
    for one in found:
        name = one["name"].removeprefix(PREFIX)
        if name == one["name"]:
            continue
        page = f"{address}/#/experiments/{one['experiment_id']}/runs"
        link = f"{page}?workflowType=machine_learning&viewStateShareKey={ARMS}"
        links[name] = link + ("&compareRunsMode=CHART" if name.endswith("@study") else "")
    return links
