"""Token folders: where documents become integers, once.  No torch here.

    STORE/data/NAME/train.bin val.bin   token ids, little-endian; one end-of-text id after each document
                    token_bytes.npy     int32 [vocab]: the UTF-8 bytes an id stands for, 0 for special ids
                    tokenizer.json      the tokenizer that made them
                    meta.json           `Meta`; its digest names the exact files in a recipe

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
from ablab.core.data.documents import documents, expand
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.files import writing

__all__ = [
    "Meta",
    "check_meta",
    "documents",
    "ensure_embedded",
    "load_meta",
    "tokenize",
    "train_tokenizer",
]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"
BATCH = 4_000_000  # characters encoded at once: 0.5 GB at the peak, whatever the corpus (measured on 520 MB of text)
HELD_OUT = 0.01  # fraction of documents, when no validation text is named
Paths = Iterable[str | Path]
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


def load_meta(folder: Path) -> Meta:
    """Read a token folder's meta.json.  Raises UserError: no folder, no or damaged meta.json, files that disagree."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no token folder {folder}; fill it: ablab data tokenize TEXT --tokenizer TOKENIZER --name {folder.name} --store {folder.parent.parent}"
        )
    cure = "delete the folder and fill it again"
    try:
        meta = msgspec.json.decode((folder / "meta.json").read_bytes(), type=Meta)
    except (OSError, msgspec.DecodeError) as flaw:
        raise UserError(f"cannot read {folder / 'meta.json'}: {flaw}; {cure}") from None
    width = 2 if meta.dtype == "uint16" else 4
    sizes = {
        "train.bin": meta.train_tokens * width,
        "val.bin": meta.val_tokens * width,
        "token_bytes.npy": 128
        + meta.vocab * 4,  # numpy pads the header of a one-dimensional array to 128 bytes
    }
    for file, expected in sizes.items():
        size = (folder / file).stat().st_size if (folder / file).is_file() else 0
        if size != expected:
            raise UserError(
                f"{folder / file} has {size:,} bytes, but meta.json says {expected:,}; {cure}"
            )
    return meta


def check_meta(recipe: Recipe, meta: Meta, folder: Path) -> Meta:
    """Raises UserError where a token folder is not what the recipe asks for: other text, another vocabulary, too little."""
    data = recipe.data
    if data.digest and data.digest != meta.digest:
        raise UserError(
            f"{folder} holds data {meta.digest}, but the recipe names {data.digest}; restore that text, or load the recipe anew"
        )
    if data.vocab != meta.vocab:
        raise UserError(
            f"data.vocab={data.vocab}, but {folder} was tokenized with {meta.vocab} ids; set data.vocab={meta.vocab}"
        )
    held_out = min(meta.val_tokens, data.held_out + 1)
    for name, have, need in (
        ("train", meta.train_tokens, 2 * data.context),
        ("val", held_out, data.context + 1),
    ):
        if have < need:
            raise UserError(
                f"{folder / name}.bin holds {have} tokens, but context={data.context} needs at least {need}; tokenize more text"
            )
    return meta


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
    train_paths, val_paths, out = list(train_paths), list(val_paths or ()), Path(out)
    if val_paths and val_fraction is not None:
        raise UserError(
            f"validation text and val_fraction={val_fraction} were both given; drop one"
        )
    fraction = HELD_OUT if val_fraction is None else val_fraction
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction} must lie between 0 and 1; try {HELD_OUT}")
    if val_paths:
        if both := {file.resolve() for file in expand(train_paths)} & {
            file.resolve() for file in expand(val_paths)
        }:
            raise UserError(
                f"{min(both)} was named as training and as validation text; drop it from one"
            )
        labelled = _named(train_paths, val_paths, field)
    else:
        labelled = ((_side(text, fraction), text) for text in documents(train_paths, field))
    with _alone(out):
        if out.exists():
            raise UserError(f"{out} exists already; delete it or choose another --name")
        return _fill(out, labelled, Codec(tokenizer), progress)


def ensure_embedded(store: Path, progress: Progress | None = None) -> Path:
    """Tokenize the text that ships with ablab into STORE/data/embedded, unless it is there; return the folder.

    Several processes may ask at once: one works, the others wait.
    Raises UserError if the digest is not the one pinned in configs/data/embedded.yaml.
    """
    import yaml

    folder, text = Path(store) / "data" / "embedded", CONFIGS / "embedded"
    pinned = yaml.safe_load((CONFIGS / "embedded.yaml").read_text())["data"]["digest"]
    if not folder.exists():
        with _alone(folder):
            if not folder.exists():
                labelled = _named([text / "train.jsonl.xz"], [text / "val.jsonl.xz"], "text")
                _fill(folder, labelled, Codec(text / "tokenizer.json"), progress, pinned)
    digest = load_meta(folder).digest
    if digest != pinned:
        raise UserError(
            f"{folder} has digest {digest}, but embedded.yaml pins {pinned}; delete it, and it will be made anew"
        )
    return folder


def _named(train_paths: Paths, val_paths: Paths, field: str) -> Iterator[tuple[str, str]]:
    for side, paths in (("val", val_paths), ("train", train_paths)):
        for text in documents(paths, field):
            yield side, text


def _side(text: str, fraction: float) -> str:
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < fraction else "train"


@contextmanager
def _alone(folder: Path):
    """Hold the lock beside `folder`, so that one process at a time fills it."""
    from filelock import FileLock

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            yield


class _Bin:
    """One side on its way to disk.  Texts gather until BATCH, then are encoded, counted and written."""

    def __init__(self, file: BinaryIO, codec: Codec):
        self.file, self.codec = file, codec
        self.texts: list[str] = []
        self.waiting = self.tokens = self.bytes = (
            0  # characters gathered; tokens and bytes of text written
        )

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.waiting += len(text)
        if self.waiting >= BATCH:
            self.flush()

    def flush(self) -> None:
        if self.texts:
            ids, size = self.codec.encode(self.texts)
            self.file.write(ids.tobytes())
            self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size
            self.texts, self.waiting = [], 0


def _fill(
    out: Path, labelled, codec: Codec, progress: Progress | None, pinned: str | None = None
) -> Meta:
    """Write a token folder under a hidden name beside `out`, then rename it.  The caller holds the lock."""
    import numpy

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        train, val = _write_bins(partial, labelled, codec, progress)
        digest = _digest(partial, codec)
        if pinned not in (None, digest):
            raise UserError(
                f"the embedded text gave digest {digest}, not {pinned} as pinned in embedded.yaml: "
                f"tokenizers {version('tokenizers')} splits text differently; install the version in the constraints file"
            )
        numpy.save(partial / "token_bytes.npy", codec.token_bytes)
        shutil.copyfile(codec.path, partial / "tokenizer.json")
        meta = Meta(
            1,
            out.name,
            codec.vocab,
            codec.dtype,
            codec.end,
            train.tokens,
            val.tokens,
            train.bytes,
            val.bytes,
            digest,
        )
        (partial / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n")
        partial.rename(out)
        return meta
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_bins(
    folder: Path, labelled, codec: Codec, progress: Progress | None
) -> tuple[_Bin, _Bin]:
    with (
        open(folder / "train.bin", "wb") as train_file,
        open(folder / "val.bin", "wb") as val_file,
    ):
        bins = {"train": _Bin(train_file, codec), "val": _Bin(val_file, codec)}
        done = 0
        for side, text in labelled:
            bins[side].add(text)
            if progress and (now := bins["train"].bytes + bins["val"].bytes) > done:
                progress(done := now)
        for side, bin in bins.items():
            bin.flush()
            if not bin.tokens:
                raise UserError(
                    f"no document fell to {side}; give more text, change --val-fraction, or name --val files"
                )
    return bins["train"], bins["val"]


def _digest(folder: Path, codec: Codec) -> str:
    """First 16 hex digits of sha256 over dtype, train.bin, val.bin and token bytes, each file led by its length."""
    digest = hashlib.sha256(codec.dtype.encode())
    for name in ("train.bin", "val.bin"):
        with open(folder / name, "rb") as file:
            digest.update((folder / name).stat().st_size.to_bytes(8, "little"))
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    digest.update(codec.token_bytes.tobytes())
    return digest.hexdigest()[:16]
