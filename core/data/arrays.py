"""Tokens that were made elsewhere: arrays become a token folder, with the tokenizer that is named.

    .npy    1-D, any whole numbers;  .npz  `values`, and `offsets` where documents begin
    .bin    raw uint16 or uint32, little-endian;  folders of them, sorted, files named offsets_* left out

Documents end with the end of text; where an array holds none, its offsets say where they begin.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zipfile import BadZipFile

from ablab.core.data.assembly import SHARD, Told, assemble
from ablab.core.data.codec import END, Codec
from ablab.core.data.folder import Meta
from ablab.core.data.parts import Content
from ablab.core.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

SUFFIXES = (".npy", ".npz", ".bin")
OFFSETS = "offsets_"
CHUNK = 16_000_000  # tokens at once
RawType = Literal["uint16", "uint32"]


@dataclass(frozen=True)
class Arrays:
    """Which arrays, and how they are read.

    held_out: the share of documents that is held out, the last ones, where no arrays are named for it.
    raw: the type of .bin files; null: the smallest that holds the vocabulary.
    """

    train: list[Path]
    val: list[Path]
    end_of_text: str = END
    held_out: float = 0.01
    raw: RawType | None = None
    shard_tokens: int = SHARD


def array_files(paths: Iterable[str | Path]) -> list[Path]:
    """The arrays that `paths` stand for.  Raises UserError: none there, another suffix."""
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        found = _in_folder(path) if path.is_dir() else [path]
        if not found:
            raise UserError(
                f"no arrays in {path}; name a folder of {', '.join(SUFFIXES)} files"
            )
        for file in found:
            if not file.is_file():
                raise UserError(
                    f"no array {file}; name a file or a folder of {', '.join(SUFFIXES)}"
                )
            if file.suffix not in SUFFIXES:
                raise UserError(f"{file}: unknown suffix; known: {', '.join(SUFFIXES)}")
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _in_folder(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES and not file.name.startswith((OFFSETS, "."))
    )


def fill(out: Path, arrays: Arrays, codec: Codec) -> Meta:
    """Write the token folder into `out`, which is empty.

    Raises UserError: an array that cannot be read or holds no tokens of this tokenizer, an empty side.
    """
    documents = sum(_documents_in(file, arrays, codec) for file in arrays.train)
    tail = 0 if arrays.val else max(round(documents * arrays.held_out), 1)
    if tail and documents < 2:
        raise UserError(
            f"{arrays.train[0]} is one document: no {codec.tokenizer.id_to_token(codec.end)} in it; "
            "name another end with --end-of-text, or hold arrays out with --val"
        )
    contents = _contents(arrays, codec)
    return assemble(contents, codec, Told(out.name), out, tail, documents, arrays.shard_tokens)


def _contents(arrays: Arrays, codec: Codec) -> Iterator[Content]:
    import numpy

    for held_out, files in ((False, arrays.train), (True, arrays.val)):
        for file in files:
            for ids, lengths in _cut(file, arrays, codec):
                begins = numpy.cumsum(lengths) - lengths
                sizes = numpy.add.reduceat(codec.token_bytes[ids], begins, dtype=numpy.int64)
                held = numpy.full(len(lengths), held_out)
                yield Content(ids.astype(codec.file_dtype), lengths, sizes, held)


def _documents_in(file: Path, arrays: Arrays, codec: Codec) -> int:
    return sum(len(lengths) for _, lengths in _cut(file, arrays, codec))


def _cut(file: Path, arrays: Arrays, codec: Codec) -> "Iterator[tuple[ndarray, ndarray]]":
    """Documents in a row: their ids, and how many each has.  What follows the last end is a document too."""
    import numpy

    ids, offsets = _read(file, arrays, codec)
    begin = 0
    while begin < len(ids):
        chunk = ids[begin : begin + CHUNK]
        _check_ids(file, chunk, codec)
        ends = numpy.flatnonzero(chunk == codec.end) + 1
        if not len(ends) and offsets is not None:
            inside = offsets[(offsets > begin) & (offsets <= begin + len(chunk))]
            ends = inside - begin
        last = begin + len(chunk) == len(ids)
        if last and (not len(ends) or ends[-1] < len(chunk)):
            ends = numpy.append(ends, len(chunk))
        if not len(ends):
            ends = numpy.array([len(chunk)])  # a document longer than a chunk is cut there
        yield chunk[: ends[-1]], numpy.diff(ends, prepend=0)
        begin += int(ends[-1])


def _check_ids(file: Path, ids: "ndarray", codec: Codec) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= codec.vocab:
        raise UserError(
            f"{file} holds token {low if low < 0 else high}, and {codec.path} has {codec.vocab:,} ids: "
            "it was made by another tokenizer; name that one"
        )


def _read(file: Path, arrays: Arrays, codec: Codec) -> "tuple[ndarray, ndarray | None]":
    """Its ids, and where documents begin, if it says so.  Raises UserError: torn, or not a row of whole numbers."""
    import numpy

    offsets = None
    try:
        if file.suffix == ".bin":
            ids = _raw(file, arrays.raw or codec.dtype)
        elif file.suffix == ".npz":
            with numpy.load(file, allow_pickle=False) as packed:
                ids = packed["values"]
                offsets = packed.get("offsets")
        else:
            ids = numpy.load(file, mmap_mode="r", allow_pickle=False)
            beside = file.with_name(f"{OFFSETS}{file.name}")
            offsets = numpy.load(beside, allow_pickle=False) if beside.is_file() else None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as flaw:
        said = " ".join(str(flaw).split())
        raise UserError(f"cannot read {file}: {said:.120}; fetch it again") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise UserError(
            f"{file} holds {ids.dtype} of shape {list(ids.shape)}, and tokens are whole numbers in a row; "
            "drop it from the folder"
        )
    if offsets is not None and len(offsets) and int(offsets.max()) > len(ids):
        raise UserError(
            f"{file} has {len(ids):,} tokens, but its offsets reach {int(offsets.max()):,}: it is cut short; "
            "fetch it again"
        )
    return ids, offsets


def _raw(file: Path, dtype: RawType) -> "ndarray":
    import numpy

    width = 2 if dtype == "uint16" else 4
    size = file.stat().st_size
    if size % width or not size:
        raise UserError(
            f"{file} has {size:,} bytes, which is no whole number of {dtype}; fetch it again, or name its --dtype"
        )
    ids: ndarray = numpy.memmap(file, numpy.dtype(dtype).newbyteorder("<"), "r")
    return ids
