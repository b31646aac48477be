"""A second copy of a run: whole or not there, and never in the way of training."""

import threading
import time
from pathlib import Path

import fsspec
import msgspec
import pytest

from ablab.core.errors import Halted, UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store import mirror
from ablab.core.store.files import unfenced
from ablab.core.store.mirror import Manifest, Remote, mirror_of
from ablab.core.store.record import Record
from ablab.core.train import checkpoint
from ablab.core.train.run import run

OFTEN = Runtime(device="cpu", log_every=1, evaluations=2, save_seconds=0, keep_weights=True)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """Where copies go: into memory, or a folder."""
    yield f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/far"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def nobody_hung(monkeypatch):
    monkeypatch.setattr(mirror, "_hung", {})


def quiet(line: str) -> None:
    """Told of nothing."""


def of(url: str, folder: Path, say=quiet) -> Remote:
    return mirror_of(url, folder, say, unfenced)


def manifest_in(url: str, run: str) -> Manifest:
    files, root = fsspec.core.url_to_fs(url)
    return msgspec.json.decode(
        files.cat_file(f"{root}/runs/{run}/manifest.json"), type=Manifest
    )


class Halting:
    """Halts a run after so many steps, when its last checkpoint has been copied."""

    def __init__(self, steps: int, copy: Remote):
        self.left = steps
        self.copy = copy

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_fresh_machine_goes_on_from_the_copy_to_the_same_bits(
    tiny, token_folder, tmp_path, url
):
    recipe = tiny(["ema"])
    calm = run(recipe, OFTEN, token_folder, Record(tmp_path / "calm"), warn=quiet)
    first = Record(tmp_path / "first" / "abcd")
    copy = of(url, first.folder)
    with pytest.raises(Halted):
        halts = Halting(5, copy)
        run(recipe, OFTEN, token_folder, first, warn=quiet, halts=halts, saved=copy.push)
    copy.finish()
    said: list[str] = []
    second = Record(tmp_path / "second" / "abcd")
    brought = of(url, second.folder, said.append)
    assert brought.fetch()
    assert said == [f"run abcd goes on from its copy in {url}"]
    logged: list[int] = []
    again = run(
        recipe,
        OFTEN,
        token_folder,
        second,
        log=lambda step, scalars, seconds: logged.append(step),
        warn=said.append,
    )
    assert logged == list(range(6, 13))
    assert again.weights == calm.weights
    assert (
        second.metrics_path.read_bytes() == Record(tmp_path / "calm").metrics_path.read_bytes()
    )
    brought.finish()
    kept = manifest_in(url, "abcd")
    assert {"result.json", "weights.safetensors", "metrics.jsonl"} <= kept.keys()
    assert not [name for name in kept if name.startswith("checkpoints/")]


def test_what_the_copy_holds_of_a_run_that_has_ended_is_its_result(
    tiny, token_folder, tmp_path, url
):
    first = Record(tmp_path / "first" / "abcd")
    ended = run(tiny(), OFTEN, token_folder, first, warn=quiet)
    of(url, first.folder).finish()
    second = Record(tmp_path / "second" / "abcd")
    assert of(url, second.folder).fetch()
    assert second.sound_result(quiet) == ended
    files, root = fsspec.core.url_to_fs(url)
    objects = {Path(path).name for path in files.ls(f"{root}/runs/abcd", detail=False)}
    digests = {one.digest for one in manifest_in(url, "abcd").values()}
    assert objects == digests | {"manifest.json"}


def test_what_is_here_is_not_fetched(tmp_path, url):
    folder = tmp_path / "abcd"
    folder.mkdir()
    (folder / "notes").write_text("x")
    of(url, folder).finish()
    (folder / "result.json").write_text("{}")
    assert not of(url, folder).fetch()


@pytest.mark.parametrize("flaw", ["object", "manifest", "outside"])
def test_a_damaged_copy_is_named_and_not_taken(tmp_path, url, flaw):
    folder = tmp_path / "abcd"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("one line")
    of(url, folder).finish()
    files, root = fsspec.core.url_to_fs(url)
    place = f"{root}/runs/abcd"
    manifest = manifest_in(url, "abcd")
    [one] = manifest.values()
    if flaw == "object":
        files.pipe_file(f"{place}/{one.digest}", b"another")
    elif flaw == "manifest":
        files.pipe_file(f"{place}/manifest.json", b"{")
    else:
        odd = msgspec.json.encode({"../../outside": one})
        files.pipe_file(f"{place}/manifest.json", odd)
    said: list[str] = []
    fresh = tmp_path / "fresh" / "abcd"
    assert not of(url, fresh, said.append).fetch()
    assert len(said) == 1
    assert "training goes on without it" in said[0]
    assert not list(tmp_path.rglob("outside"))
    assert not (fresh / "metrics.jsonl").exists()


class Down:
    """A file system that refuses, or does not answer until it is let."""

    def __init__(self, hangs: bool = False):
        self.hangs = hangs
        self.may = threading.Event()

    def __getattr__(self, name: str):
        def refuse(*words, **more):
            if self.hangs:
                self.may.wait(60)
            raise ConnectionError("no route to host")

        return refuse


def test_a_mirror_that_is_down_costs_one_line(tiny, token_folder, tmp_path):
    said: list[str] = []
    record = Record(tmp_path / "abcd")
    copy = of("memory://down", record.folder, said.append)
    copy.files = Down()
    assert not copy.fetch()
    ended = run(tiny(), OFTEN, token_folder, record, warn=quiet, saved=copy.push)
    copy.finish()
    assert ended.status == "finished"
    assert said == [
        "mirror memory://down: ConnectionError: no route to host; training goes on without it"
    ]


def test_a_mirror_that_hangs_is_waited_for_once_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS_TO_ANSWER", 0.05)
    said: list[str] = []
    copy = of("memory://hung", tmp_path / "abcd", said.append)
    copy.files = Down(hangs=True)
    began = time.monotonic()
    assert not copy.fetch()
    assert time.monotonic() - began < 30
    assert "it did not answer within 0 s; training goes on without it" in said[0]
    assert isinstance(of("memory://hung", tmp_path / "next"), mirror.NoMirror)
    copy.files.may.set()


def test_a_url_that_nothing_here_opens_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"runtime.mirror=odd://there cannot be opened"):
        of("odd://me:x@there", tmp_path)


def test_checkpoints_are_never_read_from_a_copy_half_made(tmp_path, url):
    """The manifest is written last: until then a fresh machine finds nothing."""
    folder = tmp_path / "abcd"
    import torch

    checkpoint.write(folder / "checkpoints", 5, {"a": torch.ones(3)})
    copy = of(url, folder)
    copy._name = lambda manifest: (_ for _ in ()).throw(ConnectionError("gone"))
    copy.finish()
    assert not of(url, tmp_path / "fresh" / "abcd").fetch()
