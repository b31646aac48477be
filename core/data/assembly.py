"""Assembly: parts in their order -> the shards of a token folder.

The tokens of a side are those of its documents in a row; where they are cut into files does not change their digest.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, get_args

from ablab.core.data.codec import Codec
from ablab.core.data.contents import digest_of
from ablab.core.data.folder import Meta, Shard, Side, shard_digest
from ablab.core.data.parts import Content
from ablab.core.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

SHARD = 500_000_000  # tokens of a shard, about: 1 GB of uint16; a part is never cut
SIDES: tuple[Side, ...] = get_args(Side)


def shard_name(side: Side, number: int) -> str:
    return f"{side}.{number}.bin" if number else f"{side}.bin"


class SideFiles:
    """One side on its way to disk: shards, the starts of documents, and what they count."""

    def __init__(self, folder: Path, side: Side, shard_tokens: int):
        self.folder = folder
        self.side = side
        self.shard_tokens = shard_tokens
        self.sizes: list[list[int]] = []  # of each shard: tokens, documents
        self.file: BinaryIO | None = None
        self.starts = open(folder / f"{side}.starts.bin", "wb")  # noqa: SIM115  closed by `close`
        self.tokens = 0
        self.bytes = 0

    def add(self, ids: "ndarray", tokens: "ndarray", size: int) -> None:
        """Documents in a row: ids, how many each has, and the bytes of their text."""
        if not len(ids):
            return
        if self.file is None or self.sizes[-1][0] >= self.shard_tokens:
            self._begin_shard()
        assert self.file, "just begun"
        self.file.write(ids.tobytes())
        (self.tokens + tokens.cumsum() - tokens).astype("<i8").tofile(self.starts)
        self.sizes[-1][0] += len(ids)
        self.sizes[-1][1] += len(tokens)
        self.tokens += len(ids)
        self.bytes += size

    def _begin_shard(self) -> None:
        if self.file:
            self.file.close()
        name = shard_name(self.side, len(self.sizes))
        self.file = open(self.folder / name, "wb")  # noqa: SIM115  closed by the next, or by `close`
        self.sizes.append([0, 0])

    def close(self) -> None:
        self.starts.close()
        if self.file:
            self.file.close()

    @property
    def documents(self) -> int:
        return sum(documents for _, documents in self.sizes)

    def shards(self) -> Iterator[Shard]:
        for number, (tokens, documents) in enumerate(self.sizes):
            name = shard_name(self.side, number)
            yield Shard(name, self.side, tokens, documents, shard_digest(self.folder / name))


@dataclass(frozen=True)
class Told:
    """What the manifest says of the whole besides what its files show."""

    name: str
    text: str | None = None  # digest of the set of documents
    skipped: Sequence[str] = ()  # rows
    pinned: str | None = None  # the digest that must come out


def assemble(
    contents: Iterable[Content],
    codec: Codec,
    told: Told,
    folder: Path,
    tail: int = 0,
    documents: int = 0,
    shard_tokens: int = SHARD,
) -> Meta:
    """Fill `folder` and describe it.

    tail: how many of all `documents` are held out, the last ones, besides those that are already.
    Raises UserError where no document falls on one side.
    """
    import numpy

    sides = {side: SideFiles(folder, side, shard_tokens) for side in SIDES}
    try:
        before = 0
        for content in contents:
            numbers = numpy.arange(before, before + len(content.tokens))
            before += len(content.tokens)
            held_out = (
                content.held_out | (numbers >= documents - tail) if tail else content.held_out
            )
            of_ids = numpy.repeat(held_out, content.tokens)
            for side in SIDES:
                documents_in = held_out if side == "val" else ~held_out
                ids_in = of_ids if side == "val" else ~of_ids
                size = int(content.bytes[documents_in].sum())
                sides[side].add(content.ids[ids_in], content.tokens[documents_in], size)
    finally:
        for files in sides.values():
            files.close()
    for side, files in sides.items():
        if not files.tokens:
            raise UserError(
                f"no document fell to {side}; "
                "give more text, change --val-fraction, or name --val files"
            )
    return _described(sides["train"], sides["val"], codec, told, folder)


def _described(
    train: SideFiles, val: SideFiles, codec: Codec, told: Told, folder: Path
) -> Meta:
    import numpy

    numpy.save(folder / "token_bytes.npy", codec.token_bytes)
    shards = (*train.shards(), *val.shards())
    bins = tuple(tuple(one.file for one in shards if one.side == side) for side in SIDES)
    digest = digest_of(folder, codec.dtype, (bins[0], bins[1]))
    if told.pinned not in (None, digest):
        raise UserError(
            f"the embedded text gave digest {digest}, not {told.pinned} as pinned in embedded.yaml: "
            f"tokenizers {version('tokenizers')} splits text differently; "
            "install the version in the constraints file"
        )
    (folder / "tokenizer.json").write_bytes(codec.path.read_bytes())
    if told.skipped:
        (folder / "skipped.txt").write_text("".join(f"{row}\n" for row in told.skipped))
    meta = Meta(
        schema=1,
        name=told.name,
        vocab=codec.vocab,
        dtype=codec.dtype,
        end_of_text=codec.end,
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        train_bytes=train.bytes,
        val_bytes=val.bytes,
        digest=digest,
        shards=shards,
        train_documents=train.documents,
        val_documents=val.documents,
        text=told.text,
        tokenizer=codec.digest,
        skipped=len(told.skipped),
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n")
    return meta
