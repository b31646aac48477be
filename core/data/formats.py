"""Files that hold text, known by their suffixes, and how they are unpacked."""

import gzip
import lzma
import zlib
from pathlib import Path
from typing import IO, Protocol

from ablab.core.errors import UserError

FORMATS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")  # in any case: .JSONL too
PACKED = (".gz", ".xz", ".zst")
# What reading a broken packed file raises.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Source(Protocol):
    """Bytes in their order."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


def format_of(path: Path) -> str:
    """The suffix without the packing, in lower case; empty if it is not known."""
    suffix = unpacked_name(path).suffix.lower()
    return suffix if suffix in FORMATS else ""


def packing(path: Path) -> str:
    """.gz, .xz or .zst, in lower case; empty for a plain file."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if packing(path) else path


class Unpacked:
    """A file opened for reading what is packed in it."""

    def __init__(self, path: Path):
        self.raw = open(path, "rb")  # noqa: SIM115  closed by `__exit__`
        self.file = _unpacking(self.raw, packing(path))

    @property
    def done(self) -> int:
        """Bytes of the packed file that have been read: nobody knows how many there are unpacked."""
        return self.raw.tell()

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(self, *fault: object) -> None:
        self.file.close()
        self.raw.close()


def _unpacking(raw: IO[bytes], how: str) -> Source:
    match how:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".zst":
            return _zstd(raw)
    return raw


def _zstd(raw: IO[bytes]) -> Source:
    """Arrow reads several frames and notices a torn one; the package `zstandard` ends there in silence (0.25)."""
    import pyarrow

    stream: Source = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return stream


def told_unreadable(path: Path, flaw: Exception) -> UserError:
    return UserError(f"cannot read {path}: {flaw}; check the file, or fetch it again")
