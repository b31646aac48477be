"""The arms of an experiment as one family: each gets the method that its seeds ask for, all of them one correction.

An arm whose runs are all there is compared by its differences (analysis/effects/intervals.py).  Where a run was lost,
pairs alone would throw away what its seed still says, so one model of all runs is fitted,  y ~ arm + seed:  at three
seeds with a quarter of the runs missing its intervals are half as wide.  From six pairs on the plain paired t needs
no help, and does not assume that all arms are equally noisy.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ablab.analysis.effects.comparison import Comparison
from ablab.analysis.effects.intervals import (
    MODERATED,
    MODERATED_FROM,
    PLAIN_FROM,
    Estimates,
    diffmax,
    paired,
    shrink,
    welch,
)
from ablab.analysis.effects.linear import TwoWay

WITH_SEEDS = "y ~ arm + seed"
FEWEST = 2  # seeds that have a spread


def estimates_of(comparisons: Sequence[Comparison]) -> dict[str, Estimates]:
    """Cell -> its difference, arrays [1]; those with fewer than two seeds are left out.  None may be inert."""
    known = [one for one in comparisons if one.n >= FEWEST]
    found = {one.cell: welch(one.x[None], one.y[None]) for one in known if one.disjoint}
    shared = [one for one in known if not one.disjoint]
    broken = [one for one in shared if one.broken and one.n < PLAIN_FROM]
    found |= _fitted(broken, shared)
    whole = [one for one in shared if one.cell not in found]
    few = [one for one in whole if _has_few_seeds(one)]
    plain = [one for one in whole if not _has_few_seeds(one)]
    found |= {one.cell: paired((one.x - one.y)[None]) for one in plain}
    return found | _few_seeds(few)


def _has_few_seeds(one: Comparison) -> bool:
    return MODERATED_FROM <= one.n < PLAIN_FROM


def _few_seeds(few: list[Comparison]) -> dict[str, Estimates]:
    """Of arms with three to five seeds, each with all of its runs."""
    if len(few) >= MODERATED_FROM:
        return _moderated(few)
    if len(few) == 2 and (values := _table(few)) is not None:
        differences = np.stack([one.x - one.y for one in few])
        both = diffmax(differences, values)
        return {one.cell: _arm(both, i) for i, one in enumerate(few)}
    return {one.cell: paired((one.x - one.y)[None]) for one in few}


def _moderated(few: list[Comparison]) -> dict[str, Estimates]:
    """As intervals.moderated, for arms that may differ in their number of seeds."""
    n = np.array([one.n for one in few], float)
    variances = np.array([(one.x - one.y).var(ddof=1) for one in few])
    deltas = np.array([(one.x - one.y).mean() for one in few])
    variance, degrees = shrink(variances, n - 1)
    together = Estimates(MODERATED, deltas, np.sqrt(variance / n), degrees)
    return {one.cell: _arm(together, i) for i, one in enumerate(few)}


def _arm(together: Estimates, i: int) -> Estimates:
    return Estimates(
        together.method,
        together.delta[i : i + 1],
        together.standard_error[i : i + 1],
        together.degrees[i : i + 1],
    )


def _table(comparisons: list[Comparison]) -> np.ndarray | None:
    """The metric of every cell that is compared, [cells, n]; None unless all are known over the same seeds."""
    seeds = [list(one.done[0].seeds) for one in comparisons]
    if any(own != seeds[0] for own in seeds):
        return None
    values = {}
    for one in comparisons:
        values[one.cell] = one.x
        values[one.reference] = one.y
    return np.stack(list(values.values()))


def _fitted(broken: list[Comparison], shared: list[Comparison]) -> dict[str, Estimates]:
    """Of arms that lost runs, by one model of all runs; those that it cannot tell are left out."""
    if not broken:
        return {}
    model, place = _model(shared)
    found = {}
    for one in broken:
        pair = (place[one.cell], place[one.reference])
        if model.tells(*pair):
            found[one.cell] = model.difference(*pair)
    return found


def _model(shared: list[Comparison]) -> tuple[TwoWay, dict[str, int]]:
    """y ~ arm + seed over the finished runs of all cells that are compared, and the number of each cell."""
    rows = {}
    for one in shared:
        rows[one.cell] = one.rows.finished
        rows[one.reference] = one.others.finished
    y = np.concatenate([own.values for own in rows.values()])
    cells = np.repeat(np.arange(len(rows)), [len(own) for own in rows.values()])
    seeds, _ = pd.factorize(np.concatenate([own.seeds for own in rows.values()]))
    return TwoWay(cells, seeds, y, WITH_SEEDS), {cell: i for i, cell in enumerate(rows)}
