"""MLflow's server with one page changed: from its home page, an experiment opens on its runs.

`ablab ui` asks for it by the entry point `mlflow.app`, as `mlflow server --app-name` takes them.  All requests go on to
MLflow's app; into its one HTML page goes opening.js, before MLflow's script.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

APP = "ablab"  # the name of the entry point
SCRIPT = files("ablab.experiments.track") / "opening.js"
# Of a request for the page: what could make MLflow answer that nothing has changed.
CONDITIONS = (b"if-none-match", b"if-modified-since", b"range")
# Of the answer: what is no longer true of it.
OF_THE_FILE = (b"content-length", b"etag", b"last-modified", b"accept-ranges")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_installed() -> bool:
    """Whether the server can find the app: a checkout that was installed before there was one serves MLflow's own."""
    return any(one.name == APP for one in entry_points(group="mlflow.app"))


def make() -> App:
    """What the entry point names; MLflow is imported here, in the server's process."""
    from mlflow.server.fastapi_app import app

    return Opening(app, SCRIPT.read_text("utf-8"))


class Opening:
    """An ASGI app that puts a script into the page of another."""

    def __init__(self, app: App, script: str):
        self.app = app
        self.script = script

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            return await self.app(scope, receive, send)
        asked = [pair for pair in scope["headers"] if pair[0] not in CONDITIONS]
        page = Held(send, self.script)
        await self.app({**scope, "headers": asked}, receive, page)


class Held:
    """Takes an answer piece by piece, and sends it as one with the script at the head of the page."""

    def __init__(self, send: Send, script: str):
        self.send = send
        self.script = script
        self.start: Message = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        self.body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = with_script(self.body, self.script)
        kept = [pair for pair in self.start["headers"] if pair[0] not in OF_THE_FILE]
        length = (b"content-length", str(len(body)).encode())
        await self.send({**self.start, "headers": [*kept, length]})
        await self.send({"type": "http.response.body", "body": body})


def with_script(page: bytes, script: str) -> bytes:
    """The page with the script before its others; what has no head stays as it is."""
    head = b"<head>"
    return page.replace(head, head + f"<script>{script}</script>".encode(), 1)
