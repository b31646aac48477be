"""`ablab watch`: the page of an experiment on the loopback, while its grid runs.

/            the page, as it stands
/state       what has changed since ?known=VERSION: nothing (204), or main and data as JSON
/plotly.js   once; a browser keeps it
"""

import gzip
import json
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from ablab.analysis.pages.html import plotly_js
from ablab.analysis.pages.live import Watched
from ablab.core.store.planned import command
from ablab.core.store.store import Store
from ablab.experiments.track.ports import check_port

HOST = "127.0.0.1"  # and no other: the page shows what the store holds, to whoever asks
USUAL_PORT = 8050
NAMES = (
    HOST,
    "localhost",
)  # by which a browser may call it; a foreign page that points its name here has another
FOREVER = "max-age=31536000, immutable"
HTML, JSON, SCRIPT = (
    "text/html; charset=utf-8",
    "application/json",
    "text/javascript; charset=utf-8",
)


def serve(
    store: Store, name: str, port: int = USUAL_PORT, say: Callable[[str], None] = print
) -> None:
    """Serve until Ctrl-C.  UserError for a taken port and for an experiment without a plan."""
    check_port(HOST, port, USUAL_PORT, command(name, "watch"))
    watched = Watched(store, name)
    with Server((HOST, port), partial(Asked, watched)) as server:
        # `kill` and a closed terminal end us like Ctrl-C, also where a shell made us ignore that.
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, signal.default_int_handler)
        try:
            say(f"{name} at http://{HOST}:{port}  (Ctrl-C stops watching, not the training)")
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say("stopped")


class Server(ThreadingHTTPServer):
    """A thread a request; none of them keeps the process alive."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that leaves in the middle of an answer is no fault."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Asked(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def __init__(self, watched: Watched, *request: object):
        self.watched = watched
        super().__init__(*request)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = (self.headers.get("Host") or "").rpartition(":")[0]
        if name not in NAMES:
            return self.send_error(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        asked = urlsplit(self.path)
        if asked.path == "/":
            return self._answer(HTML, self.watched.whole().encode())
        if asked.path == "/plotly.js":
            return self._answer(SCRIPT, _packed_plotly(), packed=True, keep=FOREVER)
        if asked.path == "/state":
            return self._state(parse_qs(asked.query).get("known", [""])[0])
        self.send_error(HTTPStatus.NOT_FOUND)

    def _state(self, known: str) -> None:
        state = self.watched.look()
        if state.version == known:
            self.send_response(HTTPStatus.NO_CONTENT)
            return self.end_headers()
        told = {"version": state.version, "main": state.main, "data": state.data}
        self._answer(JSON, json.dumps(told).encode())

    def _answer(
        self, kind: str, content: bytes, packed: bool = False, keep: str = "no-store"
    ) -> None:
        if not packed:
            content = gzip.compress(content, 1)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", keep)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: a poll every other second would fill the terminal."""


@cache
def _packed_plotly() -> bytes:
    return gzip.compress(plotly_js(), 6)
