"""Documents: text out of JSONL, Parquet and plain files, one string at a time.  Nothing is held but one batch."""

import glob
import gzip
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from ablab.core.errors import UserError

FORMATS = (".jsonl", ".json", ".txt", ".parquet")
PACKED = (".gz", ".xz", ".zst")


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
        if path.is_dir():
            below = (
                file.relative_to(path)
                for file in path.rglob("*")
                if file.is_file() and _format(file)
            )
            found = sorted(
                path / file
                for file in below
                if not any(part.startswith(".") for part in file.parts)
            )
        else:
            found = (
                [path]
                if path.exists()
                else sorted(map(Path, glob.glob(str(path), recursive=True)))
            )
        if not found:
            raise UserError(
                f"no text at {path}; name a file, a folder or a quoted glob of {', '.join(FORMATS)} files"
            )
        files.update(dict.fromkeys(found))
    for file in files:
        if not _format(file):
            raise UserError(
                f"{file}: unknown suffix; known: {', '.join(FORMATS)}, each also with {', '.join(PACKED)}"
            )
    return list(files)


def _format(path: Path) -> str | None:
    suffix = (path.with_suffix("") if path.suffix in PACKED else path).suffix
    return suffix if suffix in FORMATS else None


def _read(path: Path, field: str) -> Iterator[str]:
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


def _checked(text, place, field: str) -> str:
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


def _unpacked(path: Path):
    if path.suffix == ".zst":
        try:
            from compression import zstd
        except ImportError:
            raise UserError(
                f"{path}: .zst needs Python 3.14 or later; unpack it first: zstd -d {path}"
            ) from None
        return zstd.open(path)
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def _lines(file, path: Path, field: str):
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as flaw:
            raise UserError(
                f"{place} is not JSON ({flaw}); each line must hold one object with the key {field!r}"
            ) from None
        if not isinstance(record, dict) or field not in record:
            keys = (
                ", ".join(record) or "{}"
                if isinstance(record, dict)
                else f"a {type(record).__name__}"
            )
            raise UserError(
                f"{place} has no key {field!r}, only: {keys}; choose one with --field"
            )
        yield place, record[field]


def _text(file, path: Path, field: str):
    if content := file.read():
        yield path, content.decode()


def _parquet(file, path: Path, field: str):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if (
        path.suffix in PACKED
    ):  # Parquet is read from its end; seeking in a packed stream would unpack it each time
        packed, file = file, tempfile.TemporaryFile()  # noqa: SIM115
        shutil.copyfileobj(packed, file)
    try:
        table = ParquetFile(file)
        if field not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise UserError(
                f"{path} has no column {field!r}, only: {columns}; choose one with --field"
            )
        batches = table.iter_batches(batch_size=1024, columns=[field])
        for row, text in enumerate(
            (text for batch in batches for text in batch.column(0).to_pylist()), 1
        ):
            yield f"{path} row {row}", text
    except pyarrow.ArrowInvalid as flaw:
        raise UserError(
            f"{path} is not Parquet ({str(flaw).splitlines()[0]}); fetch it again"
        ) from None
