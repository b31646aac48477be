"""MLflow's page with a script of ours: what is changed of an answer, and that no other answer is."""

import asyncio

import pytest

from ablab.experiments.track.ui_app import SCRIPT, Opening, with_script

PAGE = b"<html><head><script src='main.js'></script></head></html>"
FIXED = [(b"etag", b"1"), (b"last-modified", b"then"), (b"content-length", b"57")]


class Mlflow:
    """An app that answers in two pieces, and remembers what it was asked."""

    def __init__(self, page: bytes = PAGE):
        self.page = page

    async def __call__(self, scope, receive, send):
        self.asked = scope
        kind = (b"content-type", b"text/html")
        await send({"type": "http.response.start", "status": 200, "headers": [kind, *FIXED]})
        half = len(self.page) // 2
        await send({"type": "http.response.body", "body": self.page[:half], "more_body": True})
        await send({"type": "http.response.body", "body": self.page[half:]})


def answer(app, path="/", method="GET", headers=()) -> list[dict]:
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    asyncio.run(Opening(app, "ours()")(scope, receive, send))
    return sent


def test_the_script_comes_before_mlflows_and_the_length_is_right():
    start, body = answer(Mlflow())
    page = body["body"]
    assert page.index(b"<script>ours()</script>") < page.index(b"main.js")
    headers = dict(start["headers"])
    assert int(headers[b"content-length"]) == len(page)
    assert headers[b"content-type"] == b"text/html"
    assert not {b"etag", b"last-modified"} & set(headers)


def test_an_old_copy_in_the_browser_is_never_said_to_stand():
    app = Mlflow()
    answer(app, headers=[(b"if-none-match", b"1"), (b"cookie", b"x")])
    assert app.asked["headers"] == [(b"cookie", b"x")]


@pytest.mark.parametrize(
    ("path", "method"),
    [("/api/2.0/mlflow/runs/search", "GET"), ("/", "POST"), ("/static-files/main.js", "GET")],
)
def test_every_other_answer_is_mlflows(path, method):
    _, *pieces = answer(Mlflow(), path, method)
    assert b"".join(piece["body"] for piece in pieces) == PAGE
    assert len(pieces) == 2


def test_a_page_without_a_head_stays_as_it_is():
    assert with_script(b"no page", "ours()") == b"no page"


def test_the_script_cannot_end_its_own_element():
    assert "</script" not in SCRIPT.read_text("utf-8").lower()
