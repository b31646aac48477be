"""What the ledger adds to a report: deviations, looks, challenges, provenance."""

from dataclasses import replace

import pytest

from ablab.analysis.pages import report as reports
from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger
from ablab.core.store.registration import Promise, register

QUIET = [3.0, 3.01, 3.02]


@pytest.fixture
def store(lab):
    """full, and `- a` that is worse beyond doubt, on three seeds."""
    lab.cell("full", QUIET, reference=None).cell("- a", [value + 1 for value in QUIET])
    return lab.write()


def promise_of(plan) -> Promise:
    """What the plan keeps."""
    runs: dict[str, list[str]] = {}
    for row in plan.rows:
        runs.setdefault(row.cell, []).append(row.run)
    return Promise(
        question=plan.question,
        metric=plan.metric,
        better=plan.better,
        equivalence=plan.equivalence,
        design=plan.design,
        seeds=[0, 1, 2],
        looks=plan.looks,
        hours=None,
        references={"full": None, "- a": "full"},
        runs=runs,
    )


def registered(store, **changes) -> str:
    plan = store.read_plan("loo")
    entry = register(Ledger(store.root), "loo", replace(promise_of(plan), **changes), print)
    store.write_plan(replace(plan, registered=entry))
    return entry


def test_a_report_that_keeps_its_promise_says_when_it_was_made_and_warns_of_nothing(store):
    entry = registered(store)
    found = reports.read(store, "loo")
    assert found.warnings == []
    assert f"as entry {entry} of the ledger; nothing deviates from it" in found.provenance[0]
    page = reports.write(store, "loo", store.root / "page").read_text()
    assert found.provenance[0] in page
    assert reports.as_json(found)["provenance"] == found.provenance


def test_a_report_of_an_older_store_says_that_nothing_was_registered(store):
    found = reports.read(store, "loo")
    assert found.warnings == []
    assert found.provenance[0].startswith("not registered: no entry of the ledger")


def test_deviations_stand_on_the_first_screen(store):
    registered(store, seeds=[0, 1], runs={"full": ["x", "y"]}, metric="train/loss")
    said = reports.read(store, "loo").warnings
    assert "metric: registered train/loss, now val/loss" in said
    assert "arms added: - a" in said
    assert "arms with another recipe: full" in said
    assert "seeds added: 2; registered 0, 1" in said


def test_a_report_under_an_edited_ledger_is_refused_by_its_line(store):
    registered(store)
    path = Ledger(store.root).path
    path.write_bytes(path.read_bytes().replace(b"Which", b"Whose"))
    with pytest.raises(UserError, match=r"ledger\.jsonl:1 was changed after it was written"):
        reports.read(store, "loo")


def test_a_look_says_that_it_is_one_and_what_a_verdict_passes(store):
    store.write_plan(replace(store.read_plan("loo"), looks=[3, 5, 8]))
    (said,) = reports.read(store, "loo").warnings
    assert said.startswith("a look, at 3 of at most 8 seeds: all arms are decided")
    assert "p (Holm) < 0.0014 here" in said


def test_an_arm_that_a_look_leaves_undecided_is_named_with_its_seeds(lab):
    lab.cell("full", QUIET, reference=None).cell("- a", [3.1, 3.0, 3.05])
    store = lab.write()
    store.write_plan(replace(store.read_plan("loo"), looks=[3, 5, 8]))
    (said,) = reports.read(store, "loo").warnings
    assert "1 of 1 arms are undecided: `- a` (3)" in said


def test_a_challenge_is_told(store):
    Ledger(store.root).append("challenge", "loo", {"sentence": "`- a`: helps stands"}, print)
    (said,) = reports.read(store, "loo").warnings
    assert said.startswith("challenged ")
    assert said.endswith(": `- a`: helps stands")
