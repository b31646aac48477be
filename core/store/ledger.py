"""The ledger: what was asked before the runs and what was said after them, in the order in which it happened.

STORE/ledger.jsonl holds an entry a line, appended and never changed:

    {"kind", "experiment", "unix", "content", "before", "hash"}
    hash = sha256 of the line without it;  before = the hash of the line above, "" of the first

So whoever edits, inserts or removes a line breaks the chain at a line that can be named; lines cut from the end are
missed by the plans that name their hashes (core/store/planned.py:GridPlan).  A crash may leave half a line at the end:
readers pass over it, and the next writer cuts it off.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.claim import alone_with
from ablab.core.store.files import FLAWS, writing

REGISTERED = "registered"  # what an experiment asks, before its runs
VERDICTS = "verdicts"  # what was said of its arms, at the end or at a look
CHALLENGE = "challenge"  # whether a verdict stood on fresh seeds


@dataclass(frozen=True)
class Entry:
    """One line.  unix: seconds."""

    kind: str
    experiment: str
    unix: float
    content: dict[str, Any]
    before: str = ""
    hash: str = ""

    @property
    def day(self) -> str:
        """2026-11-27 17:20 UTC"""
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.unix))


class Ledger:
    """The ledger of a store.  Every reader checks the whole chain, and raises UserError where it is broken."""

    def __init__(self, root: Path):
        self.path = root / "ledger.jsonl"

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def entries(self, experiment: str | None = None, kind: str | None = None) -> list[Entry]:
        """In the order of the file; all, or those of an experiment or a kind."""
        return [
            entry
            for entry in self._checked(self._lines())
            if experiment in (None, entry.experiment) and kind in (None, entry.kind)
        ]

    def append(
        self, kind: str, experiment: str, content: dict[str, Any], say: Callable[[str], None]
    ) -> Entry:
        """Add an entry and bring it to the disk; one process at a time.

        say: told where half a line, left by a crash, is cut off.
        """
        return self._append(kind, experiment, content, say, always=True)

    def note(
        self, kind: str, experiment: str, content: dict[str, Any], say: Callable[[str], None]
    ) -> Entry:
        """As `append`, unless an entry of that kind and experiment has the same content: then the last such one."""
        return self._append(kind, experiment, content, say, always=False)

    def _append(
        self,
        kind: str,
        experiment: str,
        content: dict[str, Any],
        say: Callable[[str], None],
        always: bool,
    ) -> Entry:
        content = msgspec.json.decode(msgspec.json.encode(content))  # as it will be read again
        with alone_with(self.path), writing(self.path):
            lines = self._lines()
            known = list(self._checked(lines))
            alike = [one for one in known if _says(one, kind, experiment, content)]
            if alike and not always:
                return alike[-1]
            before = known[-1].hash if known else ""
            entry = _sealed(Entry(kind, experiment, time.time(), content, before))
            self._write(sum(map(len, lines)), entry, say)
        return entry

    def _write(self, whole: int, entry: Entry, say: Callable[[str], None]) -> None:
        """whole: bytes of the whole lines; what stands behind them is half a line."""
        line = msgspec.json.encode(entry) + b"\n"
        with open(self.path, "ab") as file:
            if file.tell() > whole:
                say(f"{self.path} ended in half a line, left by a crash; it is cut off")
                file.truncate(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[bytes]:
        """The whole lines, each with its end."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as refusal:
            raise UserError(
                f"cannot read {self.path}: {refusal.strerror}; mend its rights or its disk, "
                "or choose another store"
            ) from None
        return [line for line in BytesIO(content) if line.endswith(b"\n")]

    def _checked(self, lines: list[bytes]) -> Iterator[Entry]:
        """Raises UserError at the first line that is not what was written, or does not follow the one above."""
        before = ""
        for number, line in enumerate(lines, 1):
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except FLAWS:
                raise self._broken(f":{number} is no entry") from None
            if entry != _sealed(entry):
                raise self._broken(f":{number} was changed after it was written")
            if entry.before != before:
                raise self._broken(
                    f":{number} does not follow the line above: lines were removed or put in there"
                )
            before = entry.hash
            yield entry

    def missing(self, hash: str) -> UserError:
        """What to say where a plan names an entry that the ledger lacks."""
        return self._broken(f" lacks entry {hash}, which a plan names: lines were removed")

    def _broken(self, flaw: str) -> UserError:
        return UserError(
            f"{self.path}{flaw}; put the file back from a copy, or rename it: "
            "reports then say that nothing is registered"
        )


def _says(entry: Entry, kind: str, experiment: str, content: dict[str, Any]) -> bool:
    return (entry.kind, entry.experiment, entry.content) == (kind, experiment, content)


def _sealed(entry: Entry) -> Entry:
    """With the hash that it should have, 16 hex digits."""
    content = asdict(replace(entry, hash=""))
    encoded = msgspec.json.encode(content, order="deterministic")
    return replace(entry, hash=hashlib.sha256(encoded).hexdigest()[:16])
