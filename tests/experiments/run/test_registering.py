"""The ledger of a store, as `ablab run` leaves it."""

from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger
from ablab.core.store.result import Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import grid_plan_of
from ablab.experiments.run.registering import registered


def promises(lab, name: str) -> list[dict]:
    return [entry.content for entry in Ledger(lab.store).entries(name, "registered")]


def test_a_grid_is_registered_before_its_first_run_and_once_however_often_it_is_asked(
    lab, ablab
):
    sheet = lab.sheet("asked", arms=["qk_norm"], seeds=[0])
    assert ablab("run", sheet, "--dry-run").code == 0
    assert promises(lab, "asked") == []
    assert lab.run("run", sheet, "--no-mlflow", "-q", "--run-inert").code == 0
    (entry,) = Ledger(lab.store).entries("asked")[:1]
    assert entry.kind == "registered"
    rows = lab.plan("asked")
    began = [(lab.run_folder(row["run"]) / "run.json").stat().st_mtime for row in rows]
    assert entry.unix <= min(began)
    assert entry.content["runs"] == {row["cell"]: [row["run"]] for row in rows}
    assert entry.content["seen"] == 0
    before = lab.files()["ledger.jsonl"]
    assert ablab("run", sheet, "--no-mlflow", "-q").code == 0
    assert lab.files()["ledger.jsonl"] == before
    experiment = load(str(lab.root / sheet), {}, lambda data: "0" * 16)
    more = experiment.runs([0, 1])
    registered(experiment, Store(lab.store), more, print)
    assert [promise["seeds"] for promise in promises(lab, "asked")] == [[0], [0, 1]]


def test_a_promise_says_how_many_differences_could_be_read_when_it_was_made(lab, tmp_path):
    experiment = load(
        str(lab.root / lab.sheet("late", arms=["qk_norm"])), {}, lambda data: "0" * 16
    )
    runs = experiment.runs([0, 1])
    store = Store(tmp_path)
    for run in runs[:4]:  # full, base and - qk_norm of seed 0; full of seed 1
        store.run(run.id).finish(Result(run.id, "finished", 20, 1280))
    registered(experiment, store, runs, print)
    (entry,) = Ledger(store.root).entries("late")
    assert entry.content["seen"] == 2


def test_a_file_whose_name_another_has_registers_nothing_under_it(lab, tmp_path):
    store = Store(tmp_path)
    mine = load(str(lab.root / lab.sheet("named", arms=["ema"])), {}, lambda data: "0" * 16)
    registered(mine, store, mine.runs(), print)
    store.write_plan(grid_plan_of(mine, mine.runs()))
    other = replace(mine, origin=str(lab.root / lab.sheet("other", arms=["qk_norm"])))
    with pytest.raises(
        UserError, match="experiment 'named' in .* is that of .*named.yaml, not of"
    ):
        registered(other, store, other.runs([7]), print)
    assert len(Ledger(store.root).entries()) == 1


def test_nothing_is_trained_under_a_ledger_that_was_edited(lab, ablab):
    path = lab.store / "ledger.jsonl"
    Ledger(lab.store).append("registered", "another", {"seeds": [1]}, print)
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"seeds":[1]', b'"seeds":[2]'))
    try:
        ended = ablab("run", lab.sheet("later", arms=["ema"], seeds=[0]), "--no-mlflow", "-q")
        assert ended.code == 2
        assert "was changed after it was written; put the file back from a copy" in ended.err
        assert len(ended.err.splitlines()) == 1
        assert not (lab.store / "experiments" / "later.json").exists()
    finally:
        path.write_bytes(kept)
