"""`ablab ui`: the MLflow UI over the local store."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ablab.core.errors import UserError
from ablab.experiments.track.mlflow_view import (
    ARMS,
    DATABASES,
    PREFIX,
    QUIET,
    artifacts,
    cure,
    database,
    local_uri,
    tracking_uri,
)

START_SECONDS = 60.0  # a first start on two busy cores takes about 8 s


def serve(
    store_root: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the UI until Ctrl-C.  Raises UserError for a taken port, a store with no view yet, a server that dies.

    MLFLOW_TRACKING_URI may name another database, which is served; of a remote server the address is said.
    """
    uri = tracking_uri(store_root)
    if not uri.startswith(DATABASES):
        return say(
            f"runs are shown by the MLflow server at {uri} (MLFLOW_TRACKING_URI); open that, or unset it for the local store"
        )
    if uri == local_uri(store_root) and not database(store_root).exists():
        raise UserError(_nothing_to_show(store_root))
    _check_port(host, port)
    with tempfile.TemporaryFile() as log, _server(uri, store_root, host, port, log) as server:
        for sign in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # `kill` ends us like Ctrl-C, also where a shell made us ignore that
            signal.signal(sign, signal.default_int_handler)
        try:
            address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
            if not _answers(server, address):
                raise UserError(
                    f"the MLflow server did not start ({_last_line(log)}); {cure(uri, store_root)}"
                )
            say(f"MLflow UI at {address}  (Ctrl-C stops it)")
            for name, link in _links(address).items():
                say(f"  {name}: {link}")
            server.wait()
            raise UserError(
                f"the MLflow server on port {port} stopped ({_last_line(log)}); start it again with: ablab ui --port {port}"
            )
        except KeyboardInterrupt:
            say("stopped")
        finally:
            _stop(server)


def _nothing_to_show(root: Path) -> str:
    if (root / "experiments").is_dir():
        return f"{root} has runs but no {database(root).name}; make it with: ablab sync"
    return f"{root} holds no runs yet; start one with `ablab run`, or name another store with --store"


def _check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on, and name one that can."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port} is not in 1-65535; the usual one is 5000")
    if refusal := _refusal(host, port):
        others = (
            range(max(port, 4999) + 1, min(port + 100, 65536))
            if refusal.errno in (errno.EADDRINUSE, errno.EACCES)
            else ()
        )
        free = next((other for other in others if not _refusal(host, other)), None)
        cure = (
            f"try: ablab ui --port {free}" if free else "choose another with --host and --port"
        )
        raise UserError(
            f"port {port} on {host} cannot be used: {refusal.strerror.lower()}; {cure}"
        )


def _refusal(host: str, port: int) -> OSError | None:
    """Why the server could not listen there; None if it could."""
    try:
        with socket.socket(socket.getaddrinfo(host, port)[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server will: a port just left is free
            probe.bind((host, port))
    except OSError as refusal:
        return refusal
    return None


def _server(uri: str, root: Path, host: str, port: int, log) -> subprocess.Popen:
    """MLflow's server in a process group of its own: Ctrl-C reaches us alone, and we stop all of it."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--default-artifact-root",
        artifacts(root).as_uri(),
    ]
    command += [
        "--no-serve-artifacts",
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
        "--uvicorn-opts",
        "--log-level warning",
    ]
    return subprocess.Popen(
        command,
        env=QUIET | os.environ | {"MLFLOW_LOGGING_LEVEL": "ERROR"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _stop(server: subprocess.Popen) -> None:
    """End the group politely, then what is left of it."""
    for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, sign)
            server.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _answers(server: subprocess.Popen, address: str) -> bool:
    """Wait until the server answers; False if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _last_line(log) -> str:
    log.seek(0)
    lines = [
        line
        for line in log.read().decode(errors="replace").splitlines()
        if line.strip() and not line.startswith(("(Background", "[SQL"))
    ]
    return lines[-1][:200] if lines else "it said nothing"


def _links(address: str) -> dict[str, str]:
    """Our experiments, each with the address of its saved view: seeds averaged by arm."""
    with urllib.request.urlopen(
        f"{address}/api/2.0/mlflow/experiments/search?max_results=1000", timeout=10
    ) as answer:
        found = json.load(answer).get("experiments", [])
    path = "{}/#/experiments/{}/runs?workflowType=machine_learning&viewStateShareKey=" + ARMS
    ours = {
        one["name"].removeprefix(PREFIX): path.format(address, one["experiment_id"])
        for one in found
        if one["name"].startswith(PREFIX)
    }
    return {
        name: link + ("&compareRunsMode=CHART" if name.endswith("@study") else "")
        for name, link in ours.items()
    }
