"""Token folders: where documents become integers, once.  No torch here.

    STORE/data/NAME/train.bin val.bin   token ids, little-endian; one end-of-text id after each document
                    token_bytes.npy     int32 [vocab]: the UTF-8 bytes an id stands for, 0 for special ids
                    tokenizer.json      the tokenizer that made them
                    meta.json           `Meta`; its digest names the exact files in a recipe
                    .verified.json      which files were found to have that digest (`contents.py`); may be deleted

Nats per token cannot be compared between tokenizers, bits per byte can: hence the exact byte counts.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from ablab.core.data.codec import Codec, train_tokenizer
from ablab.core.data.contents import digest_of, fresh_digest, known_digest
from ablab.core.data.documents import documents, expand, identity
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.files import FLAWS, writing

__all__ = [
    "Meta",
    "check_meta",
    "documents",
    "ensure_embedded",
    "load_meta",
    "load_verified",
    "tokenize",
    "train_tokenizer",
    "verify",
]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"
BATCH = 4_000_000  # characters encoded at once: 0.5 GB at the peak, whatever the corpus (measured on 520 MB of text)
NPY_HEADER = 128  # bytes; numpy pads the header of a one-dimensional array to so many
HELD_OUT = 0.01  # fraction of documents, when no validation text is named
Paths = Iterable[str | Path]
Side = Literal["train", "val"]
Labelled = tuple[Side, str]  # a document and the side it falls on
Progress = Callable[[int], None]  # called with the bytes of text done so far


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

    @property
    def bytes_per_token(self) -> float:
        return self.train_bytes / self.train_tokens

    @property
    def file_sizes(self) -> dict[str, int]:
        """File of the folder -> the bytes it must have."""
        width = 2 if self.dtype == "uint16" else 4
        return {
            "train.bin": self.train_tokens * width,
            "val.bin": self.val_tokens * width,
            "token_bytes.npy": NPY_HEADER + self.vocab * 4,
        }


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
    return _check_contents(folder, meta, known_digest(folder, meta.dtype))


def verify(folder: Path) -> Meta:
    """`load_verified`, from the bytes themselves, whatever was found before."""
    meta = load_meta(folder)
    return _check_contents(folder, meta, fresh_digest(folder, meta.dtype))


def _check_contents(folder: Path, meta: Meta, digest: str) -> Meta:
    if digest != meta.digest:
        raise UserError(
            f"the contents of {folder} have digest {digest}, but meta.json says {meta.digest}: "
            "a file was changed; restore it, or delete the folder and fill it again"
        )
    return meta


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


def tokenize(
    train_paths: Paths,
    val_paths: Paths,
    tokenizer: Path,
    out: Path,
    val_fraction: float | None = None,
    field: str = "text",
    progress: Progress | None = None,
) -> Meta:
    """Fill the token folder `out` from text, in one step: whatever stops it, `out` is whole or absent.

    Held out are `val_paths`, or without them the documents whose hash falls below `val_fraction` (default 0.01).
    The hash is of the text alone: a document keeps its side when files are reordered or added, and exact
    duplicates fall on the same side.  Given `val_paths` are taken as they are: a file on both sides is refused, but
    documents are not compared.
    Memory is set by BATCH and by the longest document (160 bytes a byte), not by the corpus.
    Raises UserError: `out` exists, both kinds of held-out text, an empty side, whatever `documents` and
    `Codec` refuse, a full disk.
    """
    train_files = list(train_paths)
    val_files = list(val_paths or ())
    out = Path(out)
    if val_files and val_fraction is not None:
        raise UserError(
            f"validation text and val_fraction={val_fraction} were both given; drop one"
        )
    fraction = HELD_OUT if val_fraction is None else val_fraction
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction} must lie between 0 and 1; try {HELD_OUT}")
    if val_files:
        _check_apart(train_files, val_files)
        labelled = _named(train_files, val_files, field)
    else:
        labelled = ((_side(text, fraction), text) for text in documents(train_files, field))
    with _alone(out):
        if out.exists():
            raise UserError(f"{out} exists already; delete it or choose another --name")
        return _fill(out, labelled, Codec(tokenizer), progress)


def _check_apart(train_paths: Paths, val_paths: Paths) -> None:
    train = {identity(file) for file in expand(train_paths)}
    for file in expand(val_paths):
        if identity(file) in train:
            raise UserError(
                f"{file} was named as training and as validation text; drop it from one"
            )


def ensure_embedded(store: Path, progress: Progress | None = None) -> Path:
    """Tokenize the text that ships with ablab into STORE/data/embedded, unless it is there; return the folder.

    Several processes may ask at once: one works, the others wait.
    Raises UserError if the digest is not the one pinned in configs/data/embedded.yaml.
    """
    import yaml

    folder = Path(store) / "data" / "embedded"
    text = CONFIGS / "embedded"
    pinned = yaml.safe_load((CONFIGS / "embedded.yaml").read_text("utf-8"))["data"]["digest"]
    if not folder.exists():
        with _alone(folder):
            if not folder.exists():
                labelled = _named([text / "train.jsonl.xz"], [text / "val.jsonl.xz"], "text")
                _fill(folder, labelled, Codec(text / "tokenizer.json"), progress, pinned)
    digest = load_meta(folder).digest
    if digest != pinned:
        raise UserError(
            f"{folder} has digest {digest}, but embedded.yaml pins {pinned}; "
            "delete it, and it will be made anew"
        )
    return folder


def _named(train_paths: Paths, val_paths: Paths, field: str) -> Iterator[Labelled]:
    for text in documents(val_paths, field):
        yield "val", text
    for text in documents(train_paths, field):
        yield "train", text


def _side(text: str, fraction: float) -> Side:
    digest = hashlib.sha256(text.encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    return "val" if draw < fraction else "train"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`, so that one process at a time fills it."""
    from filelock import FileLock

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            yield


class _Bin:
    """One side on its way to disk.  Texts gather until BATCH, then are encoded, counted and written."""

    def __init__(self, file: BinaryIO, codec: Codec):
        self.file = file
        self.codec = codec
        self.texts: list[str] = []
        self.waiting = 0  # characters gathered
        self.tokens = 0  # written
        self.bytes = 0  # of text, written

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.waiting += len(text)
        if self.waiting >= BATCH:
            self.flush()

    def flush(self) -> None:
        if self.texts:
            ids, size = self.codec.encode(self.texts)
            self.file.write(ids.tobytes())
            self.tokens += len(ids)
            self.bytes += size
            self.texts = []
            self.waiting = 0


def _fill(
    out: Path,
    labelled: Iterable[Labelled],
    codec: Codec,
    progress: Progress | None,
    pinned: str | None = None,
) -> Meta:
    """Write a token folder under a hidden name beside `out`, then rename it.  The caller holds the lock."""
    import numpy

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        train, val = _write_bins(partial, labelled, codec, progress)
        numpy.save(partial / "token_bytes.npy", codec.token_bytes)
        digest = digest_of(partial, codec.dtype)
        if pinned not in (None, digest):
            raise UserError(
                f"the embedded text gave digest {digest}, not {pinned} as pinned in embedded.yaml: "
                f"tokenizers {version('tokenizers')} splits text differently; "
                "install the version in the constraints file"
            )
        shutil.copyfile(codec.path, partial / "tokenizer.json")
        meta = Meta(
            schema=1,
            name=out.name,
            vocab=codec.vocab,
            dtype=codec.dtype,
            end_of_text=codec.end,
            train_tokens=train.tokens,
            val_tokens=val.tokens,
            train_bytes=train.bytes,
            val_bytes=val.bytes,
            digest=digest,
        )
        (partial / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n")
        partial.rename(out)
        return meta
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_bins(
    folder: Path, labelled: Iterable[Labelled], codec: Codec, progress: Progress | None
) -> tuple[_Bin, _Bin]:
    """Fill train.bin and val.bin.  Raises UserError where no document falls on one side."""
    train_path = folder / "train.bin"
    val_path = folder / "val.bin"
    with open(train_path, "wb") as train_file, open(val_path, "wb") as val_file:
        train = _Bin(train_file, codec)
        val = _Bin(val_file, codec)
        bins: dict[Side, _Bin] = {"train": train, "val": val}
        told = 0
        for side, text in labelled:
            bins[side].add(text)
            done = train.bytes + val.bytes
            if progress and done > told:
                progress(done)
                told = done
        for side, written in bins.items():
            written.flush()
            if not written.tokens:
                raise UserError(
                    f"no document fell to {side}; "
                    "give more text, change --val-fraction, or name --val files"
                )
    return train, val
