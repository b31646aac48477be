"""Per arm each score, averaged over seeds item by item, and its difference on the same items."""

import statistics

import pandas as pd
import pytest

from ablab.analysis.effects.evaluations import scores
from ablab.core.store.evaluation import Evaluation, Part, path_of, write
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store

ANSWERS = {  # (cell, seed) -> what the run got right
    ("base", 0): [1.0, 0.0, 1.0, 1.0],
    ("base", 1): [1.0, 0.0, 0.0, 1.0],
    ("+ a", 0): [1.0, 1.0, 1.0, 1.0],
    ("+ a", 1): [1.0, 0.0, 1.0, 1.0],
}


def name_of(cell: str, seed: int) -> str:
    return f"{len(cell)}{seed}".zfill(16)


@pytest.fixture
def store(tmp_path):
    kept = Store(tmp_path)
    for (cell, seed), values in ANSWERS.items():
        run = name_of(cell, seed)
        kept.run(run).finish(Result(run, FINISHED, 1, 1, weights=run))
        parts = [Part("t", values)]
        asked = Evaluation("blimp", "eval/blimp", "centered", parts, "b", run)
        write(kept.run(run).folder, asked)
    return kept


@pytest.fixture
def runs():
    return pd.DataFrame(
        [
            {
                "cell": cell,
                "run": name_of(cell, seed),
                "reference": "base" if cell != "base" else None,
                "status": FINISHED,
            }
            for cell, seed in ANSWERS
        ]
    )


def test_an_arm_has_its_mean_its_noise_over_seeds_and_its_difference_on_the_same_items(
    store, runs
):
    base, arm = scores(store, runs).rows
    assert (base.cell, arm.cell) == ("base", "+ a")
    assert base.mean == pytest.approx((0.75 + 0.5) / 2)
    assert base.sd == pytest.approx(statistics.stdev([0.75, 0.5]))
    assert base.delta is None
    assert (arm.seeds, arm.items) == (2, 4)
    over_seeds = [0.0, 0.5, 0.5, 0.0]  # of each item, arm minus base
    assert arm.delta.value == pytest.approx(statistics.fmean(over_seeds))
    assert arm.delta.error == pytest.approx(statistics.stdev(over_seeds) / 2)


def test_other_items_give_no_difference_and_a_damaged_file_is_named(store, runs):
    run = name_of("+ a", 0)
    parts = [Part("t", [1.0, 1.0])]
    other = Evaluation("blimp", "eval/blimp", "centered", parts, "another", run)
    write(store.run(run).folder, other)
    path_of(store.run(name_of("+ a", 1)).folder, "blimp").write_bytes(b"{")
    found = scores(store, runs)
    arm = found.rows[-1]
    assert (arm.cell, arm.seeds, arm.delta) == ("+ a", 1, None)
    assert len(found.damages) == 1 and "is damaged" in found.damages[0]


def test_runs_that_were_asked_nothing_have_no_scores(tmp_path, runs):
    assert scores(Store(tmp_path / "empty"), runs.iloc[:0]).rows == []
