import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ablab.analysis.effects.best import critical, may_be_best, ruled_out
from ablab.analysis.effects.intervals import block_error


@pytest.mark.parametrize(("cells", "seeds"), [(2, 3), (4, 3), (11, 3), (11, 8)])
def test_the_critical_value_is_dunnetts(cells, seeds):
    """Correlation one half of the differences; scipy's multivariate t integrates by another rule."""
    degrees = (cells - 1) * (seeds - 1)
    shape = np.full((cells - 1, cells - 1), 0.5) + 0.5 * np.eye(cells - 1)
    law = stats.multivariate_t(shape=shape, df=degrees, seed=1)
    bound = critical(cells, degrees)
    assert law.cdf(np.full(cells - 1, bound)) == pytest.approx(0.95, abs=2e-3)


def test_between_two_cells_it_is_the_one_sided_paired_test(normal):
    losses = normal.normal(0, 1, (2, 6))
    paired = stats.ttest_rel(losses[0], losses[1], alternative="greater")
    assert critical(2, 5) == pytest.approx(stats.t.ppf(0.95, 5), rel=1e-4)
    assert ruled_out(losses)[0] == (paired.pvalue < 0.05)


@pytest.mark.parametrize("seeds", [3, 8])
def test_the_true_best_stays_in_as_often_as_it_should(normal, seeds):
    """All equal is the hardest case.  Bounds: three errors of 4,000 experiments."""
    losses = normal.normal(0, 1, (4000, 11, seeds)) + normal.normal(0, 3, (4000, 1, seeds))
    kept = 1 - ruled_out(losses)[:, 0].mean()
    assert kept == pytest.approx(0.95, abs=3 * np.sqrt(0.05 * 0.95 / 4000))
    assert block_error(losses).mean() == pytest.approx(1, abs=0.01)


def runs_of(values: dict, status: str = "finished") -> pd.DataFrame:
    rows = []
    for cell, losses in values.items():
        for seed, loss in enumerate(losses):
            row = {"cell": cell, "seed": seed, "run": f"{cell}/{seed}", "y": loss}
            rows.append(row | {"status": "diverged" if loss is None else status})
    return pd.DataFrame(rows)


VALUES = {
    "full": [3.000, 3.101, 3.052],
    "- a": [3.001, 3.100, 3.053],
    "- b": [3.500, 3.602, 3.551],
}


def test_what_is_surely_worse_is_left_out_and_the_likeliest_comes_first():
    assert may_be_best(runs_of(VALUES), "y") == ["full", "- a"]
    assert may_be_best(runs_of(VALUES), "y", "higher") == ["- b"]


def test_seeds_that_some_cell_lost_do_not_count():
    lost = VALUES | {"- b": [*VALUES["- b"][:2], None]}
    assert may_be_best(runs_of(lost), "y") == []
    longer = {cell: [*losses, losses[0] + 0.2] for cell, losses in VALUES.items()}
    longer["- a"][3] = 3.198
    longer["- b"][1] = None
    assert may_be_best(runs_of(longer), "y") == ["full", "- a"]


def test_nothing_is_best_among_one_or_where_a_cell_has_no_run():
    assert may_be_best(runs_of({"full": VALUES["full"]}), "y") == []
    assert may_be_best(runs_of(VALUES | {"- c": [None] * 3}), "y") == []
