"""Data sets and tokenizers of the Hugging Face Hub, by name: from the local cache or the network."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ablab.core.data.blocks import Block
from ablab.core.errors import UserError

HUB = "hf:"
ROWS = 5_000  # of a block


@dataclass(frozen=True)
class HubText:
    """The rows of one split of a data set:  hf:OWNER/NAME[:CONFIG[:SPLIT]]."""

    name: str
    config: str | None
    split: str
    field: str

    @classmethod
    def named(cls, told: str, field: str) -> "HubText":
        name, _, behind = told.removeprefix(HUB).partition(":")
        config, _, split = behind.partition(":")
        if not name:
            raise UserError(
                f"{told!r} names no data set; write hf:OWNER/NAME or hf:OWNER/NAME:CONFIG:SPLIT"
            )
        return cls(name, config or None, split or "train", field)

    def blocks(self) -> Iterator[Block]:
        """ROWS rows each.  Raises UserError: `datasets` is not installed, no such data set, no such column."""
        rows = iter(self._loaded())
        number = 0
        while taken := list(islice(rows, ROWS)):
            if self.field not in taken[0]:
                raise UserError(
                    f"{HUB}{self.name} has no column {self.field!r}, only: {', '.join(taken[0])[:100]}; "
                    "choose one with --field"
                )
            texts = [row[self.field] for row in taken]
            yield Block(Path(f"{HUB}{self.name}"), number, texts, 1 + number * ROWS)
            number += 1

    def _loaded(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise UserError(
                f"{HUB}{self.name} needs the package `datasets`: pip install 'ablab[datasets]', "
                "or fetch its Parquet files and name their folder"
            ) from None
        if not Path(self.name).exists() and not _reachable():
            raise UserError(
                f"cannot load the data set {self.name!r}: the Hub cannot be reached; name files or a folder"
            )
        try:
            return load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as flaw:  # of the library, the network and the file formats below it
            said = " ".join(str(flaw).split())
            raise UserError(
                f"cannot load the data set {self.name!r} ({said:.120}); check the name, the network, or name files"
            ) from None


def tokenizer_file(named: str) -> Path:
    """A tokenizer.json: a file, a folder that holds one, or the name of a model on the Hub.

    Raises UserError: none there, or not to be had without the network.
    """
    path = Path(named)
    if path.is_dir():
        return _of_folder(path)
    if path.exists() or path.suffix == ".json":
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(named, "tokenizer.json", local_files_only=not _reachable()))
    except LocalEntryNotFoundError:
        why = "it is not in the local cache, and the Hub cannot be reached"
    except (
        Exception
    ) as flaw:  # no such repository, no such file, no permission: each its own class
        why = " ".join(str(flaw).split())[:120]
    raise UserError(
        f"no tokenizer {named!r}: no file or folder, and of the Hub: {why}; "
        "give a tokenizer.json or a folder that holds one"
    )


def _reachable() -> bool:
    """Whether the Hub's name is known here; the library would try for 23 s before it says so."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _of_folder(folder: Path) -> Path:
    if (file := folder / "tokenizer.json").is_file():
        return file
    raise UserError(
        f"{folder} holds no tokenizer.json; save one there with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
