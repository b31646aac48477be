"""The benchmark of studies: the real coordinator, with a formula in place of the training."""

import optuna

from ablab.experiments.bench.study_overhead import FormulaPool, bench_study
from ablab.experiments.tune import study


def test_every_trial_is_proposed_stored_and_timed_and_the_pool_is_given_back(monkeypatch):
    stored, trained = [], []
    pool = study.Pool
    add, train = optuna.Study.add_trial, FormulaPool.train

    def add_and_note(held, trial):
        if "/" in held.study_name:  # else a sampler's memory of its own
            stored.append((held.study_name, trial.value))
        add(held, trial)

    def train_and_note(self, runs, stops):
        trained.extend(runs)
        train(self, runs, stops)

    monkeypatch.setattr(optuna.Study, "add_trial", add_and_note)
    monkeypatch.setattr(FormulaPool, "train", train_and_note)
    costs = bench_study(trials=8, stored=200)
    names = [name for name, _ in stored]
    assert names == ["tpe/base"] * 8 + ["grid/base"] * 200
    assert min(value for _, value in stored) < 3.2
    assert len(trained) == 208  # opening the grid again trains nothing
    assert len({run.id for run in trained}) == 208
    assert [cost.what.split(",")[0] for cost in costs] == [
        "coordinator",
        "opening a study of 200 stored trials",
    ]
    assert all(0 < cost.measured < 60_000 for cost in costs)
    assert study.Pool is pool
