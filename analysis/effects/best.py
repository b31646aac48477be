"""Which cell is best: those that the seeds cannot rule out, by Hsu's multiple comparisons with the best.

    cell i may be the best unless  m_i - min over j != i of m_j  >  d sqrt(2 MSE / n)

m: mean losses over shared seeds; MSE of y ~ cell + seed; d the one-sided critical value of Dunnett for that many cells,
so that the true best stays in with probability 0.95.  Hsu, Ann. Stat. 12:1136, 1984.  Simulated: it stays in in 94.6 to
95.3 % of experiments with equally noisy cells.
"""

from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import chdtri, ndtr

from ablab.analysis.effects.comparison import finished, with_numbers
from ablab.analysis.effects.intervals import LEVEL, MODERATED_FROM, block_error

NODES = 64  # of each of two integrals
HALVINGS = 40
FARTHEST = 50.0


def may_be_best(runs: pd.DataFrame, metric: str, better: str = "lower") -> list[str]:
    """The cells that may be the best, the likeliest first, over the seeds that all of them finished.

    runs: of `frame.load`.  Empty below two cells, and below three such seeds.
    """
    done = finished(with_numbers(runs, metric)).drop_duplicates(["cell", "seed"])
    if done.empty:
        return []
    table = done.pivot(index="cell", columns="seed", values=metric).dropna(axis="columns")
    cells, seeds = table.shape
    if cells < 2 or seeds < MODERATED_FROM or set(table.index) != set(runs.cell):
        return []
    losses = table.to_numpy(float) * (1 if better == "lower" else -1)
    kept = ~ruled_out(losses)
    order = np.argsort(losses.mean(-1), kind="stable")
    return [str(table.index[i]) for i in order if kept[i]]


def ruled_out(losses: np.ndarray) -> np.ndarray:
    """Which cells are surely not the lowest.  losses: [..., cells, n] -> bool [..., cells]."""
    *_, cells, n = losses.shape
    means = losses.mean(-1)
    sorted_means = np.sort(means, -1)
    lowest = sorted_means[..., :1]
    of_others = np.where(means == lowest, sorted_means[..., 1:2], lowest)
    error = np.sqrt(2 * block_error(losses) / n)[..., None]
    return means - of_others > critical(cells, (cells - 1) * (n - 1)) * error


@lru_cache(maxsize=256)
def critical(cells: int, degrees: int, level: float = LEVEL) -> float:
    """d with P(max_j (Z_j - Z_0) / sqrt 2 <= d U) = level, over cells - 1 others;  U = sqrt(chi^2 / df)."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    quantiles = (points + 1) / 2
    u = np.sqrt(chdtri(degrees, 1 - quantiles) / degrees)
    z, density = np.polynomial.hermite_e.hermegauss(NODES)
    density = density / density.sum()
    low = 0.0
    high = FARTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = ndtr(z + np.sqrt(2) * middle * u[:, None]) ** (cells - 1)
        if weights / 2 @ below @ density < level:
            low = middle
        else:
            high = middle
    return high
