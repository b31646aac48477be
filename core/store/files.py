"""Writing files so that a kill, a full disk or a read-only folder leaves nothing half-written."""

import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import msgspec

from ablab.core.errors import UserError

# What decoding a damaged file raises.  One byte that is not UTF-8 is no MsgspecError.
FLAWS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
PARTIAL = re.compile(r"\..+?\.(\d+)(-[0-9a-f]+)?\.partial")  # what a process of that id writes
# Seconds without a write.  A process that is not seen here may be one of another machine that shares the folder.
LEFT_BY_THE_DEAD, LEFT_BY_ANYONE = 60.0, 86400.0


# Processes of two hosts may have one number, and write to one folder.
OURS = secrets.token_hex(4)


@contextmanager
def writing(path: Path):
    """Turn an OS refusal while `path` is written into one line that names it."""
    try:
        yield
    except OSError as refusal:
        raise UserError(
            f"cannot write {path}: {refusal.strerror or refusal}; "
            "free space or permission there, or choose another folder"
        ) from refusal


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step: a reader sees the old file or the new one, never a part.

    What writers that were killed have left half-written in the same folder goes.
    """
    with Growing(path) as file:
        file.write(content)
        file.appear()
    _sweep(path.parent)


def unfenced() -> None:
    """Nobody else writes here."""


class Growing:
    """A file that appears under its name in one step, when all of it is on the disk, or never."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}-{OURS}.partial")

    def __enter__(self) -> "Growing":
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.partial, "wb")
        return self

    def write(self, part: bytes | memoryview) -> None:
        with writing(self.path):
            self.file.write(part)

    def appear(self, name: str = "", fence: Callable[[], None] = unfenced) -> Path:
        """name: by which it appears, where that is known only now.  fence: asked when all of it is on the disk."""
        self.path = self.path.with_name(name) if name else self.path
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            fence()
            os.replace(self.partial, self.path)
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what it could not keep was said
            self.file.close()
        self.partial.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    with suppress(OSError):  # another process sweeps too
        for name in os.listdir(folder):
            if (written := PARTIAL.fullmatch(name)) and _is_left(
                folder / name, int(written[1])
            ):
                os.unlink(folder / name)


def _is_left(partial: Path, writer: int) -> bool:
    """Whether nobody goes on writing it.  A folder is another's work in progress."""
    age = time.time() - partial.stat().st_mtime
    if not partial.is_file() or age < LEFT_BY_THE_DEAD:
        return False
    return age > LEFT_BY_ANYONE or not _lives(writer)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def set_aside(path: Path) -> Path:
    """Rename a damaged file to NAME.damaged, where nobody reads it; another process may have done so already.

    A folder that stands where a file should be finds a number behind that name: it replaces nothing.
    """
    aside = path.with_name(f"{path.name}.damaged")
    if path.is_dir() or aside.is_dir():
        numbered = (path.with_name(f"{path.name}.damaged.{n}") for n in count(1))
        aside = next(name for name in numbered if not name.exists())
    with writing(path), suppress(FileNotFoundError):
        path.replace(aside)
    return aside


def lock_beside(path: Path) -> Path:
    """The file to lock while `path` changes."""
    lock = path.with_name(f".{path.name}.lock")
    clear_the_lock(lock)
    return lock


def clear_the_lock(lock: Path) -> bool:
    """Set aside what stands in the place of a lock and nobody could lock: a folder, a link.  Whether there was any."""
    wrong = lock.is_symlink() or lock.is_dir()
    if wrong:
        set_aside(lock)
    return wrong


def sqlite_url(path: Path) -> str:
    """Of a database file, whatever its name: `?`, `%` and braces mean something in a URL."""
    return f"sqlite:///{quote(str(path))}"
