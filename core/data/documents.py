"""Documents: which files a path stands for, and their texts, one string at a time.  Nothing is held but one block."""

import glob
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from ablab.core.data.blocks import Reading, Skipped, cut, texts
from ablab.core.data.formats import FORMATS, PACKED, format_of, unpacked_name
from ablab.core.errors import UserError

Identity = tuple[int, int] | Path  # of a file or folder: device and inode


def documents(
    paths: Iterable[str | Path], field: str = "text", split: str | None = None
) -> Iterator[str]:
    """Yield the text of every document, path by path; a folder or a glob stands for its files, sorted.

    .jsonl .ndjson .json   one object a line, its text under `field`; blank lines are skipped
    .txt                   one document, or parted by `split`; a byte-order mark at its head is no text
    .parquet               the column `field`, streamed
    Each may be packed (.gz .xz .zst).  In a folder, hidden and other files are passed over; documents of no
    characters are skipped.
    Raises UserError: what `expand` refuses, an unreadable or empty file, a line or row without text, or with two.
    """
    reading = Reading(field, split)
    return chain.from_iterable(_read(path, reading) for path in expand(paths))


def _read(path: Path, reading: Reading) -> Iterator[str]:
    """The texts of one file."""
    empty = True
    for block in cut(path, reading):
        for text in texts(block, reading, Skipped()):
            empty = False
            if text:
                yield text
    if empty:
        raise nothing_in(path)


def nothing_in(path: Path) -> UserError:
    return UserError(f"{path} is empty; drop it or fetch it again")


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
        if not format_of(file):
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
    return [file for folder in folders for file in _visible(folder) if not format_of(file)]


def whole_texts(paths: Iterable[str | Path]) -> list[Path]:
    """The .txt files among `paths`, each of which is one document as long as nothing parts it."""
    files = [file for path in map(Path, paths) for file in _files_of(path)]
    return [file for file in files if format_of(file) == ".txt"]


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
        name = unpacked_name(Path(os.path.abspath(file)))
        other = plain.setdefault(name, file)
        if other is not file:
            raise UserError(
                f"{other} and {file.name} are one text under two packings; drop one, or rename it"
            )


def _files_of(path: Path) -> list[Path]:
    """A folder's visible files of a known format, a file itself, or what a glob matches; sorted."""
    if path.is_dir():
        return [file for file in _visible(path) if format_of(file)]
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
