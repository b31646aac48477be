"""The benchmark of studies: the real coordinator, with a formula in place of the training."""

import optuna

from ablab.experiments.bench import study as bench_study
from ablab.experiments.bench.study import Formula
from ablab.experiments.tune import study


def test_every_trial_is_proposed_stored_and_timed_and_the_pool_is_given_back(monkeypatch):
    stored, trained, pool = [], [], study.Pool
    add, train = optuna.Study.add_trial, Formula.train
    monkeypatch.setattr(
        optuna.Study,
        "add_trial",
        lambda held, trial: stored.append((held.study_name, trial.value)) or add(held, trial),
    )
    monkeypatch.setattr(
        Formula,
        "train",
        lambda self, runs, stops: trained.extend(runs) or train(self, runs, stops),
    )
    rows = bench_study.bench_study(trials=8, stored=200)
    assert [name for name, _ in stored] == ["tpe/base"] * 8 + ["grid/base"] * 200 and min(
        value for _, value in stored
    ) < 3.2
    assert (
        len({run.id for run in trained}) == len(trained) == 208
    )  # opening the grid again trains nothing
    assert [row.what.split(",")[0] for row in rows] == [
        "coordinator",
        "opening a study of 200 stored trials",
    ]
    assert all(0 < row.measured < 60_000 for row in rows) and study.Pool is pool
