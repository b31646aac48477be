"""Parts: one block of text as tokens, a file of its own, so that work that was killed goes on from what is done.

.NAME.partial/parts/FILE-BLOCK.npz   ids, and of each document its tokens, its bytes and whether it is held out
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from ablab.core.data.blocks import Block, Reading, Skipped, texts
from ablab.core.data.codec import Codec
from ablab.core.data.folder import Side

if TYPE_CHECKING:
    from numpy import ndarray

BATCH = 4_000_000  # characters encoded at once: 0.5 GB at the peak, whatever the corpus (measured on 520 MB of text)


@dataclass(frozen=True)
class Work:
    """What is the same for every block.

    held_out: the share of documents that their hash holds out; null where the side is settled otherwise.
    """

    tokenizer: Path
    end_of_text: str
    reading: Reading
    held_out: float | None
    folder: Path  # of the parts
    most_skipped: int = 0


@dataclass(frozen=True)
class Named:
    """A block, and where it belongs: the number of its file, and the side that was named for it."""

    file: int
    side: Side
    block: Block

    @property
    def name(self) -> str:
        return f"{self.file:06}-{self.block.number:06}.npz"


@dataclass(frozen=True)
class Part:
    """What became of a block.

    rows: also the empty ones.  text: the sum of sha256 of its documents modulo 2^256, in hex: of a set of documents,
    whatever their order and however they were cut.
    """

    file: int
    number: int
    rows: int
    documents: int
    tokens: int
    bytes: int
    text: str
    skipped: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.file:06}-{self.number:06}.npz"


@dataclass(frozen=True)
class Content:
    """The arrays of a part: ids [tokens]; of each document its tokens (the end of text too), bytes, held out or not."""

    ids: "ndarray"
    tokens: "ndarray"
    bytes: "ndarray"
    held_out: "ndarray"


def encode(named: Named, work: Work, codec: Codec) -> Part:
    """Encode a block and leave it in the folder of parts.  Raises UserError for what cannot be read."""
    import numpy

    skipped = Skipped(work.most_skipped)
    rows = 0
    total = 0
    ids, tokens, sizes, held = [], [], [], []
    for batch in _batches(texts(named.block, work.reading, skipped)):
        rows += len(batch)
        whole = [text for text in batch if text]
        if not whole:
            continue
        found, _ = codec.encode(whole)
        ids.append(found)
        tokens.append(numpy.diff(numpy.flatnonzero(found == codec.end), prepend=-1))
        for text in whole:
            raw = text.encode()
            digest = hashlib.sha256(raw).digest()
            total += int.from_bytes(digest, "big")
            sizes.append(len(raw))
            held.append(_is_held_out(digest, named.side, work.held_out))
    content = Content(
        numpy.concatenate(ids) if ids else numpy.zeros(0, codec.file_dtype),
        numpy.concatenate(tokens) if tokens else numpy.zeros(0, numpy.int64),
        numpy.array(sizes, numpy.int64),
        numpy.array(held, numpy.bool_),
    )
    part = Part(
        file=named.file,
        number=named.block.number,
        rows=rows,
        documents=len(sizes),
        tokens=len(content.ids),
        bytes=sum(sizes),
        text=f"{total % 2**256:064x}",
        skipped=skipped.rows,
    )
    _write(work.folder / part.name, part, content)
    return part


def _is_held_out(digest: bytes, side: Side, share: float | None) -> bool:
    if share is None:
        return side == "val"
    draw = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    return draw < share


def _batches(found: Iterator[str]) -> Iterator[list[str]]:
    gathered: list[str] = []
    waiting = 0
    for text in found:
        gathered.append(text)
        waiting += len(text)
        if waiting >= BATCH:
            yield gathered
            gathered, waiting = [], 0
    if gathered:
        yield gathered


def _write(path: Path, part: Part, content: Content) -> None:
    import numpy

    arrays = {name: getattr(content, name) for name in content.__dataclass_fields__}
    told = numpy.frombuffer(json.dumps(asdict(part)).encode(), numpy.uint8)
    partial = path.with_suffix(f".{os.getpid()}.new")
    try:
        with open(partial, "wb") as file:
            numpy.savez(file, told=told, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def finished(path: Path) -> Part | None:
    """The part that stands there whole; None where it is absent or torn."""
    try:
        with _opened(path) as arrays:
            part = Part(**json.loads(arrays["told"].tobytes()))
            whole = len(arrays["ids"]) == part.tokens
            return part if whole else None
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile):
        return None


def content_of(path: Path) -> Content:
    with _opened(path) as arrays:
        return Content(*(arrays[name] for name in Content.__dataclass_fields__))


def _opened(path: Path) -> Any:
    import numpy

    return numpy.load(path, allow_pickle=False)
