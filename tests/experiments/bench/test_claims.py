"""The benchmarks of claims and checkpoints measure what they say."""

import pytest

from ablab.core.store import claim
from ablab.core.store.store import Store
from ablab.experiments.bench import checkpoint, claims
from ablab.experiments.bench.report import planned
from ablab.experiments.bench.targets import Cost

SMALL = {
    "model.width": 32,
    "model.layers": 1,
    "model.attention.head_dim": 16,
    "data.vocab": 64,
    "data.context": 16,
    "data.batch": 2,
    "data.held_out": 64,
    "budget.tokens": 100_000,
    "schedule.warmup_steps": 1,
    "runtime.device": "cpu",
}


def test_workers_divide_a_plan_and_train_each_run_once(tmp_path):
    store = Store(tmp_path)
    ids = planned(store, 30)
    trained = claims.divided(store, ids, workers=4)
    assert trained == dict.fromkeys(ids, 1)
    for id in ids:
        assert store.run(id).sound_result(print).status == "finished"


def test_a_takeover_takes_as_many_looks_as_it_must(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.1)
    monkeypatch.setattr(claims, "PATIENCE", 0.02)
    assert claims._of_a_takeover(Store(tmp_path)) > 0.1 * claim.STALE_AFTER


def test_the_rate_is_that_of_all_workers_together():
    assert claims.rate([Cost("a run", 4.0, "ms", 50.0)]).startswith("250 claims a second")


def test_a_save_is_measured_beside_the_steps_around_it(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SAVES", 2)
    monkeypatch.setattr(checkpoint, "STEPS", {"cpu": 2, "cuda": 2})
    found = checkpoint.bench_checkpoint("quickstart", SMALL, "base")
    assert found["step_ms"] > 0
    assert len(found["stalls_ms"]) == 2
    assert found["share_of_a_step"] == pytest.approx(found["stall_ms"] / found["step_ms"])
    gib = found["gib_per_second"] * found["written_seconds"]
    assert gib * 2**30 == pytest.approx(found["bytes"])
    checkpoint.show_checkpoint(found)
    assert "a save stalls training for" in capsys.readouterr().out
