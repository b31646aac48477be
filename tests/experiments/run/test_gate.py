"""The gate: references need not wait at it, every other arm does, and what is known is not asked again."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ablab.core.recipe.intervention import REGISTRY
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.run import gate as gates
from ablab.experiments.run.gate import Gate
from ablab.experiments.run.progress import Quiet
from ablab.experiments.run.runner import execute
from ablab.experiments.run.this_machine import ThisMachine
from ablab.experiments.track.chosen import tracked


@pytest.fixture
def gate(tmp_path):
    """Make a gate of quickstart, or of some of its cells; `said` is what it told.  runtime__kernels: an override."""

    def of(*cells: str, together: bool = False, **overrides: Any) -> Gate:
        paths = {path.replace("__", "."): value for path, value in overrides.items()}
        experiment = load("quickstart", paths)
        runs = [run for run in experiment.runs() if not cells or run.cell in cells]
        said: list[dict[str, str]] = []
        runtime = experiment.sheet.runtime
        made = Gate(experiment, Store(tmp_path), runs, said.append, runtime, together)
        made.said = said
        return made

    return of


def cells_of(runs) -> set[str]:
    return {run.cell for run in runs}


def answered(gate, traces):
    """Every missing trace given, in the order asked for; returns what each answer let through."""
    missing = list(gate.missing.values())
    return [gate.traced_as(run.id, traces.get(run.cell, run.cell)) for run in missing]


def test_references_begin_at_once_and_the_others_when_every_trace_is_there(gate):
    asked = gate()
    cells = [run.cell for run in asked.missing.values()]
    first = asked.passing()
    assert len(cells) == len(set(cells)) == 12
    assert cells_of(first) == {"full"}
    assert not asked.said
    *before, last = answered(asked, {})
    assert not any(before)
    assert asked.said == [{}]
    assert len(first) + len(last) == len({run.id for run in first + last}) == 36


def test_where_a_change_of_graph_is_dear_references_wait_for_the_last_trace_too(gate):
    asked = gate(together=True)
    assert asked.passing() == []
    *before, last = answered(asked, {"full": "same", "- mup": "same"})
    assert not any(before)
    assert len(last) == len({run.id for run in last}) == 33
    assert last[0].cell == "full"
    assert "- mup" not in cells_of(last)


def test_an_arm_with_the_trace_of_its_reference_is_named_and_left_out(gate):
    asked = gate()
    *_, last = answered(asked, {"full": "same", "- mup": "same"})
    assert asked.said == [{"- mup": "full"}]
    assert len(last) == 30
    assert "- mup" not in cells_of(last)


def test_what_one_check_learned_the_next_one_knows_until_the_code_changes(gate, monkeypatch):
    answered(gate(), {"full": "same", "- mup": "same"})
    again = gate()
    assert not again.missing
    assert len(again.passing()) == 33
    assert again.said == [{"- mup": "full"}]
    monkeypatch.setattr(gates, "code_fingerprint", lambda: "other")
    assert len(gate().missing) == 12


def test_what_was_learned_on_one_path_is_asked_again_on_another(gate):
    """Else an inert arm, traced by kernels, would differ from a reference that was traced without."""
    answered(gate(runtime__kernels="torch"), {})
    assert not gate(runtime__kernels="torch").missing
    assert len(gate(runtime__kernels="triton").missing) == 12


def test_a_damaged_memory_is_asked_again(gate):
    asked = gate()
    answered(asked, {})
    asked.traces.path.write_text("{")
    assert len(gate().missing) == 12


def test_only_the_arms_that_will_run_and_their_reference_are_asked(gate):
    asked = gate("- mup", "- wsd")
    assert cells_of(asked.missing.values()) == {"full", "- mup", "- wsd"}
    assert asked.passing() == []
    assert not gate("full").missing


@pytest.mark.parametrize("cell", ["- mup", "full"])
def test_an_arm_that_cannot_be_compared_is_let_through_and_asked_again(gate, cell):
    """None and None are no equal traces."""
    asked = gate("- mup")
    *_, last = answered(asked, {"full": "same", "- mup": "same", cell: None})
    assert cells_of(last) == {"- mup"}
    assert asked.said == [{}]
    assert cells_of(gate("- mup").missing.values()) == {cell}


def test_of_a_chain_of_references_only_the_arms_that_wait_are_judged(gate):
    """+ value_residual waits; its reference, + gating, ended before and has one of its own, which nobody traces."""
    asked = gate("+ value_residual", design="cumulative")
    assert cells_of(asked.missing.values()) == {"+ gating", "+ value_residual"}
    *_, last = answered(asked, {"+ gating": "same", "+ value_residual": "same"})
    assert not last
    assert asked.said == [{"+ value_residual": "+ gating"}]


def test_an_arm_that_acts_late_by_its_own_word_is_not_held_back(gate, monkeypatch):
    late = replace(REGISTRY["wsd"].about, acts_late=True)
    monkeypatch.setattr(REGISTRY["wsd"], "about", late)
    asked = gate("- mup", "- wsd")
    assert cells_of(asked.passing()) == {"- wsd"}
    assert cells_of(asked.missing.values()) == {"full", "- mup"}


# -- what begins first -------------------------------------------------------------------------------------------------
class Noting(ThisMachine):
    """A Launcher of a machine with GPUs, and its Executor: it notes the first tasks, and does none of them."""

    def settled(self, runtime, recipes, plugins):
        return replace(runtime, device="cuda")

    def start(self, store, runtime, jobs, plugins):
        return self

    def execute(self, tasks, heard):
        self.first = [task.affinity for task in tasks]

    def close(self):
        pass


@pytest.mark.parametrize(("jobs", "begins"), [(1, True), (4, False)])
def test_on_several_gpus_no_seed_of_the_reference_begins_beside_the_traces(lab, jobs, begins):
    """Four workers would compile the reference, each for one seed; one worker alone trains it meanwhile."""
    sheet = lab.root / lab.sheet("grid")
    digest = json.loads((lab.store / "data" / "tiny" / "meta.json").read_text())["digest"]
    experiment = load(str(sheet), {}, lambda data: digest)
    machine = Noting()
    store = Store(lab.store)
    execute(
        experiment,
        store,
        experiment.runs(),
        Quiet(),
        jobs,
        tracked=tracked("none"),
        launcher=machine,
    )
    assert machine.first.count("trace") == 4
    assert (len(machine.first) > 4) == begins
