"""Text becomes a token folder, once: by all cores, going on from what an earlier try has finished.  No torch here.

    text -> blocks (blocks.py) -> parts (parts.py, workers.py) -> shards and a manifest (assembly.py)

The folder (folder.py) is the same whatever the number of processes, the sizes of blocks, and how often it was killed.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ablab.core.data import assembly, blocks
from ablab.core.data.arrays import Arrays, fill
from ablab.core.data.assembly import Told, assemble
from ablab.core.data.blocks import Block, Reading, cut
from ablab.core.data.codec import END, Codec, train_tokenizer
from ablab.core.data.documents import documents, expand, identity, nothing_in
from ablab.core.data.folder import (
    Meta,
    Side,
    check_meta,
    load_meta,
    load_verified,
    verify,
)
from ablab.core.data.formats import packing
from ablab.core.data.hub import HUB, HubText
from ablab.core.data.parts import Content, Named, Part, Work, content_of, finished
from ablab.core.data.workers import encoded
from ablab.core.errors import UserError
from ablab.core.store.files import writing

if TYPE_CHECKING:
    from filelock import FileLock

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
UNPACKED = 4  # times the size of a packed file, about
HELD_OUT = 0.01  # fraction of documents, when no validation text is named
Paths = Iterable[str | Path]
HoldOut = Literal["hash", "tail"]


@dataclass(frozen=True)
class Done:
    """How far it is."""

    text: int  # bytes of text that are tokens, those of an earlier try too
    tokens: int
    share: float  # of the files' bytes, packed as they are
    kept: int = 0  # of `text`, what an earlier try had finished


Progress = Callable[[Done], None]


def no_progress(done: Done) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Settings:
    """How text becomes tokens, besides which text and which tokenizer.

    hold_out: by the hash of a document, or the last documents.  fraction: of documents, where no text is named for it.
    skip_bad: rows without text that are passed over, at most.
    """

    reading: Reading = field(default_factory=Reading)
    hold_out: HoldOut = "hash"
    fraction: float | None = None
    end_of_text: str = END
    skip_bad: int = 0
    jobs: int = 1
    shard_tokens: int = assembly.SHARD


def tokenize(
    train_paths: Paths,
    val_paths: Paths,
    tokenizer: Path,
    out: Path,
    val_fraction: float | None = None,
    field: str = "text",
    progress: Progress | None = None,
    settings: Settings = Settings(),
) -> Meta:
    """Fill the token folder `out` from text: whatever stops it, `out` is whole or absent.

    What a killed or interrupted try has finished stands in .NAME.partial, and is not done again.

    Held out are `val_paths`, or without them the documents whose hash falls below `val_fraction` (default 0.01), or
    the last ones.  The hash is of the text alone: a document keeps its side when files are reordered or added, and
    exact duplicates fall on the same side.  Given `val_paths` are taken as they are: a file on both sides is refused,
    but documents are not compared.
    Memory is set by the sizes of blocks and by the longest document (160 bytes a byte), not by the corpus.
    val_fraction, field: of the settings.
    Raises UserError: `out` exists, both kinds of held-out text, an empty side, whatever `documents` and
    `Codec` refuse, a full disk.
    """
    out = Path(out)
    if field != "text":
        settings = replace(settings, reading=replace(settings.reading, field=field))
    if val_fraction is not None:
        settings = replace(settings, fraction=val_fraction)
    train_files = _texts(train_paths, settings.reading)
    val_files = _texts(val_paths or (), settings.reading)
    _check_held_out(settings, train_files, val_files)
    codec = Codec(tokenizer, settings.end_of_text)
    with _alone(out):
        if out.exists():
            raise UserError(f"{out} exists already; delete it or choose another --name")
        filling = Filling(out, train_files, val_files, codec, settings)
        return filling.fill(progress or no_progress)


def _check_held_out(settings: Settings, train: "list[Text]", val: "list[Text]") -> None:
    fraction = settings.fraction
    if val and fraction is not None:
        raise UserError(
            f"validation text and val_fraction={fraction} were both given; drop one"
        )
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction} must lie between 0 and 1; try {HELD_OUT}")
    named = {text.identity for text in train}
    for text in val:
        if text.identity in named:
            raise UserError(
                f"{text.path} was named as training and as validation text; drop it from one"
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
                _fill_embedded(folder, text, progress, pinned)
    digest = load_meta(folder).digest
    if digest != pinned:
        raise UserError(
            f"{folder} has digest {digest}, but embedded.yaml pins {pinned}; "
            "delete it, and it will be made anew"
        )
    return folder


def _fill_embedded(
    folder: Path, text: Path, progress: Progress | None, pinned: str | None
) -> None:
    reading = Reading()
    train = _texts([text / "train.jsonl.xz"], reading)
    val = _texts([text / "val.jsonl.xz"], reading)
    filling = Filling(folder, train, val, Codec(text / "tokenizer.json"), Settings())
    filling.fill(progress or no_progress, pinned)


def import_arrays(arrays: Arrays, tokenizer: Path, out: Path) -> Meta:
    """Fill the token folder `out` from tokens that were made elsewhere, in one step.

    Raises UserError: `out` exists, whatever `arrays.fill` and `Codec` refuse, a full disk.
    """
    codec = Codec(tokenizer, arrays.end_of_text)
    with _alone(out):
        if out.exists():
            raise UserError(f"{out} exists already; delete it or choose another --name")
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        folder = partial / out.name
        folder.mkdir(parents=True)
        try:
            meta = fill(folder, arrays, codec)
            folder.rename(out)
            return meta
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Text:
    """One file, or one data set of the Hub.  mark: changes with its contents."""

    path: Path
    identity: object
    size: int
    mark: int
    cut: Callable[[], Iterator[Block]]


def _texts(paths: Paths, reading: Reading) -> list[Text]:
    named = [str(path) for path in paths]
    found = [
        Text(
            path,
            identity(path),
            path.stat().st_size,
            path.stat().st_mtime_ns,
            partial(cut, path, reading),
        )
        for path in expand(name for name in named if not name.startswith(HUB))
    ]
    for name in named:
        if name.startswith(HUB):
            hub = HubText.named(name, reading.field)
            found.append(Text(Path(name), name, 0, 0, hub.blocks))
    return found


class Filling:
    """One token folder on its way: parts first, in whatever order; then the folder, in one step."""

    def __init__(
        self, out: Path, train: list[Text], val: list[Text], codec: Codec, settings: Settings
    ):
        self.out = out
        self.codec = codec
        self.settings = settings
        self.texts: list[tuple[Side, Text]] = [("train", text) for text in train]
        self.texts += [("val", text) for text in val]
        self.partial = out.with_name(f".{out.name}.partial")
        by_hash = not val and settings.hold_out == "hash"
        self.fraction = HELD_OUT if settings.fraction is None else settings.fraction
        self.work = Work(
            codec.path.absolute(),
            settings.end_of_text,
            settings.reading,
            self.fraction if by_hash else None,
            self.partial.absolute() / "parts",
            settings.skip_bad,
        )
        self.tail = not val and settings.hold_out == "tail"
        self.parts: dict[str, Part] = {}
        self.kept = 0  # bytes of text in parts of an earlier try
        self.read = [0] * len(self.texts)  # bytes of each file
        self.lock = threading.Lock()

    def fill(self, progress: Progress, pinned: str | None = None) -> Meta:
        """The caller holds the lock."""
        self._go_on_or_begin()
        try:
            self._encode(progress)
            self._check_parts()
        except OSError:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        except UserError:
            if not self.parts:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        try:
            return self._assemble(pinned)
        except Exception:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _go_on_or_begin(self) -> None:
        """Keep the parts of an earlier try where it was of the same text, tokenizer and settings."""
        asked = json.dumps(self._asked(), indent=1)
        written = self.partial / "asked.json"
        try:
            same = written.read_text() == asked
        except OSError:
            same = False
        if not same:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.work.folder.mkdir(parents=True)
            written.write_text(asked)

    def _asked(self) -> dict[str, object]:
        return {
            "texts": [
                [side, str(text.path.absolute()), text.size, text.mark]
                for side, text in self.texts
            ],
            "tokenizer": self.codec.digest,
            "end_of_text": self.codec.end,
            "reading": asdict(self.work.reading),
            "held_out": self.work.held_out,
            "block": blocks.BLOCK,
        }

    def _encode(self, progress: Progress) -> None:
        files = [partial(self._open_blocks, number) for number in range(len(self.texts))]
        for part, named in encoded(files, self.work, self._jobs()):
            self._note(part, named.block.done)
            self._check_skipped()
            progress(self._done())

    def _jobs(self) -> int:
        """No more processes than there are blocks, about: each takes a second to begin."""
        size = sum(
            text.size * (UNPACKED if packing(text.path) else 1) for _, text in self.texts
        )
        named = any(not text.size for _, text in self.texts)  # a data set of unknown size
        return (
            self.settings.jobs if named else min(self.settings.jobs, size // blocks.BLOCK + 1)
        )

    def _open_blocks(self, number: int) -> Iterator[Named]:
        """The blocks of a text that are not done."""
        side, text = self.texts[number]
        for block in text.cut():
            named = Named(number, side, block)
            if part := finished(self.work.folder / named.name):
                self._note(part, block.done)
                self.kept += part.bytes
                continue
            yield named

    def _note(self, part: Part, read: int) -> None:
        with self.lock:
            self.parts[part.name] = part
            self.read[part.file] = max(self.read[part.file], read)

    def _done(self) -> Done:
        with self.lock:
            parts = list(self.parts.values())
            size = sum(text.size for _, text in self.texts)
            return Done(
                text=sum(part.bytes for part in parts),
                tokens=sum(part.tokens for part in parts),
                share=sum(self.read) / size if size else 0.0,
                kept=self.kept,
            )

    def _skipped(self) -> list[str]:
        return [row for name in sorted(self.parts) for row in self.parts[name].skipped]

    def _check_skipped(self) -> None:
        skipped = sum(len(part.skipped) for part in self.parts.values())
        if skipped > self.settings.skip_bad:
            raise UserError(
                f"{self._skipped()[-1]} (row {skipped} of this kind; --skip-bad allows "
                f"{self.settings.skip_bad})"
            )

    def _check_parts(self) -> None:
        """Refuse a file in which nothing stood."""
        self._check_skipped()
        rows = [0] * len(self.texts)
        for part in self.parts.values():
            rows[part.file] += part.rows + len(part.skipped)
        for (_, text), count in zip(self.texts, rows, strict=True):
            if not count:
                raise nothing_in(text.path)

    def _assemble(self, pinned: str | None) -> Meta:
        folder = self.partial / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        count = sum(part.documents for part in self.parts.values())
        digest = sum(int(part.text, 16) for part in self.parts.values()) % 2**256
        meta = assemble(
            self._contents(),
            self.codec,
            Told(self.out.name, f"{digest:064x}"[:16], self._skipped(), pinned),
            folder,
            tail=max(round(count * self.fraction), 1) if self.tail else 0,
            documents=count,
            shard_tokens=self.settings.shard_tokens,
        )
        folder.rename(self.out)
        shutil.rmtree(self.partial, ignore_errors=True)
        return meta

    def _contents(self) -> Iterator[Content]:
        for name in sorted(self.parts):
            yield content_of(self.work.folder / name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`, so that one process at a time fills it; the lock goes when the work ends."""
    from filelock import FileLock

    path = folder.with_name(f".{folder.name}.lock")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = FileLock(path)
            lock.acquire()
            if _holds(lock, path):
                break
            lock.release()  # whoever had it has deleted the file that this one waited for
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()


def _holds(lock: "FileLock", path: Path) -> bool:
    """Whether the file that is locked is the one that others find."""
    try:
        held = lock._context.lock_file_fd
        return held is not None and os.path.samestat(os.fstat(held), path.stat())
    except OSError:
        return False
