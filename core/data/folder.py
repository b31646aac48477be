"""Token folders: what describes one, and whether it holds what it says.  No torch here.

    STORE/data/NAME/train.bin val.bin   token ids, little-endian; one end-of-text id after each document
                    train.1.bin ...     further shards, where a side has many tokens
                    train.starts.bin    int64: where each document begins in its side; so val.starts.bin
                    token_bytes.npy     int32 [vocab]: the UTF-8 bytes an id stands for, 0 for special ids
                    tokenizer.json      the tokenizer that made them
                    meta.json           `Meta`; its digest names the exact tokens in a recipe, however they are cut
                    .verified.json      which files were found to have that digest (`contents.py`); may be deleted

Nats per token cannot be compared between tokenizers, bits per byte can: hence the exact byte counts.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from ablab.core.data.contents import Bins, fresh_digest, known_digest
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.files import FLAWS

NPY_HEADER = 128  # bytes; numpy pads the header of a one-dimensional array to so many
Side = Literal["train", "val"]


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    side: Side
    tokens: int
    documents: int
    digest: str  # of the file


@dataclass(frozen=True)
class Meta:
    """What meta.json holds.  Tokens include one end-of-text a document; bytes are UTF-8 bytes of text alone."""

    schema: Literal[1]
    name: str
    vocab: int
    dtype: Literal["uint16", "uint32"]
    end_of_text: int  # its id
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    digest: str
    # Of folders made since these are counted; () stands for train.bin and val.bin.
    shards: tuple[Shard, ...] = ()
    train_documents: int | None = None
    val_documents: int | None = None
    text: str | None = None  # digest of the set of documents
    tokenizer: str | None = None  # digest of what decides ids
    skipped: int = 0  # rows that held no text, listed in skipped.txt

    def files(self, side: Side) -> dict[str, int]:
        """The shards of a side in their order: file -> tokens."""
        if not self.shards:
            return {f"{side}.bin": self.train_tokens if side == "train" else self.val_tokens}
        return {one.file: one.tokens for one in self.shards if one.side == side}

    @property
    def bytes_per_token(self) -> float:
        return self.train_bytes / self.train_tokens

    @property
    def file_sizes(self) -> dict[str, int]:
        """File of the folder -> the bytes it must have."""
        width = 2 if self.dtype == "uint16" else 4
        tokens = self.files("train") | self.files("val")
        sizes = {file: count * width for file, count in tokens.items()}
        return sizes | {"token_bytes.npy": NPY_HEADER + self.vocab * 4}

    @property
    def bins(self) -> Bins:
        return tuple(self.files("train")), tuple(self.files("val"))


def load_meta(folder: Path) -> Meta:
    """Read a token folder's meta.json.  Raises UserError: no folder, no or damaged meta.json, files that disagree."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no token folder {folder}; fill it: ablab data tokenize TEXT --tokenizer TOKENIZER "
            f"--name {folder.name} --store {folder.parent.parent}"
        )
    cure = "delete the folder and fill it again"
    described = folder / "meta.json"
    try:
        meta = msgspec.json.decode(described.read_bytes(), type=Meta)
    except (OSError, *FLAWS) as flaw:
        raise UserError(f"cannot read {described}: {flaw}; {cure}") from None
    for name, expected in meta.file_sizes.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise UserError(
                f"{file} has {size:,} bytes, but meta.json says {expected:,}; {cure}"
            )
    return meta


def load_verified(folder: Path) -> Meta:
    """`load_meta` of a folder whose contents are those that its digest names; hashed anew only if a file has changed.

    Raises UserError: what `load_meta` refuses, other contents.
    """
    meta = load_meta(folder)
    return _check_contents(folder, meta, known_digest(folder, meta.dtype, meta.bins))


def verify(folder: Path) -> Meta:
    """`load_verified`, from the bytes themselves, whatever was found before."""
    meta = load_meta(folder)
    return _check_contents(folder, meta, fresh_digest(folder, meta.dtype, meta.bins))


def _check_contents(folder: Path, meta: Meta, digest: str) -> Meta:
    if digest != meta.digest:
        raise UserError(
            f"the contents of {folder} have digest {digest}, but meta.json says {meta.digest}: "
            f"{_changed(folder, meta)} was changed; restore it, or delete the folder and fill it again"
        )
    return meta


def _changed(folder: Path, meta: Meta) -> str:
    """The first shard that is not the one that was written, where shards have digests."""
    for shard in meta.shards:
        if shard_digest(folder / shard.file) != shard.digest:
            return shard.file
    return "a file"


def shard_digest(file: Path) -> str:
    """First 16 hex digits of sha256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def check_meta(recipe: Recipe, meta: Meta, folder: Path) -> None:
    """Raises UserError where a token folder cannot serve the recipe: other ids, too little text."""
    data = recipe.data
    if data.vocab != meta.vocab:
        raise UserError(
            f"data.vocab={data.vocab}, but {folder} was tokenized with {meta.vocab} ids; "
            f"set data.vocab={meta.vocab}"
        )
    held_out = min(meta.val_tokens, data.held_out + 1)
    _check_length(folder / "train.bin", meta.train_tokens, data.context, 2 * data.context)
    _check_length(folder / "val.bin", held_out, data.context, data.context + 1)


def _check_length(file: Path, tokens: int, context: int, needed: int) -> None:
    if tokens < needed:
        raise UserError(
            f"{file} holds {tokens} tokens, but context={context} needs at least {needed}; "
            "tokenize more text"
        )
