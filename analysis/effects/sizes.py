"""Effects over sizes: the arms that several experiments share, one experiment a size.

    log S(arm, size) = a + b log2 size,   S: the speedup (speedup.py),   size: the reference's parameters

What each doubling of size multiplies a speedup by is exp(b): 1 where an arm is worth as much at every size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ablab.analysis.effects.speedup import Speedup, Trend, speedups, trend
from ablab.core.errors import UserError
from ablab.core.store.store import Store


@dataclass(frozen=True)
class AtSize:
    """One experiment: how large its reference is, and what its arms save or cost."""

    experiment: str
    parameters: int  # of the first cell that is measured against nothing
    speedups: Sequence[Speedup]


@dataclass(frozen=True)
class OverSizes:
    """One arm in one unit, at the sizes where its curves are known."""

    cell: str
    reference: str
    unit: str
    by_size: Mapping[int, Speedup]  # parameters -> speedup, in rising order
    trend: Trend | None  # None at one size

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the trend leaves out 1."""
        found = self.trend
        if found is None or found.low is None or found.high is None:
            return False
        return found.low > 1 or found.high < 1

    @property
    def direction(self) -> str:
        """What the trend says of the effect."""
        if self.trend is None:
            return "one size tells no trend"
        if self.trend.low is None:
            return "two seeds or more at each size would give it an interval"
        if not self.told_apart:
            return "not told apart from 1"
        first, *_, last = (math.log(one.factor) for one in self.by_size.values())
        if first * last < 0:
            return "the effect changes sides with size"
        rises = self.trend.factor > 1
        faster = first + last > 0
        return f"the effect {'grows' if rises == faster else 'fades'} with size"


def parameters_of(store: Store, runs: pd.DataFrame, experiment: str) -> int:
    """Of an experiment's reference, as its first run has recorded them.  Raises UserError where none has."""
    roots = runs[runs.reference.isna()] if len(runs) else runs
    for run in roots.run if len(roots) else ():
        size = store.run(run).about().get("size")
        count = size.get("parameters") if isinstance(size, dict) else None
        if isinstance(count, int) and count > 0:
            return count
    raise UserError(
        f"{experiment!r}: no run of its reference has recorded how many parameters it has; "
        f"train it again with: ablab run {experiment}"
    )


def at_size(
    store: Store,
    experiment: str,
    runs: pd.DataFrame,
    logged: pd.DataFrame,
    metric: str,
    better: str,
) -> AtSize:
    """runs: of `frame.load`; logged: of `frame.curves`."""
    return AtSize(
        experiment=experiment,
        parameters=parameters_of(store, runs, experiment),
        speedups=speedups(runs, logged, metric, better),
    )


def over_sizes(found: Sequence[AtSize]) -> list[OverSizes]:
    """Every arm and unit of any of them, in their order.

    Raises UserError where two are of one size.
    """
    ordered = sorted(found, key=lambda one: one.parameters)
    for smaller, larger in zip(ordered, ordered[1:], strict=False):
        if smaller.parameters == larger.parameters:
            raise UserError(
                f"{smaller.experiment!r} and {larger.experiment!r} are of one size, "
                f"{smaller.parameters:,} parameters; name one experiment a size"
            )
    return list(_arms(ordered))


def _arms(ordered: Sequence[AtSize]) -> Iterator[OverSizes]:
    by_arm: dict[tuple[str, str, str], dict[int, Speedup]] = {}
    for size in ordered:
        for one in size.speedups:
            arm = (one.cell, one.reference, one.unit)
            by_arm.setdefault(arm, {})[size.parameters] = one
    for (cell, reference, unit), by_size in by_arm.items():
        sizes = {float(parameters): one for parameters, one in by_size.items()}
        slope = trend(sizes) if len(sizes) > 1 else None
        yield OverSizes(cell, reference, unit, by_size, slope)
