"""What an experiment's runs left behind, as two pandas tables.  Everything else in analysis/ starts from these.

A run that ended has the status in its result (`finished`, `diverged`, ...).  A run without a result is `missing` when
it has no folder, `interrupted` when it has one (killed, or still running), and `inert` when the plan notes that its arm
computes the bits of its reference, which is why nobody trained it.  The result of a `damaged`
run cannot be read: it says why, and costs no other run anything.  Columns are named as the runs log them
(`val/loss`), what described the machine is `runtime/dtype`, `runtime/device`, ..., and what served a place of the model
`kernels/attention`, ...
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.effects.service import COLUMN as KERNELS
from ablab.core.errors import UserError
from ablab.core.store.evaluation import scores_of
from ablab.core.store.metrics import known
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.record import Record
from ablab.core.store.result import DAMAGED as DAMAGED
from ablab.core.store.result import INTERRUPTED as INTERRUPTED
from ablab.core.store.result import Result
from ablab.core.store.store import Store

MISSING = "missing"
INERT = "inert"
# Of an experiment without logs.
CURVE_COLUMNS = [
    "cell",
    "reference",
    "pair",
    "run",
    "status",
    "step",
    "tokens",
    "flops",
    "seconds",
    "tokens_per_second",
]
Who = dict[str, Any]
LOOK_COLUMNS = ["cell", "reference", "pair", "run", "status", "step", "tokens"]


def unit(metric: str) -> str:
    """`val/loss` is in nats/token.  Unknown: the name itself."""
    return known(metric).unit


def load(store: Store, experiment: str) -> pd.DataFrame:
    """One row per planned run, in the plan's order.

    Columns: cell, pair, seed, run, reference, note (from the plan); status, step, tokens, seconds, tokens_per_second,
    peak_bytes, error, code, contended, segments (from the result; zero or empty without one); hole (where its
    log is not what the run left, empty where it is); unpaced (what is lost of its clock's lines, likewise); one column
    per final metric, per runtime setting and per place that a kernel may serve, NaN where a run lacks it.
    """
    plan = store.read_plan(experiment)
    return pd.DataFrame(
        [_row(row, record, result) for row, record, result in _runs(store, plan)]
    )


@dataclass(frozen=True)
class Lines:
    """The logged lines of one run, as columns: [P] each.  No data frame: 10,000 of them take ten seconds to join."""

    who: Who  # what each line begins with
    columns: dict[str, np.ndarray]

    def column(self, name: str) -> np.ndarray:
        """NaN where the run has logged none."""
        found = self.columns.get(name)
        return np.full(len(self), math.nan) if found is None else found

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


NO_LINES = Lines({}, {})


def curve(row: Planned, record: Record, result: Result | None) -> Lines:
    """The lines of one run, as `curves` has them; none where nothing was logged, or where its log has holes."""
    if record.hole(result):  # `load` says which
        return NO_LINES
    # A line of pace.jsonl speaks of the step of the same line of metrics.jsonl.
    pace = {line["step"]: line for line in record.pace()}
    lines = [pace.get(line["step"], {}) | line for line in record.metrics()]
    if not lines:
        return NO_LINES
    names = dict.fromkeys(name for line in lines for name in line)
    columns = {name: np.array([line.get(name, math.nan) for line in lines]) for name in names}
    found = Lines(_who(row, record, result), columns)
    columns["flops"] = found.column("tokens") * _token_flops(record)
    return found


def _who(row: Planned, record: Record, result: Result | None) -> Who:
    """What every logged line of a run begins with."""
    return {
        "cell": row.cell,
        "reference": row.reference,
        "pair": row.pair,
        "run": row.run,
        "status": _status(record, result),
    }


def _token_flops(record: Record) -> float:
    """Forward and backward; NaN for a run that has not recorded it."""
    size = record.about().get("size")
    cost = size.get("flops_per_token") if isinstance(size, dict) else None
    return float(cost) if isinstance(cost, int | float) else math.nan


ReadCurve = Callable[[Planned, Record, Result | None], Lines]


def curves(store: Store, experiment: str, read: ReadCurve = curve) -> pd.DataFrame:
    """One row per logged line of every run, in the plan's order.

    Columns: cell, reference, pair, run, status; step, tokens, flops and seconds (both of training so far; flops are NaN
    where a run has not recorded what a token costs), tokens_per_second and the logged metrics.
    Losses in nats/token.  What a line does not carry is NaN.  Empty when nothing was logged yet.
    A log with holes is left out.  read: `curve`, or what remembers what it said.
    """
    runs = _runs(store, store.read_plan(experiment))
    logs = [lines for run in runs if len(lines := read(*run))]
    if not logs:
        return pd.DataFrame(columns=CURVE_COLUMNS)
    lengths = [len(lines) for lines in logs]
    logged: dict[str, Any] = {}
    for name in logs[0].who:
        told = pd.Series([lines.who[name] for lines in logs])
        logged[name] = told.repeat(lengths).array
    for name in dict.fromkeys(name for lines in logs for name in lines.columns):
        logged[name] = np.concatenate([lines.column(name) for lines in logs])
    order = dict.fromkeys([*CURVE_COLUMNS, *logged])
    return pd.DataFrame({name: logged.get(name, math.nan) for name in order})


def stretches(names: pd.Series) -> Iterator[tuple[str, slice]]:
    """Each name and where it stands, of a column in which equal ones stand together: no groupby is needed."""
    codes, known = pd.factorize(names)
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1), len(codes)]
    for start, end in pairwise(bounds):
        if end > start:
            yield str(known[codes[start]]), slice(start, end)


def looks(store: Store, experiment: str) -> pd.DataFrame:
    """One row per look into a run (runtime.dynamics), in the plan's order.

    Columns: cell, reference, pair, run, status; step, tokens, and what was seen: `layer/kurtosis/00`, ...
    (core/train/dynamics.py).  Empty where nobody looked.
    Raises UserError for what is not what a run left.
    """
    tables = [
        table for run in _runs(store, store.read_plan(experiment)) if len(table := _look(*run))
    ]
    return (
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=LOOK_COLUMNS)
    )


def _look(row: Planned, record: Record, result: Result | None) -> pd.DataFrame:
    run = _who(row, record, result)
    tokens = {line["step"]: line.get("tokens", math.nan) for line in record.metrics()}
    lines: list[dict[str, Any]] = []
    for line in record.dynamics(result):
        step = int(line["step"])
        at = {"step": step, "tokens": tokens.get(step, math.nan)}
        lines.append({**run, **at, **line})
    return pd.DataFrame(lines)


def _runs(store: Store, plan: GridPlan) -> Iterator[tuple[Planned, Record, Result | None]]:
    for row in plan.rows:
        record = store.run(row.run)
        yield row, record, _result(record)


def _result(record: Record) -> Result | None:
    """A damaged one becomes a result that says so."""
    try:
        return record.result()
    except UserError as damage:
        return Result(record.folder.name, DAMAGED, step=0, tokens=0, error=str(damage))


def _status(record: Record, result: Result | None) -> str:
    if result is not None:
        return result.status
    return INTERRUPTED if record.folder.is_dir() else MISSING


def in_parts(segments: list[list[int]]) -> str:
    """`2 ranks, 1 from step 120`: by how many ranks a run was trained that went on with others; else empty."""
    later = [f"{ranks} from step {first}" for first, ranks in segments[1:]]
    return ", ".join([f"{segments[0][1]} ranks", *later]) if later else ""


def _row(row: Planned, record: Record, result: Result | None) -> dict[str, Any]:
    status = INERT if row.note.startswith(INERT) else _status(record, result)
    ended = dict(vars(result or Result(row.run, status, step=0, tokens=0)))
    del ended["log"], ended["held_out"], ended["dynamics"]
    ended["segments"] = in_parts(ended["segments"])
    ended["hole"] = record.hole(result)
    ended["unpaced"] = record.lost_pace() if result else ""
    metrics = ended.pop("metrics")
    runtime = ended.pop("runtime")
    kernels = ended.pop("kernels")
    ended["tokens_per_second"] = ended["tokens_per_second"] or math.nan  # zero: not measured
    ended |= metrics
    ended |= scores_of(record, result) if result else {}
    ended |= {f"runtime/{key}": value for key, value in runtime.items()}
    ended |= {f"{KERNELS}{place}": served for place, served in kernels.items()}
    return vars(row) | ended
