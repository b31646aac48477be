"""What the runs of an experiment were asked: per arm each score, how far other items would have moved it, and seeds.

Seeds of an arm answer the same items, so their answers are averaged item by item first: what is left of the spread over
items is the items' own.  A difference is one of two arms on the same items, of which what both find hard moves neither.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from ablab.core.store.evaluation import (
    Estimate,
    Evaluation,
    Part,
    damages_of,
    evaluations_of,
    files_of,
)
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store


@dataclass(frozen=True)
class ArmScore:
    """One score of one arm.  Intervals are of 95 %, over items.

    delta: minus its reference, on the same items; None where that was asked other ones, or nothing.
    """

    name: str  # eval/core@100
    cell: str
    mean: float
    low: float
    high: float
    sd: float | None  # over seeds
    seeds: int
    items: int
    bundle: str
    delta: Estimate | None = None


@dataclass(frozen=True)
class Scores:
    rows: list[ArmScore] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)  # a line each


def scores(store: Store, runs: pd.DataFrame) -> Scores:
    """runs: of frame.load.  Ordered by score, then as the cells are."""
    found: dict[str, dict[str, list[Evaluation]]] = {}  # suite -> cell -> one a seed
    damages: list[str] = []
    done = runs[runs.status == FINISHED] if len(runs) else runs
    for cell, run in zip(done.get("cell", ()), done.get("run", ()), strict=True):
        record = store.run(run)
        if not files_of(record.folder):
            continue
        damages += damages_of(record.folder)
        result = record.result()
        for one in evaluations_of(record, result) if result else ():
            found.setdefault(one.headline, {}).setdefault(cell, []).append(one)
    references = dict(zip(runs.get("cell", ()), runs.get("reference", ()), strict=True))
    rows = [row for cells in found.values() for row in _of_suite(cells, references)]
    order = list(dict.fromkeys(row.name for row in rows))
    return Scores(sorted(rows, key=lambda row: order.index(row.name)), damages)


def _of_suite(
    cells: dict[str, list[Evaluation]], references: dict[str, str | None]
) -> Iterator[ArmScore]:
    together = {cell: averaged(seeds) for cell, seeds in cells.items()}
    for cell, seeds in cells.items():
        mean = together[cell]
        reference = together.get(references.get(cell) or "")
        deltas = mean.minus(reference) if reference else {}
        for name, one in mean.headlines.items():
            values = [seed.headlines[name].value for seed in seeds if seed.asks_as(mean)]
            yield ArmScore(
                name=name,
                cell=cell,
                mean=one.value,
                low=one.low,
                high=one.high,
                sd=statistics.stdev(values) if len(values) > 1 else None,
                seeds=len(values),
                items=one.items,
                bundle=mean.bundle,
                delta=deltas.get(name),
            )


def averaged(seeds: Sequence[Evaluation]) -> Evaluation:
    """Item by item, of those that were asked what the first was."""
    first = seeds[0]
    alike = [one for one in seeds if one.asks_as(first)]
    parts = [_mean([one.parts[i] for one in alike]) for i in range(len(first.parts))]
    return replace(first, parts=parts)


def _mean(parts: Sequence[Part]) -> Part:
    values = [
        statistics.fmean(item) for item in zip(*(one.values for one in parts), strict=True)
    ]
    return replace(parts[0], values=values)
