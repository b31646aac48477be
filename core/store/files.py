"""Writing files so that a kill, a full disk or a read-only folder leaves nothing half-written."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from ablab.core.errors import UserError


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
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
    """Rename a damaged file to NAME.damaged, where nobody reads it; another process may have done so already."""
    aside = path.with_name(f"{path.name}.damaged")
    with suppress(FileNotFoundError):
        path.replace(aside)
    return aside


def sqlite_url(path: Path) -> str:
    """Of a database file, whatever its name: `?`, `%` and braces mean something in a URL."""
    return f"sqlite:///{quote(str(path))}"
