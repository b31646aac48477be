"""Writing files so that a kill, a full disk or a read-only folder leaves nothing half-written."""

import os
import secrets
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from urllib.parse import quote

import msgspec

from ablab.core.errors import UserError

# What decoding a damaged file raises.  One byte that is not UTF-8 is no MsgspecError.
FLAWS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


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
    """Write `content` to `path` in one step: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{OURS}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


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
    """The file to lock while `path` changes.  A folder in its place, which nobody could lock, goes aside."""
    lock = path.with_name(f".{path.name}.lock")
    if lock.is_dir():
        set_aside(lock)
    return lock


def sqlite_url(path: Path) -> str:
    """Of a database file, whatever its name: `?`, `%` and braces mean something in a URL."""
    return f"sqlite:///{quote(str(path))}"
