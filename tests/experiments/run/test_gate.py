"""The liveness check: references need not wait for it, every other arm does, and what is known is not asked again."""

import pytest

from ablab.core.store.record import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.run import gate as alive
from ablab.experiments.run.gate import Check


@pytest.fixture
def check(tmp_path):
    experiment = load("quickstart")
    return lambda told=lambda inert: None, runs=None: Check(
        experiment, Store(tmp_path), experiment.runs() if runs is None else runs, told
    )


def answered(check, traces):
    """Every missing trace given, in the order asked for; returns what each answer set free."""
    return [
        check.heard(run.id, traces.get(run.cell, run.cell))
        for run in list(check.missing.values())
    ]


def test_references_begin_at_once_and_the_others_when_every_trace_is_there(check):
    said = []
    asked = check(said.append)
    cells, first = [run.cell for run in asked.missing.values()], asked.at_once()
    assert (
        len(cells) == len(set(cells)) == 12
        and {run.cell for run in first} == {"full"}
        and not said
    )
    *before, last = answered(asked, {})
    assert not any(before) and said == [{}]
    assert len(first) + len(last) == len({run.id for run in first + last}) == 36


def test_an_arm_with_the_trace_of_its_reference_is_named_and_left_out(check):
    said = []
    *_, last = answered(check(said.append), {"full": "same", "- mup": "same"})
    assert (
        said == [{"- mup": "full"}]
        and len(last) == 30
        and not any(run.cell == "- mup" for run in last)
    )


def test_what_one_check_learned_the_next_one_knows_until_the_code_changes(check, monkeypatch):
    answered(check(), {"full": "same", "- mup": "same"})
    said = []
    again = check(said.append)
    assert not again.missing and len(again.at_once()) == 33 and said == [{"- mup": "full"}]
    monkeypatch.setattr(alive, "code_fingerprint", lambda: "other")
    assert len(check().missing) == 12


def test_a_damaged_memory_is_asked_again(check):
    answered(asked := check(), {})
    asked.path.write_text("{")
    assert len(check().missing) == 12


def test_only_the_arms_that_will_run_and_their_reference_are_asked(check):
    runs = [run for run in load("quickstart").runs() if run.cell in ("- mup", "- wsd")]
    asked = check(runs=runs)
    assert {run.cell for run in asked.missing.values()} == {
        "full",
        "- mup",
        "- wsd",
    } and asked.at_once() == []
    assert not check(
        runs=[run for run in load("quickstart").runs() if run.cell == "full"]
    ).missing
