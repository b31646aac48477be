"""The tables of a page: cells of text with a value to sort by, and the same as CSV."""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.effects.effect import REFERENCE, Effect
from ablab.analysis.effects.frame import INTERRUPTED, MISSING
from ablab.analysis.effects.intervals import MODERATED_FROM
from ablab.analysis.effects.speedup import FLOPS, SECONDS, TOKENS, Speedup, speedups
from ablab.analysis.pages.report import Report, off, times
from ablab.analysis.pages.text import NONE, number
from ablab.core.store.evaluation import Estimate
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store

DATA = re.compile(r"^data:\n  name: (.*)\n  digest: (.*)$", re.MULTILINE)  # of recipe.yaml
UNITS = (TOKENS, FLOPS, SECONDS)
MOST_VALUES = 6  # of one fact of the provenance
RECORDED = {
    "code": "code",
    "kernels": "kernels",
    "runtime": "settings",
}  # column or its prefix -> what it is


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | str | None = None  # to sort by; the text where there is none
    kind: str = ""  # a class of page.css


@dataclass(frozen=True)
class Column:
    name: str
    kind: str = ""  # num: numbers; spare: a phone goes without
    hint: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Verdict:
    """A row of the verdict table."""

    cell: str
    word: str  # the verdict
    says: str
    off: str
    delta: float | None
    low: float | None
    high: float | None
    interval: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Verdicts:
    """The verdict table, and the scale that its intervals are drawn on."""

    columns: Sequence[Column]
    rows: Sequence[Verdict]
    low: float
    high: float
    csv: str  # a data: address

    def at(self, value: float) -> float:
        """Where a delta stands on the scale, in per cent of its width."""
        return round(100 * (value - self.low) / (self.high - self.low or 1), 2)


def verdicts(report: Report) -> Verdicts:
    """The arms, the reference first."""
    effects = sorted(report.effects, key=lambda effect: effect.verdict != REFERENCE)
    known = [
        end
        for effect in effects
        for end in (effect.low, effect.high, effect.delta)
        if end is not None
    ]
    columns = [
        Column("mean", "num spare"),
        Column("sd", "num spare", "between seeds"),
        # That over seeds is drawn, as the interval.
        Column(
            "SE text", "num spare", "of the difference, over documents of the held-out text"
        ),
        Column("seeds", "num spare", "that arm and reference both finished"),
        Column("p (Holm)", "num spare", "of no difference, adjusted for all arms together"),
        Column("tokens/s", "num spare"),
        Column("x reference", "num spare", "throughput over that of the reference"),
        Column("method", "spare"),
    ]
    rows = [_verdict(report, effect) for effect in effects]
    # A column in which nothing stands takes the room of one that says something.
    said = [i for i in range(len(columns)) if any(row.cells[i].text != NONE for row in rows)]
    return Verdicts(
        columns=[columns[i] for i in said],
        rows=[replace(row, cells=[row.cells[i] for i in said]) for row in rows],
        low=min([0.0, *known]),
        high=max([0.0, *known]),
        csv=csv_address(effects_frame(effects)),
    )


def _verdict(report: Report, effect: Effect) -> Verdict:
    ratio = effect.tokens_per_second_ratio
    interval = ""
    if effect.low is not None and effect.high is not None:
        interval = f"{signed(effect.low)} to {signed(effect.high)}"
    few = "few" if effect.n < MODERATED_FROM else ""
    return Verdict(
        cell=effect.cell,
        word=effect.word,
        says=effect.sentence,
        off=_control(report, effect),
        delta=effect.delta,
        low=effect.low,
        high=effect.high,
        interval=interval,
        cells=[
            Cell(number(effect.mean, ".4f"), effect.mean, "num spare"),
            Cell(number(effect.sd, ".4f"), effect.sd, "num spare"),
            Cell(number(effect.token_error, ".4f"), effect.token_error, "num spare"),
            Cell(f"{effect.n}", effect.n, f"num spare {few}"),
            Cell(number(effect.p_adjusted, ".2g"), effect.p_adjusted, "num spare"),
            Cell(
                number(effect.tokens_per_second, ",.0f"), effect.tokens_per_second, "num spare"
            ),
            Cell(number(ratio, ".2f"), ratio, "num spare"),
            Cell(effect.method or NONE, kind="spare"),
        ],
    )


def _control(report: Report, effect: Effect) -> str:
    """What stands where an arm's ingredients are off, and its reference where that is not the page's first."""
    if effect.verdict == REFERENCE:
        return ""
    told = [off(report.plan, effect)]
    first = next(one.cell for one in report.effects if one.verdict == REFERENCE)
    if effect.reference != first:
        told.append(f"as {effect.reference}")
    return "; ".join(word for word in told if word)


def signed(value: float) -> str:
    """With its sign, a true minus."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


EFFECT_COLUMNS = [
    "cell",
    "reference",
    "n",
    "mean",
    "sd",
    "reference_mean",
    "delta",
    "low",
    "high",
    "seed_error",
    "token_error",
    "method",
    "p_adjusted",
    "p_equivalent",
    "tokens_per_second",
    "tokens_per_second_ratio",
    "sentence",
]


def effects_frame(effects: Iterable[Effect]) -> pd.DataFrame:
    """A row a cell; `low` and `high` are the ends of the 95 % interval, `p` is that of the comparison alone."""
    rows = []
    for effect in effects:
        told = {name: getattr(effect, name) for name in EFFECT_COLUMNS}
        told["verdict"] = effect.word
        told["p"] = effect.interval.p if effect.interval else None
        rows.append(told)
    return pd.DataFrame(rows)


def csv_address(table: pd.DataFrame) -> str:
    """A data: address under which a browser saves the table."""
    encoded = base64.b64encode(table.to_csv(index=False).encode()).decode()
    return f"data:text/csv;charset=utf-8;base64,{encoded}"


# -- effects in compute, and of factors --------------------------------------------------------------------------------


def speedup_table(report: Report, logged: pd.DataFrame) -> Table:
    """A row an arm: how many times less it costs than its reference for the loss that both reach."""
    found: dict[str, dict[str, Speedup]] = {}
    plan = report.plan
    if report.effects and len(logged) and plan.metric in logged:
        for one in speedups(report.runs, logged, plan.metric, plan.better):
            found.setdefault(one.cell, {})[one.unit] = one
    columns = [Column("arm"), *(Column(f"in {unit}", "num") for unit in UNITS)]
    rows = [
        [Cell(cell), *(_times(units.get(unit)) for unit in UNITS)]
        for cell, units in found.items()
    ]
    return Table(columns, rows)


def _times(speedup: Speedup | None) -> Cell:
    if speedup is None:
        return Cell(NONE, kind="num")
    return Cell(times(speedup), speedup.factor, "num wrap")


def asked_table(report: Report) -> Table:
    """A row a score and an arm, of what evaluations found."""
    columns = [
        Column("score"),
        Column("arm"),
        Column("mean", "num"),
        Column("95 % over items", "num"),
        Column("sd", "num", "over seeds"),
        Column("seeds", "num spare"),
        Column("items", "num spare"),
        Column("minus reference", "num"),
        Column("95 % over the same items", "num spare"),
    ]
    rows = []
    for one in report.asked:
        delta = one.delta
        rows.append(
            [
                Cell(one.name),
                Cell(one.cell),
                Cell(number(one.mean, ".4f"), one.mean, "num"),
                Cell(f"{one.low:.4f} to {one.high:.4f}", one.low, "num wrap"),
                Cell(number(one.sd, ".4f"), one.sd, "num"),
                Cell(f"{one.seeds}", one.seeds, "num spare"),
                Cell(f"{one.items:,}", one.items, "num spare"),
                Cell(signed(delta.value), delta.value, "num") if delta else Cell(NONE),
                Cell(_reach(delta), delta.low, "num spare") if delta else Cell(NONE),
            ]
        )
    return Table(columns, rows)


def _reach(delta: Estimate) -> str:
    return f"{signed(delta.low)} to {signed(delta.high)}"


def factor_table(report: Report) -> Table:
    """A row a factor or a pair of factors, of a design that crosses them."""
    columns = [
        Column("factor"),
        Column("verdict"),
        Column("difference", "num"),
        Column("95 % interval", "num"),
        Column("p (Holm)", "num spare"),
        Column("not told from", "spare"),
    ]
    rows = []
    for one in report.crossed:
        interval = NONE
        if one.low is not None and one.high is not None:
            interval = f"{signed(one.low)} to {signed(one.high)}"
        rows.append(
            [
                Cell(one.term),
                Cell(one.word),
                Cell(NONE if one.delta is None else signed(one.delta), one.delta, "num"),
                Cell(interval, one.low, "num wrap"),
                Cell(number(one.p_adjusted, ".2g"), one.p_adjusted, "num spare"),
                Cell(", ".join(one.aliases) or NONE, kind="spare"),
            ]
        )
    return Table(columns, rows)


# -- what it took ------------------------------------------------------------------------------------------------------


def costs(report: Report, logged: pd.DataFrame) -> Table:
    """A row a cell, and their sum."""
    runs = report.runs
    flops = logged.groupby("run").flops.max() if len(logged) else pd.Series(dtype=float)
    spent = Spent(
        seconds=runs.seconds.to_numpy(float),
        tokens=runs.tokens.to_numpy(float),
        flops=runs.run.map(flops).to_numpy(float),
        rates=runs.tokens_per_second.to_numpy(float),
        peaks=runs.peak_bytes.to_numpy(float),
        finished=(runs.status == FINISHED).to_numpy(),
    )
    places = runs.groupby("cell", sort=False).indices
    rows = []
    for cell in runs.cell.unique():
        own = np.asarray(places[cell])
        rows.append(_cost(str(cell), spent.at(own)))
    # A run that several cells share was trained once.
    once = np.flatnonzero(~runs.run.duplicated())
    rows.append(_cost("all", spent.at(once), kind="total"))
    columns = [
        Column("arm"),
        Column("runs", "num"),
        Column("tokens", "num", "of training, all runs"),
        Column("FLOPs", "num spare", "forward and backward"),
        Column("hours", "num", "of training, all runs; runs side by side count each"),
        Column("tokens/s", "num spare", "mean of the finished runs"),
        Column("peak GiB", "num spare", "of device memory"),
    ]
    return Table(columns, rows)


@dataclass(frozen=True)
class Spent:
    """What runs took, [R] each; NaN where it is not known."""

    seconds: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    rates: np.ndarray  # tokens/s
    peaks: np.ndarray  # bytes
    finished: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.seconds)

    def at(self, places: np.ndarray) -> "Spent":
        return Spent(
            seconds=self.seconds[places],
            tokens=self.tokens[places],
            flops=self.flops[places],
            rates=self.rates[places],
            peaks=self.peaks[places],
            finished=self.finished[places],
        )


def _cost(name: str, runs: Spent, kind: str = "") -> list[Cell]:
    seconds = float(np.nansum(runs.seconds))
    tokens = float(np.nansum(runs.tokens))
    flops = None if np.isnan(runs.flops).all() else float(np.nansum(runs.flops))
    rates = pd.Series(runs.rates[runs.finished])
    rate = rates.mean() if len(rates) else None
    peak = runs.peaks.max() / 2**30
    return [
        Cell(name, kind=kind),
        Cell(f"{len(runs)}", len(runs), "num"),
        Cell(counted(tokens), tokens, "num"),
        Cell(f"{flops:.2e}" if flops else NONE, flops, "num spare"),
        Cell(hours(seconds), seconds, "num"),
        Cell(number(rate, ",.0f"), rate, "num spare"),
        Cell(number(peak or None, ".1f"), peak, "num spare"),
    ]


def counted(tokens: float) -> str:
    """In thousands, millions, billions: 1.5 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g} {letter}"
    return f"{tokens:.0f}"


def hours(seconds: float) -> str:
    """Hours; of less than a tenth of one, minutes or seconds."""
    if seconds >= 360:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


# -- what was lost, and where all of it comes from ---------------------------------------------------------------------


def failures(report: Report, live: bool = False) -> Table:
    """The runs that left no final number; of a grid that is still running, those that will leave none."""
    runs = report.runs
    still_to_come = (MISSING, INTERRUPTED) if live else ()
    lost = runs[~runs.status.isin([FINISHED, *still_to_come])] if len(runs) else runs
    columns = [
        Column("arm"),
        Column("seed", "num"),
        Column("status"),
        Column("step", "num spare"),
        Column("what happened"),
        Column("run", "spare"),
    ]
    told = ["cell", "seed", "status", "step", "error", "note", "run"]
    listed = _rows_of(lost.reindex(columns=told))
    rows = [
        [
            Cell(cell),
            Cell(f"{seed}", seed, "num"),
            Cell(status.replace("_", " ")),
            Cell(f"{step}" if step else NONE, step, "num spare"),
            Cell(error or note or NONE),
            Cell(run, kind="code spare"),
        ]
        for cell, seed, status, step, error, note, run in listed
    ]
    return Table(columns, rows)


def run_list(report: Report) -> tuple[Table, str]:
    """Every planned run with its identity, and all that is known of them as a data: address of CSV."""
    metric = report.plan.metric
    columns = [
        Column("arm"),
        Column("seed", "num"),
        Column("run"),
        Column("status"),
        Column(metric, "num"),
        Column("code", "spare"),
    ]
    known = ["cell", "seed", "run", "status", metric, "code"]
    listed = _rows_of(report.runs.reindex(columns=known))
    rows = [
        [
            Cell(cell),
            Cell(f"{seed}", seed, "num"),
            Cell(run, kind="code"),
            Cell(status.replace("_", " ")),
            Cell(number(value, ".4f"), value, "num"),
            Cell(code or NONE, kind="code spare"),
        ]
        for cell, seed, run, status, value, code in listed
    ]
    plain = report.runs.drop(columns=["tags", "params"], errors="ignore")
    return Table(columns, rows), csv_address(plain)


def _rows_of(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Row by row; itertuples asks Arrow for each word alone, which takes 20 times as long."""
    return zip(*(table[name].tolist() for name in table), strict=True)


def provenance(store: Store, runs: pd.DataFrame) -> Table:
    """A row a fact: code, data, machine, what served each place, settings.  More than one value stands out."""
    facts = _facts_of_records(store, runs) | _facts_of_results(runs)
    alike = {fact: next(iter(values)) for fact, values in facts.items() if len(values) == 1}
    rows = [
        [Cell(fact), Cell(_mixed(values), kind="mixed")]
        for fact, values in facts.items()
        if fact not in alike
    ]
    groups: dict[str, list[str]] = {}
    for fact, value in alike.items():
        group, _, name = fact.partition("/")
        groups.setdefault(group, []).append(f"{name} {value}" if name else value)
    rows += [[Cell(group), Cell(", ".join(values))] for group, values in groups.items()]
    return Table([Column("what"), Column("value")], rows)


def _facts_of_records(store: Store, runs: pd.DataFrame) -> dict[str, Counter[str]]:
    """Fact -> value -> number of runs, of what run folders say."""
    facts: dict[str, Counter[str]] = {"data": Counter()}
    for run in runs.run.unique() if len(runs) else ():
        record = store.run(run)
        for name, digest in DATA.findall(_recipe(record)):
            facts["data"][f"{name}, digest {digest}"] += 1
        environment = record.about().get("environment")
        for name, value in (environment if isinstance(environment, dict) else {}).items():
            facts.setdefault(f"machine/{name}", Counter())[str(value)] += 1
    return {fact: values for fact, values in facts.items() if values}


def _facts_of_results(runs: pd.DataFrame) -> dict[str, Counter[str]]:
    """The same, of what results say."""
    facts = {}
    for column in map(str, runs):
        group, _, name = column.partition("/")
        if group not in RECORDED:
            continue
        given = runs[column].dropna().astype(str)
        values = Counter(given[given != ""])
        if values:
            facts[f"{RECORDED[group]}/{name}" if name else RECORDED[group]] = values
    return facts


def _mixed(values: Counter[str]) -> str:
    told = [f"{value} ({times} runs)" for value, times in values.most_common(MOST_VALUES)]
    more = len(values) - len(told)
    return "; ".join([*told, *([f"and {more} more"] if more else [])])


def _recipe(record: Record) -> str:
    try:
        return record.recipe_path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
