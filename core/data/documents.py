"""Documents: text out of JSONL, Parquet and plain files, one string at a time.  Nothing is held but one batch."""

import glob
import gzip
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ablab.core.errors import UserError

FORMATS = (".jsonl", ".json", ".txt", ".parquet")
PACKED = (".gz", ".xz", ".zst")
Source = IO[bytes] | gzip.GzipFile
# Where a document stands, for messages, and what stands there.
Placed = Iterator[tuple[str, Any]]


def documents(paths: Iterable[str | Path], field: str = "text") -> Iterator[str]:
    """Yield the text of every document, path by path; a folder or a glob stands for its files, sorted.

    .jsonl .json   one object a line, its text under `field`; blank lines are skipped
    .txt           one document
    .parquet       the column `field`, streamed
    Each may be packed (.gz, .xz; .zst from Python 3.14).  In a folder, hidden and other files are passed over;
    documents of no characters are skipped.
    Raises UserError: nothing there, unknown suffix, unreadable or empty file, a line or row without text.
    """
    return chain.from_iterable(_read(path, field) for path in expand(paths))


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The files that `paths` stand for, each once.  Raises UserError: nothing there, unknown suffix."""
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        found = _files_of(path)
        if not found:
            raise UserError(
                f"no text at {path}; name a file, a folder or a quoted glob of {', '.join(FORMATS)} files"
            )
        files |= dict.fromkeys(found)
    for file in files:
        if not _format(file):
            raise UserError(
                f"{file}: unknown suffix; known: {', '.join(FORMATS)}, each also with {', '.join(PACKED)}"
            )
    return list(files)


def _files_of(path: Path) -> list[Path]:
    """A folder's visible files of a known format, a file itself, or what a glob matches; sorted."""
    if path.is_dir():
        below = [file for file in path.rglob("*") if file.is_file() and _format(file)]
        return sorted(file for file in below if not _hidden(file.relative_to(path)))
    if path.exists():
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(path: Path) -> str:
    """The suffix without the packing; empty if it is not known."""
    suffix = (path.with_suffix("") if path.suffix in PACKED else path).suffix
    return suffix if suffix in FORMATS else ""


def _read(path: Path, field: str) -> Iterator[str]:
    """The texts of one file."""
    reader = {".txt": _text, ".parquet": _parquet}.get(_format(path), _lines)
    empty = True
    try:
        with _unpacked(path) as file:
            for place, text in reader(file, path, field):
                empty = False
                if _checked(text, place, field):
                    yield text
    except UnicodeDecodeError as flaw:
        raise UserError(
            f"{path} is not UTF-8 text ({flaw.reason} at byte {flaw.start}); convert it"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as flaw:
        raise UserError(
            f"cannot read {path}: {flaw}; check the file, or fetch it again"
        ) from None
    if empty:
        raise UserError(f"{path} is empty; drop it or fetch it again")


def _checked(text: Any, place: str, field: str) -> str:
    """The text, if it is one that UTF-8 can hold."""
    if not isinstance(text, str):
        raise UserError(
            f"{place}: {field!r} must be text, not {text!r:.40}; drop it or choose another --field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as flaw:  # a lone surrogate, "\ud800", is legal JSON and no text
        raise UserError(
            f"{place} is not UTF-8 text ({flaw.reason} at character {flaw.start}); drop it"
        ) from None
    return text


def _unpacked(path: Path) -> Source:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return _zstd(path)
    return open(path, "rb")


def _zstd(path: Path) -> Source:
    try:
        zstd = import_module("compression.zstd")
    except ImportError:
        raise UserError(
            f"{path}: .zst needs Python 3.14 or later; unpack it first: zstd -d {path}"
        ) from None
    return zstd.open(path)


# -- readers, one a format ---------------------------------------------------------------------------------------------


def _lines(file: Source, path: Path, field: str) -> Placed:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as flaw:
            raise UserError(
                f"{place} is not JSON ({flaw}); each line must hold one object with the key {field!r}"
            ) from None
        if not isinstance(record, dict) or field not in record:
            raise UserError(
                f"{place} has no key {field!r}, only: {_keys(record)}; choose one with --field"
            )
        yield place, record[field]


def _keys(record: Any) -> str:
    """What a line holds instead."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}"
    return ", ".join(record) or "{}"


def _text(file: Source, path: Path, field: str) -> Placed:
    if content := file.read():
        yield str(path), content.decode()


def _parquet(file: Source, path: Path, field: str) -> Placed:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(_seekable(file, path))
        if field not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise UserError(
                f"{path} has no column {field!r}, only: {columns}; choose one with --field"
            )
        batches = table.iter_batches(batch_size=1024, columns=[field])
        texts = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, text in enumerate(texts, 1):
            yield f"{path} row {row}", text
    except pyarrow.ArrowException as flaw:
        first_line = next(iter(str(flaw).splitlines()), type(flaw).__name__)
        raise UserError(f"{path} is not Parquet ({first_line}); fetch it again") from None


def _seekable(file: Source, path: Path) -> Source:
    """Parquet is read from its end, and seeking in a packed stream would unpack it each time: unpack it once."""
    if path.suffix not in PACKED:
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  closed with the last reference
    shutil.copyfileobj(file, unpacked)
    return unpacked
