"""What was promised before the runs, and in what a plan deviates from it."""

from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.registration import Promise, register, standing

PROMISE = Promise(
    question="Does it pay?",
    metric="val/loss",
    better="lower",
    equivalence=0.01,
    design="leave_one_out",
    seeds=[0, 1],
    looks=[],
    hours=None,
    references={"full": None, "- a": "full"},
    runs={"full": ["f0", "f1"], "- a": ["a0", "a1"]},
)


def plan(registered: str = "", **changes) -> GridPlan:
    """The plan that keeps PROMISE."""
    rows = [
        Planned(cell, pair, pair, f"{cell[-1] if cell != 'full' else 'f'}{pair}", reference)
        for pair in (0, 1)
        for cell, reference in (("full", None), ("- a", "full"))
    ]
    kept = GridPlan(
        name="exp",
        question="Does it pay?",
        metric="val/loss",
        better="lower",
        design="leave_one_out",
        rows=rows,
        equivalence=0.01,
        registered=registered,
    )
    return replace(kept, **changes)


def row(cell: str, pair: int, run: str, reference: str | None = "full") -> Planned:
    return Planned(cell, pair, pair, run, reference)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path)


def promised(ledger: Ledger, **changes) -> str:
    return register(ledger, "exp", replace(PROMISE, **changes), print)


def test_a_plan_that_keeps_its_promise_deviates_in_nothing(ledger):
    entry = promised(ledger)
    found = standing(ledger, plan(entry))
    assert found.deviations == []
    assert found.promise == PROMISE
    assert found.entry.hash == entry


def test_the_same_promise_is_registered_once_whatever_has_been_seen_since(ledger):
    assert promised(ledger) == promised(ledger, seen=7)
    assert len(ledger.entries()) == 1


DEVIATIONS = {
    "question": (
        {"question": "Does b pay?"},
        "question: registered Does it pay?, now Does b pay?",
    ),
    "metric": ({"metric": "train/loss"}, "metric: registered val/loss, now train/loss"),
    "better": ({"better": "higher"}, "better: registered lower, now higher"),
    "smallest effect": ({"equivalence": None}, "equivalence: registered 0.01, now none"),
    "stopping rule": (
        {"looks": [3, 5, 8]},
        "stopping rule: registered all seeds at once, now looks at 3, 5, 8 seeds",
    ),
    "an arm more": ({"rows": [*plan().rows, row("- b", 0, "b0")]}, "arms added: - b"),
    "an arm less": (
        {"rows": [row for row in plan().rows if row.cell == "full"]},
        "arms dropped: - a",
    ),
    "a seed more": (
        {"rows": [*plan().rows, row("- a", 4, "a4")]},
        "seeds added: 4; registered 0, 1",
    ),
    "a seed less": ({"rows": plan().rows[:2]}, "seeds dropped: 1"),
    "another recipe": (
        {"rows": [*plan().rows[:-1], row("- a", 1, "other")]},
        "arms with another recipe: - a",
    ),
    "another reference": (
        {"rows": [*plan().rows[:-1], row("- a", 1, "a1", "base")]},
        "arms measured against another reference: - a",
    ),
}


@pytest.mark.parametrize("what", DEVIATIONS)
def test_what_deviates_is_said_in_a_sentence(ledger, what):
    changes, said = DEVIATIONS[what]
    found = standing(ledger, plan(promised(ledger), **changes))
    assert said in found.deviations
    assert len(found.deviations) == 1


def test_a_grid_with_looks_may_end_before_its_last_seed(ledger):
    entry = promised(ledger, looks=[1, 2])
    assert standing(ledger, plan(entry, looks=[1, 2], rows=plan().rows[:2])).deviations == []


def test_a_change_before_anything_could_be_read_is_no_deviation(ledger):
    promised(ledger, metric="train/loss")
    entry = promised(ledger)
    assert standing(ledger, plan(entry)).deviations == []


def test_a_change_after_something_could_be_read_is_one_and_says_when(ledger):
    promised(ledger, metric="train/loss")
    entry = promised(ledger, seen=2)
    metric, when = standing(ledger, plan(entry)).deviations
    assert metric == "metric: registered train/loss, now val/loss"
    assert "when 2 differences could be read" in when


def test_what_was_registered_after_its_differences_could_be_read_says_so_first(ledger):
    entry = promised(ledger, seen=2)
    (late,) = standing(ledger, plan(entry)).deviations
    assert late.startswith("registered late, ")
    assert "2 differences" in late


def test_an_experiment_of_an_old_store_has_no_entry_and_deviates_from_nothing(ledger):
    found = standing(ledger, plan())
    assert found.entry is None
    assert found.deviations == []


def test_a_ledger_that_lost_its_last_lines_is_refused_and_one_that_is_gone_is_told(ledger):
    register(ledger, "other", PROMISE, print)
    entry = promised(ledger)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole.splitlines(keepends=True)[0])
    with pytest.raises(
        UserError, match=f"lacks entry {entry}, which a plan names: lines were removed"
    ):
        standing(ledger, plan(entry))
    ledger.path.unlink()
    (said,) = standing(ledger, plan(entry)).deviations
    assert said.startswith("ledger.jsonl is gone, in which this experiment was entry")
