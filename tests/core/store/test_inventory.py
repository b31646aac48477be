"""What a store holds, and what may be removed from it."""

from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.store import inventory
from ablab.core.store.claim import Watch, take
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.result import DAMAGED, FINISHED, INTERRUPTED, Result
from ablab.core.store.store import Store

SHARED = "aaaa000000000001"  # both experiments want it
ALONE = "aaaa000000000002"  # the first alone
ORPHAN = "bbbb000000000003"
CUT = "cccc000000000004"  # without a result


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "store")
    for age, run in enumerate((SHARED, ALONE, ORPHAN, CUT)):
        record = made.run(run)
        record.begin("recipe: none\n", {"started": 100.0 + age})
        record.log(1, {"val/loss": 3.0}, {"seconds": 1.0})
        if run != CUT:
            record.finish(Result(run, FINISHED, step=7, tokens=70, metrics={"val/loss": 3.0}))
    for name, wanted in (("first", (SHARED, ALONE)), ("second", (SHARED,))):
        rows = [Planned(f"cell {run[-1]}", 0, 0, run) for run in wanted]
        made.write_plan(GridPlan(name, "?", "val/loss", "lower", "add_one", rows))
    reports = made.root / "reports" / "first"
    reports.mkdir(parents=True)
    (reports / "report.md").write_text("a page")
    return made


def names(runs) -> list[str]:
    return [run.run for run in runs]


def left(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "runs").iterdir())


def test_every_run_is_listed_with_who_wants_it_and_what_it_takes(store):
    shared, alone, orphan, cut = inventory.held_runs(store)
    assert shared.wanted_by == {"first": ["cell 1"], "second": ["cell 1"]}
    assert (alone.status, alone.step, alone.tokens) == (FINISHED, 7, 70)
    assert orphan.wanted_by == {}
    assert (cut.status, cut.run) == (INTERRUPTED, CUT)
    files = [path for path in store.run(ALONE).folder.rglob("*") if path.is_file()]
    assert alone.size == sum(len(path.read_bytes()) for path in files) > 100


def test_a_result_that_cannot_be_read_is_listed_as_damaged_and_costs_no_other(store):
    store.run(ALONE).result_path.write_bytes(b'{"run": "\xff')
    statuses = {run.run: run.status for run in inventory.held_runs(store)}
    assert statuses.pop(ALONE) == DAMAGED
    assert set(statuses.values()) == {FINISHED, INTERRUPTED}


def test_an_experiment_goes_with_the_runs_that_nobody_else_wants(store):
    what = inventory.removal(store, ["first"])
    assert names(what.runs) == [ALONE]
    assert names(what.shared) == [SHARED]
    inventory.remove(store, what)
    assert left(store) == [SHARED, ORPHAN, CUT]
    assert store.experiments() == ["second"]
    assert not (store.root / "reports" / "first").exists()


def test_two_experiments_go_with_what_they_share(store):
    what = inventory.removal(store, ["first", "second"])
    assert names(what.runs) == [SHARED, ALONE]
    assert what.shared == []


def test_a_run_that_an_experiment_wants_does_not_go_alone(store):
    said = f"run {ALONE} answers 'cell 2' of first; remove that experiment with it: ablab rm"
    with pytest.raises(UserError, match=said):
        inventory.removal(store, [ALONE])
    assert names(inventory.removal(store, ["first", ALONE]).runs) == [ALONE]


def test_a_run_is_named_by_its_first_digits_and_never_by_digits_that_two_have(store):
    assert names(inventory.removal(store, ["bbbb"]).runs) == [ORPHAN]
    with pytest.raises(UserError, match="'aaaa' begins 2 runs"):
        inventory.removal(store, ["aaaa"])
    for unknown in ("bbb", "dddd", "third"):
        with pytest.raises(UserError, match=f"{unknown!r} is not the id of one of 4 runs"):
            inventory.removal(store, [unknown])


def test_unused_runs_are_those_of_no_experiment(store):
    assert names(inventory.removal(store, [], unused=True).runs) == [ORPHAN, CUT]


def test_a_run_that_is_being_trained_stays_whole(store):
    what = inventory.removal(store, ["cccc"])
    before = sorted(store.run(CUT).folder.iterdir())
    held = take(store.run(CUT).claim_path, Watch())
    with pytest.raises(UserError, match=f"run {CUT} is being trained; stop that command"):
        inventory.remove(store, what)
    assert sorted(path for path in before if path.exists()) == before
    held.release()
    inventory.remove(store, what)
    assert CUT not in left(store)


def test_what_a_kill_left_half_removed_is_no_run_and_hinders_nobody(store):
    half = store.root / "runs" / f".{ORPHAN}{inventory.REMOVED}"
    half.mkdir()
    (half / "result.json").write_text("{}")
    assert ORPHAN in names(inventory.held_runs(store))
    inventory.remove(store, inventory.removal(store, [ORPHAN]))
    assert not half.exists()
    assert ORPHAN not in left(store)


def test_a_plan_that_cannot_be_read_stops_a_removal_that_might_take_its_runs(store):
    store.plan_path("second").write_text("{")
    with pytest.raises(UserError, match=r"second\.json is damaged"):
        inventory.removal(store, ["first"])
    assert len(left(store)) == 4


def test_the_earlier_stages_of_a_run_are_wanted_by_its_experiment(store):
    """`rm --unused` would take from the last stage what it went on from."""
    plan = store.read_plan("second")
    trunk = Planned("cell 1 · stable", 0, 0, ORPHAN)
    store.write_plan(replace(plan, trunks=[trunk]))
    assert names(inventory.removal(store, [], unused=True).runs) == [CUT]
    assert ORPHAN in names(inventory.removal(store, ["second"]).runs)


def test_an_empty_store_holds_nothing(tmp_path):
    assert inventory.held_runs(Store(tmp_path / "nowhere")) == []
