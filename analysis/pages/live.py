"""An experiment while it is being trained: the page of `html.py`, made again when its records have changed.

Records may be half-written: a last line that is torn is left for the next look, a run that vanishes is missing.  What
goes wrong in one look is said on the page, which keeps what it last knew.
"""

import hashlib
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.pages import html, report
from ablab.analysis.pages.html import Look, Page
from ablab.analysis.pages.html_tables import Cell, Column, Table, provenance
from ablab.analysis.pages.text import NONE
from ablab.core.errors import UserError, told
from ablab.core.store.planned import GridPlan, Planned, command
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store

SHARE = 0.2  # of one core, at most, that looking takes
QUIET_SECONDS = 120.0  # without a new line, after which a run is no longer said to train
QUIET_LINES = 5  # times the seconds between its last two lines, where that is longer
Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class State:
    """What a browser is told."""

    version: str  # tells one state from the next
    main: str
    data: str


class Watched:
    """One experiment of a store.  Threads may ask at the same time: one looks, the others get what it saw last."""

    def __init__(self, store: Store, name: str):
        self.store = store
        self.name = name
        self.curves = RememberedCurves()
        self.looking = threading.Lock()
        self.page = self._page(frame.curves(store, name, read=_no_curve))
        self.state = _state(self.page, version="first")
        self.seen = ""  # of the records behind the state
        self.rest_until = 0.0

    def whole(self) -> str:
        """The page for a browser that has just come: what is known, at once; the curves follow."""
        state = self.state
        return html.shell(self.name, state.main, state.data, plotly="plotly.js")

    def look(self) -> State:
        """The state, renewed where records have changed and the last look is long enough ago."""
        if not self.looking.acquire(blocking=False):
            return self.state
        try:
            if time.monotonic() >= self.rest_until:
                self._renew()
        finally:
            self.looking.release()
        return self.state

    def _renew(self) -> None:
        began = time.monotonic()
        try:
            plan = self.store.read_plan(self.name)
            seen = _fingerprint(self.store, plan)
            if seen != self.seen:
                self.page = self._page(frame.curves(self.store, self.name, read=self.curves))
                self.state = _state(self.page, version=seen)
                self.seen = seen
        except Exception as fault:  # a look never ends the watching; the next one may succeed
            self._say(fault)
        took = time.monotonic() - began
        self.rest_until = time.monotonic() + took * (1 - SHARE) / SHARE

    def _say(self, fault: Exception) -> None:
        words = str(fault) if isinstance(fault, UserError) else told(fault)
        look = self.page.look
        assert look, "a watched page has one"
        known = replace(look, progress=f"the records could not be read just now ({words})")
        self.page = replace(self.page, look=known)
        self.state = _state(self.page, version=f"flaw {words}")
        self.seen = ""

    def _page(self, logged: pd.DataFrame) -> Page:
        plan = self.store.read_plan(self.name)
        runs = frame.load(self.store, self.name)
        progress = progress_of(self.store, plan, runs, logged)
        found = _report(self.store, plan, runs)
        return Page(found, logged, provenance(self.store, runs), progress)


def _report(store: Store, plan: GridPlan, runs: pd.DataFrame) -> report.Report:
    """The verdicts so far; without any where no run has finished."""
    if len(runs) and (runs.status == FINISHED).any():
        return report.read(store, plan.name, mixed=True)
    return report.Report(plan, runs, effects=[], warnings=[], mixed=[], crossed=[])


def _state(page: Page, version: str) -> State:
    return State(version, html.main(page), html.data(page))


# -- what has changed --------------------------------------------------------------------------------------------------
class RememberedCurves:
    """`frame.curve` of runs that have changed since they were last read; of the others, what it said."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str, int], tuple[Stamp, frame.Lines]] = {}

    def __call__(self, row: Planned, record: Record, result: Result | None) -> frame.Lines:
        stamp = _stamp(record)
        who = (row.run, row.cell, row.pair)
        held = self.known.get(who)
        if held is None or held[0] != stamp:
            held = (stamp, frame.curve(row, record, result))
            self.known[who] = held
        return held[1]


def _no_curve(row: Planned, record: Record, result: Result | None) -> frame.Lines:
    return frame.NO_LINES


def _stamp(record: Record) -> Stamp:
    """Tells the files of a run from what they were."""
    paths = (record.metrics_path, record.pace_path, record.result_path, record.about_path)
    return tuple(_age_and_size(path) for path in paths)


def _age_and_size(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _fingerprint(store: Store, plan: GridPlan) -> str:
    """Of all that the page is made of; it changes too when a run falls silent."""
    now = time.time()
    digest = hashlib.sha256(repr(_age_and_size(store.plan_path(plan.name))).encode())
    for run in dict.fromkeys(row.run for row in plan.rows):
        record = store.run(run)
        digest.update(repr((_stamp(record), _is_silent(record, now))).encode())
    return digest.hexdigest()[:16]


def _is_silent(record: Record, now: float) -> bool:
    """Whether a run has not logged for so long that it may have been killed."""
    written, _ = _age_and_size(record.pace_path)
    return now - written / 1e9 > QUIET_SECONDS


# -- how far it is -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Training:
    """A run that trains now."""

    cell: str
    seed: int
    step: int
    steps: int  # 0: not known
    tokens: float
    rate: float  # tokens/s
    seconds_left: float | None


@dataclass(frozen=True)
class Work:
    """What a grid has to do, in runs and in tokens."""

    runs: int
    ended: int
    wanted: float  # tokens of all runs
    read: float  # of those
    training: list[Training]
    stirs: bool  # a run has just begun or ended

    @property
    def share(self) -> float:
        return self.read / self.wanted if self.wanted else 0.0

    @property
    def rate(self) -> float:
        """Tokens/s of all runs that train now."""
        return sum(one.rate for one in self.training)

    @property
    def progress(self) -> str:
        return f"{self.ended} of {self.runs} runs have ended, {len(self.training)} train now"

    def left(self, again: str) -> str:
        """How long it takes yet, at the pace of what trains; again: what to type where nothing does."""
        if self.ended == self.runs:
            return "this is the result"
        if not self.rate and self.stirs:
            return "a run has just begun or ended"
        if not self.rate:
            return f"nothing trains just now; go on with: {again}"
        return f"about {duration((self.wanted - self.read) / self.rate)} of training left"


def progress_of(store: Store, plan: GridPlan, runs: pd.DataFrame, logged: pd.DataFrame) -> Look:
    """How many runs have ended, which train, and how long the rest takes at the pace of those."""
    work = _work(store, plan, runs, logged)
    return Look(
        at=time.strftime("%H:%M:%S"),
        progress=work.progress,
        left=work.left(command(plan.name, sheet=plan.sheet, asked=plan.asked)),
        share=work.share,
        training=_training_table(work.training),
    )


def _work(store: Store, plan: GridPlan, runs: pd.DataFrame, logged: pd.DataFrame) -> Work:
    rows = _once(plan)
    statuses = dict(zip(runs.run, runs.status, strict=True)) if rows else {}
    lines = {str(run): own for run, own in logged.groupby("run")} if len(logged) else {}
    sizes = {row.run: _planned_tokens(store, row.run) for row in rows}
    # A run that has not begun takes as long as the longest that has; before any has, nothing is known.
    usual = max([*sizes.values(), *(runs.tokens if rows else ())], default=0.0)
    wanted = read = 0.0
    ended = 0
    training = []
    for row in rows:
        tokens = sizes[row.run] or usual
        wanted += tokens
        if statuses[row.run] not in (frame.MISSING, frame.INTERRUPTED):
            ended += 1
            read += tokens
        elif row.run in lines:
            own = lines[row.run]
            read += float(own.tokens.max())
            if not _has_stopped(store.run(row.run), own):
                training.append(_training(store, row, own, tokens))
    stirs = any(_stirs(store.run(row.run)) for row in rows)
    return Work(len(rows), ended, wanted, read, training, stirs)


def _once(plan: GridPlan) -> list[Planned]:
    """A row a run, though several cells may share it."""
    return list({row.run: row for row in reversed(plan.rows)}.values())[::-1]


def _stirs(record: Record) -> bool:
    """Whether its begin or its end was written a moment ago."""
    written = max(_age_and_size(path)[0] for path in (record.about_path, record.result_path))
    return time.time() - written / 1e9 < QUIET_SECONDS


def _planned_tokens(store: Store, run: str) -> float:
    """As its run.json says; 0 while it does not."""
    size = store.run(run).about().get("size")
    tokens = size.get("tokens") if isinstance(size, dict) else None
    return float(tokens) if isinstance(tokens, int | float) else 0.0


def _has_stopped(record: Record, lines: pd.DataFrame) -> bool:
    """Whether a run without a result has been silent for much longer than between its last lines."""
    between = lines.seconds.diff().iloc[-1] if len(lines) > 1 else 0.0
    patience = max(QUIET_SECONDS, QUIET_LINES * (between if between == between else 0.0))
    written, _ = _age_and_size(record.metrics_path)
    return time.time() - written / 1e9 > patience


def _training(store: Store, row: Planned, lines: pd.DataFrame, tokens: float) -> Training:
    last = lines.iloc[-1]
    rate = last.get("tokens_per_second", 0.0)
    rate = float(rate) if rate == rate else 0.0
    size = store.run(row.run).about().get("size")
    steps = size.get("steps", 0) if isinstance(size, dict) else 0
    return Training(
        cell=row.cell,
        seed=row.seed,
        step=int(last.step),
        steps=steps,
        tokens=float(last.tokens),
        rate=rate,
        seconds_left=max(tokens - last.tokens, 0.0) / rate if rate else None,
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _training_table(training: Iterable[Training]) -> Table:
    columns = [
        Column("trains now"),
        Column("seed", "num"),
        Column("step", "num"),
        Column("tokens/s", "num spare"),
        Column("left", "num"),
    ]
    rows = []
    for one in training:
        left = duration(one.seconds_left) if one.seconds_left is not None else NONE
        step = f"{one.step:,} of {one.steps:,}" if one.steps else f"{one.step:,}"
        rows.append(
            [
                Cell(one.cell),
                Cell(f"{one.seed}", one.seed, "num"),
                Cell(step, one.step, "num"),
                Cell(f"{one.rate:,.0f}", one.rate, "num spare"),
                Cell(left, one.seconds_left, "num"),
            ]
        )
    return Table(columns, rows)
