"""`ablab watch`: who may ask, what is answered, how it ends."""

import gzip
import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from functools import partial

import pytest

from ablab.analysis.pages.live import Watched
from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.track import live_page


@pytest.fixture
def store(tmp_path):
    """One experiment, one of whose two runs has ended."""
    store = Store(tmp_path / "store")
    rows = [Planned("full", pair, pair, run=f"run{pair}") for pair in range(2)]
    plan = GridPlan("loo", "Does it pay?", "val/loss", "lower", "replicate", rows)
    store.write_plan(plan)
    record = store.run("run0")
    record.log(1, {"tokens": 10, "val/loss": 3.0}, {"seconds": 1.0, "tokens_per_second": 10.0})
    record.finish(Result("run0", FINISHED, 1, 10, {"val/loss": 3.0}))
    return store


@pytest.fixture
def port(store):
    """Of a server in this process."""
    answering = partial(live_page.Asked, Watched(store, "loo"))
    with live_page.Server((live_page.HOST, 0), answering) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    content = answer.read()
    packed = answer.getheader("Content-Encoding") == "gzip"
    connection.close()
    return answer.status, gzip.decompress(content) if packed else content


def test_the_page_comes_at_once_and_what_has_changed_after_it(store, port):
    status, page = ask(port, "/")
    assert status == 200
    assert b"Does it pay?" in page
    state = json.loads(ask(port, "/state?known=first")[1])
    assert "1 of 2 runs have ended" in state["main"]
    assert json.loads(state["data"])["curves"]["val/loss"][0]["mean"] == [3.0]
    assert ask(port, f"/state?known={state['version']}") == (204, b"")


def test_the_script_of_the_charts_is_plotly(port):
    status, script = ask(port, "/plotly.js")
    assert status == 200
    assert b"plotly.js v" in script[:500]


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com", ""])
def test_a_page_of_elsewhere_that_calls_itself_by_another_name_is_refused(port, host):
    status, content = ask(port, "/state?known=", host)
    assert status == 403
    assert b"Does it pay?" not in content


@pytest.mark.parametrize("path", ["/runs/run0/result.json", "/../plan.json", "//x", "/state/x"])
def test_nothing_else_is_served(port, path):
    assert ask(port, path)[0] == 404


def test_a_browser_that_leaves_in_the_middle_is_no_fault(port, capsys):
    leaving = socket.create_connection(("127.0.0.1", port))
    leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leaving.sendall(b"GET /plotly.js HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    leaving.close()  # with a reset
    assert ask(port, "/")[0] == 200
    assert "Exception" not in capsys.readouterr().err


def test_no_other_machine_can_ask():
    assert live_page.HOST == "127.0.0.1"


def test_a_taken_port_is_named_with_a_free_one(store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError,
            match=f"port {port} on 127.0.0.1 cannot be used: .*ablab watch loo --port",
        ):
            live_page.serve(store, "loo", port)


def test_ctrl_c_ends_it_and_a_word_that_is_no_experiment_is_refused(store, free_port):
    command = [sys.executable, "-m", "ablab.experiments.cli", "watch"]
    words = ["loo", "--store", str(store.root), "--port", str(free_port())]
    watching = subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "loo at http://127.0.0.1:" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    said, complaint = watching.communicate(timeout=60)
    assert said == "stopped\n"
    assert not complaint
    assert watching.returncode == 0
    refused = subprocess.run(
        [*command, "lou", "--store", str(store.root)], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: no experiment 'lou'")
    assert refused.stderr.count("\n") == 1
