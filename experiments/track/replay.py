"""A run folder, told to a tracker: what `ablab sync` does, and what every live run begins with."""

from ablab.core.errors import UserError
from ablab.core.store.record import Record
from ablab.core.store.result import Result
from ablab.experiments.track.cards import summary_of
from ablab.experiments.track.tracker import Card, Tracker

ADDED, CONTINUED, CURRENT, MISSING = OUTCOMES = ("added", "continued", "current", "missing")
DAMAGED = "damaged"  # counted where there is one: its record cannot be read, and `ablab report` says why


def replay(record: Record, card: Card, tracker: Tracker, result: Result | None = None) -> None:
    """Show a run folder as if it were training now; `result` ends the run, without one it goes on."""
    pace = {line["step"]: line for line in record.pace()}
    looks = {line["step"]: line for line in record.looks()}
    seconds = 0.0
    tracker.open(card)
    for line in record.metrics():
        clock = pace.get(line["step"], {})
        seconds = clock.get("seconds", seconds)
        scalars = line | clock | looks.get(line["step"], {})
        scalars.pop("seconds", None)
        tracker.log(int(scalars.pop("step")), scalars, seconds)
    if result:
        tracker.close(result.status, summary_of(result, record))
    else:
        tracker.flush()


def lacking(record: Record) -> str:
    """DAMAGED or MISSING, of a run that cannot be shown; empty of one that can."""
    try:
        result = record.result()
    except UserError:
        return DAMAGED
    if record.hole(result):
        return DAMAGED
    if result is None and not record.metrics_path.exists():
        return MISSING
    return ""
