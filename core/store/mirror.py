"""A second copy of run folders, in an object store or wherever fsspec writes, so that a fresh machine can go on.

    URL/runs/ID/OBJECT          a file by the digest of its content, so that no upload changes what another made
    URL/runs/ID/manifest.json   name -> digest and bytes of each file; written last

A thread copies, after each checkpoint and at the end; training waits for none of it.  A place that is down, slow or
full costs a line and the copy, never the run.
"""

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from ablab.core.errors import UserError, told, without_password
from ablab.core.store.claim import Lost
from ablab.core.store.files import Growing

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SECONDS_TO_ANSWER = 20.0
SECONDS_TO_FETCH = 600.0
SECONDS_TO_END = 60.0  # that the last copy of a run is waited for
SECONDS_LEFT_ALONE = 600.0  # after a place did not answer
PIECE = 1 << 22  # bytes
SMALL = 1 << 26  # bytes, read at once

T = TypeVar("T")


@dataclass(frozen=True)
class Copied:
    """One file of a manifest."""

    digest: str
    bytes: int


Manifest = dict[str, Copied]  # by its name in the run folder


class Mirror(Protocol):
    """Of one run."""

    def fetch(self) -> bool:
        """Bring the run here, if it is there and nothing is here.  Whether it was brought."""

    def push(self) -> None:
        """Begin to copy what the folder holds now, unless a copy is still under way."""

    def finish(self, seconds: float = SECONDS_TO_END) -> None:
        """Copy what the folder holds in the end, and wait for it so long."""


class NoMirror:
    """The folder has no second copy."""

    def fetch(self) -> bool:
        return False

    def push(self) -> None: ...

    def finish(self, seconds: float = SECONDS_TO_END) -> None: ...


def mirror_of(
    url: str, folder: Path, say: Callable[[str], None], fence: Callable[[], None]
) -> Mirror:
    """url: "" for none.  folder: of the run.  say: told once what went wrong.  fence: as of a record.

    Raises UserError for an odd URL.
    """
    hung = time.monotonic() - _hung.get(url, -SECONDS_LEFT_ALONE) < SECONDS_LEFT_ALONE
    return Remote(url, folder, say, fence) if url and not hung else NoMirror()


_hung: dict[str, float] = {}  # URL -> when it did not answer: the next runs do not wait for it


def opened(url: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a URL, and the path in it.  Raises UserError where fsspec lacks it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, **({"auto_mkdir": True} if _is_local(url) else {}))
    except (ImportError, ValueError) as flaw:
        raise UserError(
            f"runtime.mirror={without_password(url)} cannot be opened: {told(flaw)}; "
            "install what it names (for s3:// that is s3fs), or use another URL"
        ) from None


def _is_local(url: str) -> bool:
    return url.startswith("file://") or "://" not in url


@dataclass
class Remote:
    """A copy elsewhere."""

    url: str
    folder: Path
    say: Callable[[str], None]
    fence: Callable[[], None]
    known: Manifest = field(default_factory=dict)  # what is there
    under_way: "Future[None] | None" = None
    has_said: bool = False

    def __post_init__(self) -> None:
        self.files, root = opened(self.url)
        self.place = f"{root.rstrip('/')}/runs/{self.folder.name}"
        self.thread = ThreadPoolExecutor(1, "ablab-mirror")

    def fetch(self) -> bool:
        here = (self.folder / "result.json").exists() or any(
            self.folder.glob("checkpoints/step-*")
        )
        if here:
            return False
        manifest = self._in_time(self._read, SECONDS_TO_ANSWER)
        if not manifest:
            return False
        return bool(self._in_time(partial(self._bring_all, manifest), SECONDS_TO_FETCH))

    def push(self) -> None:
        if self.under_way is None or self.under_way.done():
            self.under_way = self.thread.submit(self._push)

    def finish(self, seconds: float = SECONDS_TO_END) -> None:
        self._in_time(self._push, seconds)
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _in_time(self, work: Callable[[], T], seconds: float) -> T | None:
        """None, after a line, where it takes longer or fails."""
        try:
            return self.thread.submit(work).result(timeout=seconds)
        except TimeoutError:
            _hung[self.url] = time.monotonic()
            self._complain(f"it did not answer within {seconds:.0f} s")
        return None

    def _complain(self, why: str) -> None:
        """Once: a mirror that is down is down at every checkpoint."""
        if not self.has_said:
            self.has_said = True
            self.say(f"mirror {without_password(self.url)}: {why}; training goes on without it")

    # -- in the thread ---------------------------------------------------------------------------------------------
    def _push(self) -> None:
        try:
            there = {one.digest for one in self.known.values()}
            manifest: Manifest = {}
            for path in _files(self.folder):
                with suppress(FileNotFoundError):  # an old checkpoint went meanwhile
                    name = str(path.relative_to(self.folder))
                    manifest[name] = self._copy(path, there)
            self.fence()
            self._name(manifest)
            self._sweep(there - {one.digest for one in manifest.values()})
            self.known = manifest
        except Lost:
            return
        except Exception as down:  # of anybody's file system
            self._complain(told(down))

    def _copy(self, path: Path, there: Collection[str]) -> Copied:
        """A log grows while it is read: what is small is read once.  What is large does not change."""
        size = path.stat().st_size
        content = path.read_bytes() if size < SMALL else None
        copied = Copied(_digest_of(path), size) if content is None else _of(content)
        place = f"{self.place}/{copied.digest}"
        if copied.digest in there:
            return copied
        if content is None:
            self.files.put_file(str(path), place)
        else:
            self.files.pipe_file(place, content)
        return copied

    def _name(self, manifest: Manifest) -> None:
        """In one step, also where a file is seen while it is written."""
        new = f"{self.place}/manifest.new"
        self.files.pipe_file(new, msgspec.json.encode(manifest))
        self.files.mv(new, f"{self.place}/manifest.json")

    def _sweep(self, digests: set[str]) -> None:
        for digest in digests:
            with suppress(FileNotFoundError):
                self.files.rm_file(f"{self.place}/{digest}")

    def _read(self) -> Manifest:
        """Empty where the run has no copy, or none that can be read."""
        try:
            said = self.files.cat_file(f"{self.place}/manifest.json")
            return msgspec.json.decode(said, type=Manifest)
        except FileNotFoundError:
            return {}
        except Exception as flaw:  # of anybody's file system
            self._complain(told(flaw))
            return {}

    def _bring_all(self, manifest: Manifest) -> bool:
        try:
            for name, one in manifest.items():
                self._bring(name, one)
        except Exception as flaw:  # of anybody's file system
            self._complain(f"the copy of run {self.folder.name} cannot be taken ({told(flaw)})")
            return False
        self.known = manifest
        self.say(
            f"run {self.folder.name} goes on from its copy in {without_password(self.url)}"
        )
        return True

    def _bring(self, name: str, one: Copied) -> None:
        """A file, if it is what the manifest says.  Raises ValueError."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name} is no file of a run")
        total = sha256()
        with (
            self.files.open(f"{self.place}/{one.digest}", "rb") as there,
            Growing(path) as here,
        ):
            while part := there.read(PIECE):
                total.update(part)
                here.write(part)
            if total.hexdigest() != one.digest:
                raise ValueError(f"{name} is not what the manifest says")
            here.appear()


def _files(folder: Path) -> Iterator[Path]:
    """What a run leaves for good; the result last, so that no copy holds it without the rest."""
    found = [path for path in folder.rglob("*") if path.is_file() and _stays(path, folder)]
    yield from sorted(found, key=lambda path: path.name == "result.json")


def _stays(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and ".damaged" not in path.name


def _of(content: bytes) -> Copied:
    return Copied(sha256(content).hexdigest(), len(content))


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
