"""What the views without a memory of their own share: TensorBoard's files, and the runs of Weights & Biases.

A receipt beside them says what was shown of each run.  What a receipt does not vouch for is shown again from the run
folder, whole, so no record can be there twice.
"""

import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from ablab.core.errors import UserError, told, without_password
from ablab.core.store.files import write_atomically
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.cards import card_of, fingerprint, name_of
from ablab.experiments.track.chosen import TITLES, sync_command
from ablab.experiments.track.replay import (
    ADDED,
    CONTINUED,
    CURRENT,
    MISSING,
    OUTCOMES,
    lacking,
    replay,
)
from ablab.experiments.track.tracker import Card, Tracker

LONGEST_NAME = 120  # bytes of a name of ours, before its digest


@dataclass(frozen=True)
class Receipt:
    """What a view was shown of a run."""

    run: str
    card: str  # digest of all that the card says
    place: str  # where it was sent
    result: str  # fingerprint of result.json; empty of a run that goes on
    step: int  # the last one shown, of a run that goes on

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)).encode())


def receipt_of(card: Card, place: str) -> Receipt:
    """What a view that shows all of the run folder as it stands would have."""
    from ablab.core.store.record import Record

    said = [card.cell, card.pair, card.seed, dict(card.tags), dict(card.params)]
    result = fingerprint(card.folder)
    last = 0
    if not result:
        last = max((int(line["step"]) for line in Record(card.folder).metrics()), default=0)
    return Receipt(card.run, _digest(json.dumps(said, default=str)), place, result, last)


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _read(path: Path) -> Receipt | None:
    """None also where something else stands there."""
    try:
        return Receipt(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def finite(scalars: Mapping[str, float]) -> dict[str, float]:
    """Those that can be drawn; the others leave a gap."""
    return {
        key: float(value)
        for key, value in scalars.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def file_name(text: str) -> str:
    """`text` as the name of a file, and of no other text's."""
    name = "".join(" " if sign in "/\\:?%#\0" else sign for sign in text).strip(" .")
    if name == text and len(name.encode()) <= LONGEST_NAME:
        return name
    cut = name.encode()[:LONGEST_NAME].decode(errors="ignore").strip(" .")
    return f"{cut} {_digest(text)}"


def title_of(card: Card) -> str:
    """Two runs of a cell may share a seed, never a pair."""
    name = name_of(card)
    return name if card.pair == card.seed else f"{name} · pair {card.pair}"


class StoreTracker(Tracker, Protocol):
    """Closing it, and leaving it, writes the receipt."""

    def leave(self) -> None:
        """Let go of a run that has not ended."""


def to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


class StoreView:
    """Subclasses say what is specific: their name, their trackers, where a receipt is kept."""

    name: str

    def __init__(self, store: Store, warn: Callable[[str], None] = to_stderr):
        self.store = store
        self.warn = warn
        self.lost = False

    @property
    def place(self) -> str:
        """Where it sends to, where that can change."""
        return ""

    def ensure(self) -> bool:
        try:
            self.connect()
        except Exception as cause:
            self.lose(cause)
        return not self.lost

    def again(self) -> bool:
        """What it writes is not lost for a while, as a server is: a disk is full, a login is missing."""
        return False

    def connect(self) -> None:
        """Raises what it likes where it cannot be used."""

    def tracker(self) -> StoreTracker:
        raise NotImplementedError

    def receipt_path(self, card: Card) -> Path:
        raise NotImplementedError

    def is_there(self, card: Card) -> bool:
        """Whether what a receipt vouches for has not been removed since."""
        raise NotImplementedError

    def forget(self, plan: GridPlan, cards: Iterable[Card]) -> None:
        """Remove what is shown of the experiment and is none of these."""

    def lose(self, cause: Exception) -> None:
        if self.lost:
            return
        self.lost = True
        self.warn(
            f"{self.describe(cause)}; training goes on, the run folders stay complete, "
            f"and `{sync_command(self.name)}` repairs the view"
        )

    def describe(self, cause: Exception) -> str:
        said = str(cause) if isinstance(cause, UserError) else told(cause)
        return without_password(f"{TITLES[self.name]} failed ({' '.join(said.split())[:200]})")

    def vouch(self, card: Card, written: Path) -> None:
        """All that the run folder holds has been shown, as long as what was written stands.

        `ablab sync` of another process may have written the run anew meanwhile; that one vouches for its own.
        """
        if written.exists():
            receipt_of(card, self.place).write(self.receipt_path(card))

    def sync(self, experiments: Sequence[str], unfinished: bool = True) -> dict[str, int]:
        counts = Counter(dict.fromkeys(OUTCOMES, 0))
        try:
            self.connect()
            for name in experiments or self.store.experiments():
                plan = self.store.read_plan(name)
                cards = [card_of(self.store, plan, row) for row in plan.all_rows]
                self.forget(plan, cards)
                counts.update(self._sync_run(card, unfinished) for card in cards)
        except UserError:
            raise
        except Exception as cause:
            again = f"mend that, then: {sync_command(self.name)}"
            raise UserError(f"{self.describe(cause)}; {again}") from cause
        return dict(counts)

    def _sync_run(self, card: Card, unfinished: bool) -> str:
        record = self.store.run(card.run)
        if lack := lacking(record):
            return lack
        result = record.result()
        if result is None and not unfinished:
            return MISSING
        held = self.is_there(card)
        if held and _read(self.receipt_path(card)) == receipt_of(card, self.place):
            return CURRENT
        tracker = self.tracker()
        replay(record, card, tracker, result)
        if result is None:
            tracker.leave()
        return CONTINUED if held else ADDED
