"""Blocks: files cut where documents meet, and each block read by itself, in whatever process.

    cut(path, reading)   -> blocks, some megabytes each: raw lines, row groups of Parquet, rows of a data set
    texts(block, ...)    -> its documents, in order

Where a file is cut leaves no trace: the documents of its blocks in a row are the documents of the file.
"""

import io
import json
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ablab.core.data.formats import UNREADABLE, Unpacked, format_of, packing, told_unreadable
from ablab.core.errors import UserError

BLOCK = 4_000_000  # bytes of a block, about; a document is never cut
LINES = "lines"
PARAGRAPHS = "paragraphs"
BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
LEADING_BLANK_LINES = re.compile(r"\A(?:[ \t\r]*\n)+")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Where a document stands, for messages, and what stands there.
Placed = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Reading:
    """How text is read.

    field: the JSON key or Parquet column that holds it.
    split: of plain text: null, a file is one document; `lines`, `paragraphs` (blank lines part them), or the words
           that part them.
    """

    field: str = "text"
    split: str | None = None


@dataclass(frozen=True)
class Block:
    """Documents that follow each other in one file.  Plain data: it crosses a pipe.

    content: bytes as they stand in the file; the numbers of row groups; or texts that were read already.
    """

    path: Path
    number: int  # of the block in its file, from 0
    content: "bytes | tuple[int, ...] | list[str]"
    line: int = 1  # its first line, or row
    offset: int = 0  # bytes of text before it in the file
    done: int = 0  # bytes of the file, packed as it is, that were read up to its end


@dataclass
class Skipped:
    """Rows that were passed over, at most `most` of them: where and why."""

    most: int = 0
    rows: list[str] = field(default_factory=list)

    def over(self, flaw: UserError) -> None:
        """Raises the flaw where no more may be passed over."""
        if len(self.rows) >= self.most:
            raise flaw
        self.rows.append(str(flaw))


# -- cutting -----------------------------------------------------------------------------------------------------------


def cut(path: Path, reading: Reading) -> Iterator[Block]:
    """The blocks of a file.  Raises UserError for one that cannot be read."""
    try:
        if format_of(path) == ".parquet":
            yield from _row_groups(path, reading)
        elif format_of(path) == ".txt" and reading.split is None:
            with Unpacked(path) as opened:
                yield Block(path, 0, opened.file.read(), done=opened.done)
        else:
            yield from _pieces(path, _parting(path, reading))
    except UNREADABLE as flaw:
        raise told_unreadable(path, flaw) from None


def _parting(path: Path, reading: Reading) -> re.Pattern[bytes]:
    """That behind which a file may be cut."""
    if format_of(path) != ".txt" or reading.split == LINES:
        return re.compile(rb"\n")
    if reading.split == PARAGRAPHS:
        return re.compile(rb"\n\r?\n")
    return re.compile(re.escape((reading.split or "").encode()))


def _pieces(path: Path, parting: re.Pattern[bytes]) -> Iterator[Block]:
    """BLOCK bytes each and what is missing to the next parting."""
    with Unpacked(path) as opened:
        number, line, offset = 0, 1, 0
        kept = bytearray()
        more = True
        while more:
            chunk = opened.file.read(BLOCK)
            more = bool(chunk)
            kept += chunk
            end = _last_end(parting, kept) if more else len(kept)
            if not end:
                continue
            content = bytes(kept[:end])
            yield Block(path, number, content, line, offset, opened.done)
            number += 1
            line += content.count(b"\n")
            offset += end
            del kept[:end]


def _last_end(parting: re.Pattern[bytes], text: bytearray) -> int:
    """Where the last parting ends; 0 where there is none.  Forward: partings may overlap, as blank lines do."""
    if parting.pattern == rb"\n":
        return text.rfind(b"\n") + 1
    end = 0
    for found in parting.finditer(text):
        end = found.end()
    return end


def _row_groups(path: Path, reading: Reading) -> Iterator[Block]:
    """Row groups, as many as make BLOCK bytes; a packed file in one."""
    size = path.stat().st_size
    if packing(path):
        yield Block(path, 0, (), done=size)
        return
    with open(path, "rb") as file, _told_as_parquet(path):
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(file)
        _check_column(path, reading.field, table.schema_arrow.names)
        groups = table.metadata.num_row_groups
        taken: list[int] = []
        row, rows, weight, number = 1, 0, 0, 0
        for group in range(groups):
            described = table.metadata.row_group(group)
            taken.append(group)
            rows += described.num_rows
            weight += described.total_byte_size
            if weight >= BLOCK or group == groups - 1:
                done = size * (group + 1) // groups
                yield Block(path, number, tuple(taken), row, 0, done)
                row, rows, weight, number = row + rows, 0, 0, number + 1
                taken = []


# -- reading -----------------------------------------------------------------------------------------------------------


def texts(block: Block, reading: Reading, skipped: Skipped) -> Iterator[str]:
    """The documents of a block; those of no characters are yielded too, so that what is empty can be told.

    Raises UserError for a row without text, where `skipped` takes no more.
    """
    try:
        for place, found in _rows(block, reading, skipped):
            try:
                yield _checked(found, place, reading.field)
            except UserError as flaw:
                skipped.over(flaw)
    except UnicodeDecodeError as flaw:
        raise UserError(
            f"{block.path} is not UTF-8 text ({flaw.reason} at byte {block.offset + flaw.start}); "
            "convert it"
        ) from None
    except UNREADABLE as flaw:
        raise told_unreadable(block.path, flaw) from None


def _rows(block: Block, reading: Reading, skipped: Skipped) -> Placed:
    match block.content:
        case list(found):
            return (
                (f"{block.path} row {row}", text) for row, text in enumerate(found, block.line)
            )
        case bytes(raw) if format_of(block.path) == ".txt":
            return _plain(block, raw, reading.split)
        case bytes(raw):
            return _lines(block, raw, reading.field, skipped)
        case _:
            return _parquet(block, reading.field)


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


def _lines(block: Block, raw: bytes, field: str, skipped: Skipped) -> Placed:
    once = partial(_once, field)
    for number, line in enumerate(io.BytesIO(raw), block.line):
        if line.isspace():
            continue
        place = f"{block.path}:{number}"
        try:
            yield place, _value(line, place, field, once)
        except UserError as flaw:
            skipped.over(flaw)


def _value(line: bytes, place: str, field: str, once: Callable[[Any], dict[str, Any]]) -> Any:
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
    return record[field]


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


def _plain(block: Block, raw: bytes, split: str | None) -> Placed:
    """Plain text, whole or parted."""
    text = raw.decode("utf-8-sig" if block.offset == 0 else "utf-8")
    if split is None:
        parts = [text] if text else []
    elif split == LINES:
        parts = [line.removesuffix("\r") for line in text.split("\n")]
    elif split == PARAGRAPHS:
        behind = LEADING_BLANK_LINES.sub("", text)
        parts = [part.strip("\r\n") for part in BLANK_LINES.split(behind)]
    else:
        parts = text.split(split)
    named = str(block.path)
    if split is None:
        return ((named, part) for part in parts)
    return ((named, part) for part in parts if part and not part.isspace())


def _parquet(block: Block, field: str) -> Placed:
    path = block.path
    with open(path, "rb") as file, _told_as_parquet(path):
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(_seekable(file, path))
        _check_column(path, field, table.schema_arrow.names)
        groups = block.content or range(table.metadata.num_row_groups)
        batches = table.iter_batches(batch_size=1024, columns=[field], row_groups=list(groups))
        found = chain.from_iterable(batch.column(field).to_pylist() for batch in batches)
        for row, text in enumerate(found, block.line):
            yield f"{path} row {row}", text


class _told_as_parquet:
    """Turn Arrow's refusals, of several lines, into one that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, flaw: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(flaw, pyarrow.ArrowException):
            first_line = next(iter(str(flaw).splitlines()), type(flaw).__name__)
            said = textwrap.shorten(first_line, 100, placeholder=" ...")
            raise UserError(f"{self.path} is not Parquet ({said}); fetch it again") from None


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


def _seekable(file: IO[bytes], path: Path) -> IO[bytes]:
    """Parquet is read from its end, and seeking in a packed stream would unpack it each time: unpack it once."""
    if not packing(path):
        return file
    unpacked: Any = tempfile.TemporaryFile()  # noqa: SIM115  closed with the last reference
    with Unpacked(path) as opened:
        shutil.copyfileobj(opened.file, unpacked)
    return unpacked
