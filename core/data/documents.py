"""Documents: text out of JSONL, Parquet and plain files, one string at a time.  Nothing is held but one batch."""

import glob
import gzip
import json
import lzma
import os
import shutil
import tempfile
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ablab.core.errors import UserError

FORMATS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")  # in any case: .JSONL too
PACKED = (".gz", ".xz", ".zst")
Source = IO[bytes] | gzip.GzipFile
Identity = tuple[int, int] | Path  # of a file or folder: device and inode
# Where a document stands, for messages, and what stands there.
Placed = Iterator[tuple[str, Any]]


def documents(paths: Iterable[str | Path], field: str = "text") -> Iterator[str]:
    """Yield the text of every document, path by path; a folder or a glob stands for its files, sorted.

    .jsonl .ndjson .json   one object a line, its text under `field`; blank lines are skipped
    .txt                   one document; a byte-order mark at its head is no text
    .parquet               the column `field`, streamed
    Each may be packed (.gz, .xz; .zst from Python 3.14).  In a folder, hidden and other files are passed over;
    documents of no characters are skipped.
    Raises UserError: what `expand` refuses, an unreadable or empty file, a line or row without text, or with two.
    """
    return chain.from_iterable(_read(path, field) for path in expand(paths))


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The files that `paths` stand for, each once, whatever it is called: by a link, `./`, or another spelling.

    Raises UserError: nothing there, unknown suffix, a link to nothing, one text both packed and plain.
    """
    files: dict[Identity, Path] = {}
    for path in map(Path, paths):
        found = _files_of(path)
        if not found:
            raise UserError(
                f"no text at {path}; name a file, a folder or a quoted glob of {', '.join(FORMATS)} files"
            )
        for file in found:
            files.setdefault(identity(file), file)
    for file in files.values():
        if not _format(file):
            raise UserError(
                f"{file}: unknown suffix; known: {', '.join(FORMATS)}, each also with {', '.join(PACKED)}"
            )
        if not file.is_file():
            raise UserError(f"{file} is no file that can be read twice; name a file")
    _check_once(files.values())
    return list(files.values())


def passed_over(paths: Iterable[str | Path]) -> list[Path]:
    """The visible files in the folders among `paths` that hold no known format, sorted."""
    folders = [path for path in map(Path, paths) if path.is_dir()]
    return [file for folder in folders for file in _visible(folder) if not _format(file)]


def identity(file: Path) -> Identity:
    """Equal for two names of one file.  Raises UserError: nothing there, a link to nothing."""
    try:
        status = file.stat()
    except OSError as flaw:
        raise UserError(
            f"cannot read {file}: {flaw.strerror}; mend it, or take it out of the text"
        ) from None
    # Some network file systems number no file.
    return (status.st_dev, status.st_ino) if status.st_ino else file.resolve()


def _check_once(files: Iterable[Path]) -> None:
    """Refuse a.jsonl beside a.jsonl.gz: unpacking leaves both behind, and the text would count twice."""
    plain: dict[Path, Path] = {}
    for file in files:
        name = _unpacked_name(Path(os.path.abspath(file)))
        other = plain.setdefault(name, file)
        if other is not file:
            raise UserError(
                f"{other} and {file.name} are one text under two packings; drop one, or rename it"
            )


def _files_of(path: Path) -> list[Path]:
    """A folder's visible files of a known format, a file itself, or what a glob matches; sorted."""
    if path.is_dir():
        return [file for file in _visible(path) if _format(file)]
    if path.exists():
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True)))


def _visible(folder: Path) -> list[Path]:
    """The files below, hidden ones left out, sorted; linked folders are entered, each folder once."""
    return sorted(_below(folder, set()))


def _below(folder: Path, entered: set[Identity]) -> Iterator[Path]:
    here = identity(folder)
    if here in entered:  # by another link, or from below
        return
    entered.add(here)
    for name in _names_in(folder):
        path = folder / name
        if path.is_dir():
            yield from _below(path, entered)
        else:
            yield path


def _names_in(folder: Path) -> list[str]:
    """Sorted: of two links to one folder the first gives the names."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as flaw:
        raise UserError(
            f"cannot read {folder}: {flaw.strerror}; mend it, or take it out of the text"
        ) from None


def _format(path: Path) -> str:
    """The suffix without the packing, in lower case; empty if it is not known."""
    suffix = _unpacked_name(path).suffix.lower()
    return suffix if suffix in FORMATS else ""


def _packing(path: Path) -> str:
    """.gz, .xz or .zst, in lower case; empty for a plain file."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def _unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if _packing(path) else path


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
    match _packing(path):
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
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
    once = partial(_once, field)
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as flaw:
            raise UserError(
                f"{place} is not JSON ({flaw}); each line must hold one object with the key {field!r}"
            ) from None
        if not isinstance(record, dict) or field not in record:
            raise UserError(
                f"{place} has no key {field!r}, only: {_keys(record)}; choose one with --field"
            )
        yield place, record[field]


def _once(field: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values under one key JSON's readers keep the last: a text would be lost."""
    if [key for key, _ in pairs].count(field) > 1:
        raise ValueError(f"two values under the key {field!r}")
    return dict(pairs)


def _keys(record: Any) -> str:
    """What a line holds instead."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}"
    return _listed(record) or "{}"


def _listed(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(names), 100, placeholder=" ...")


def _text(file: Source, path: Path, field: str) -> Placed:
    if content := file.read().decode("utf-8-sig"):
        yield str(path), content


def _parquet(file: Source, path: Path, field: str) -> Placed:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(_seekable(file, path))
        _check_column(path, field, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=1024, columns=[field])
        texts = chain.from_iterable(batch.column(field).to_pylist() for batch in batches)
        for row, text in enumerate(texts, 1):
            yield f"{path} row {row}", text
    except pyarrow.ArrowException as flaw:
        first_line = next(iter(str(flaw).splitlines()), type(flaw).__name__)
        first_line = textwrap.shorten(first_line, 100, placeholder=" ...")
        raise UserError(f"{path} is not Parquet ({first_line}); fetch it again") from None


def _check_column(path: Path, field: str, columns: list[str]) -> None:
    if field not in columns:
        raise UserError(
            f"{path} has no column {field!r}, only: {_listed(columns)}; choose one with --field"
        )
    if columns.count(field) > 1:
        raise UserError(
            f"{path} has {columns.count(field)} columns {field!r}, and one must hold the text; "
            "rename or drop the others"
        )


def _seekable(file: Source, path: Path) -> Source:
    """Parquet is read from its end, and seeking in a packed stream would unpack it each time: unpack it once."""
    if not _packing(path):
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  closed with the last reference
    shutil.copyfileobj(file, unpacked)
    return unpacked
