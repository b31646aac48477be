import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.analysis.effects import frame
from ablab.analysis.pictures.bands import bands, differences, metrics_of, points_for

METRIC = "val/loss"


def logged(*runs, status="finished"):
    """Rows of `frame.curves`.  runs: (cell, pair, tokens, values), three seconds and 6 FLOPs a token."""
    tables = []
    for cell, pair, tokens, values in runs:
        told = {
            "cell": cell,
            "reference": None if cell == "full" else "full",
            "pair": pair,
            "run": f"{cell}-{pair}",
            "status": status,
            "step": range(len(tokens)),
            "tokens": np.array(tokens, float),
            "flops": 6 * np.array(tokens, float),
            "seconds": 3 * np.array(tokens, float),
            METRIC: np.array(values, float),
        }
        tables.append(pd.DataFrame(told))
    return pd.concat(tables, ignore_index=True)


def test_a_band_is_the_mean_and_sd_of_the_runs_at_each_token_count(lab, normal):
    lab.cell("full", list(normal.normal(3, 0.1, 4)), None, points=7)
    rows = frame.curves(lab.write(), "loo")
    band = bands(rows, [METRIC])
    table = rows.pivot(index="tokens", columns="pair", values=METRIC).to_numpy()
    assert band["mean"].to_numpy() == pytest.approx(table.mean(1))
    assert band.sd.to_numpy() == pytest.approx(table.std(1, ddof=1))
    assert set(band.runs) == {4}


def test_a_run_says_nothing_where_it_has_not_been():
    band = bands(
        logged(("full", 0, [1, 2, 3], [6, 5, 4]), ("full", 1, [1, 2], [8, 7])), [METRIC]
    )
    assert list(band.runs) == [2, 2, 1]
    assert list(band["mean"]) == [7, 6, 4]
    assert np.isnan(band.sd.iloc[-1])
    assert list(band.seconds) == [3, 6, 9]
    assert list(band.flops) == [6, 12, 18]


def test_a_metric_that_is_logged_now_and_then_is_drawn_through_its_own_points():
    band = bands(logged(("full", 0, [1, 2, 3, 4], [6, np.nan, np.nan, 3])), [METRIC])
    assert list(band.tokens) == [1, 4]


@given(
    effect=st.floats(-1, 1),
    seeds=st.lists(st.floats(-5, 5), min_size=2, max_size=5),
    noise=st.lists(st.floats(-0.1, 0.1), min_size=5, max_size=5),
)
def test_the_difference_of_arms_that_share_their_seeds_is_free_of_the_seeds(
    effect, seeds, noise
):
    """The arm is the reference, the seed's own luck included, plus an effect and a little noise."""
    runs = [("full", pair, [1, 2], [seed, seed]) for pair, seed in enumerate(seeds)]
    moved = [seed + effect + noise[pair] for pair, seed in enumerate(seeds)]
    runs += [("- a", pair, [1, 2], [value, value]) for pair, value in enumerate(moved)]
    found = differences(logged(*runs), METRIC)
    assert set(found.cell) == {"- a"}
    known = np.array(noise[: len(seeds)])
    assert found["mean"].to_numpy() == pytest.approx(effect + known.mean(), abs=1e-9)
    assert found.sd.to_numpy() == pytest.approx(known.std(ddof=1), abs=1e-9)


def test_runs_that_did_not_finish_are_in_no_band_unless_asked_for():
    rows = logged(("full", 0, [1, 2], [3, 2]), status="interrupted")
    assert bands(rows, [METRIC]).empty
    assert len(bands(rows, [METRIC], ("finished", "interrupted"))) == 2


def test_many_curves_have_fewer_points_and_keep_their_ends():
    tokens = np.arange(1, 301)
    runs = [(f"- {i}", 0, tokens, tokens / 7) for i in range(400)]
    band = bands(logged(*runs), [METRIC])
    (points,) = set(band.groupby("cell").size())
    assert points == points_for(400) < 200
    assert set(band.groupby("cell").tokens.agg(["min", "max"]).itertuples(index=False)) == {
        (1, 300)
    }


def test_the_metric_of_the_experiment_is_the_first_to_choose_and_layers_are_left_out():
    columns = ["cell", "step", "tokens", "train/loss", "layer/0/norm", "val/loss", "val/bpb"]
    assert metrics_of(pd.DataFrame(columns=columns), "val/bpb") == [
        "val/bpb",
        "val/loss",
        "train/loss",
    ]
