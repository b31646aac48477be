"""What a token folder holds, by its bytes: hashed once, and again when a file has changed.

Two data sets of one size and one digest would be joined in one verdict.  Hashing takes about a second a gigabyte, so
the digest found is kept in the folder beside the marks of the files it was found for.
"""

import hashlib
import json
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically

CACHE = ".verified.json"
Bins = tuple[
    tuple[str, ...], tuple[str, ...]
]  # files of the training and of the validation side, in order
BINS: Bins = (("train.bin",), ("val.bin",))
TABLE = "token_bytes.npy"
CLOCK_TICK = 2.0  # seconds: the coarsest file time in use, FAT's.  A file written twice within it has one time.

# What caches say in this process: of folders that cannot be written, too.
_known: dict[Path, dict[str, Any]] = {}


def digest_of(folder: Path, dtype: str, bins: Bins = BINS) -> str:
    """First 16 hex digits of sha256 over dtype, training tokens, validation tokens and token bytes.

    Either side is led by its length in bytes; in how many files it lies does not matter.

    Raises UserError: a file that cannot be read.
    """
    import numpy

    digest = hashlib.sha256(dtype.encode())
    try:
        for names in bins:
            size = sum((folder / name).stat().st_size for name in names)
            digest.update(size.to_bytes(8, "little"))
            for name in names:
                with open(folder / name, "rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
        lengths = numpy.load(folder / TABLE, allow_pickle=False)
    except (OSError, ValueError) as flaw:
        raise UserError(
            f"cannot read the tokens in {folder}: {flaw!s:.100}; delete the folder and fill it again"
        ) from None
    digest.update(numpy.asarray(lengths, "<i4").tobytes())
    return digest.hexdigest()[:16]


def known_digest(folder: Path, dtype: str, bins: Bins = BINS) -> str:
    """`digest_of`, read from the cache while size, times and inode of every file are those that were hashed."""
    now = {"dtype": dtype, "files": _marks(folder, bins)}
    for cached in (_known.get(folder.absolute()), _cached(folder)):
        if cached and {key: cached.get(key) for key in now} == now:
            return str(cached["digest"])
    return fresh_digest(folder, dtype, bins)


def fresh_digest(folder: Path, dtype: str, bins: Bins = BINS) -> str:
    """`digest_of`, always from the bytes; the cache is renewed."""
    started = time.time()
    files = _marks(folder, bins)
    digest = digest_of(folder, dtype, bins)
    if _marks(folder, bins) != files:
        raise UserError(f"{folder} is being written; wait for it, then run the command again")
    newest = max(mark["changed"] for mark in files.values()) / 1e9
    if newest < started - CLOCK_TICK:
        found = {"dtype": dtype, "files": files, "digest": digest}
        _known[folder.absolute()] = found
        with suppress(UserError):  # a folder that is only read
            write_atomically(folder / CACHE, json.dumps(found).encode())
    return digest


def _marks(folder: Path, bins: Bins) -> dict[str, dict[str, int]]:
    """File -> what tells that it is the one that was hashed.  No program can set `changed`, unlike `written`."""
    marks = {}
    for name in (*chain.from_iterable(bins), TABLE):
        status = (folder / name).stat()
        marks[name] = {
            "bytes": status.st_size,
            "written": status.st_mtime_ns,
            "changed": status.st_ctime_ns,
            "inode": status.st_ino,
        }
    return marks


def _cached(folder: Path) -> dict[str, Any]:
    """What the cache says; nothing if it is absent or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / CACHE).read_bytes())
        if isinstance(found, dict) and isinstance(found.get("digest"), str):
            return found
    return {}
