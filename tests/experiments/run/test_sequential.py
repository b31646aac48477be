"""Looks: seeds go to undecided arms alone, within a budget, and the same call goes on."""

import re

import pytest

from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.run.progress import Quiet
from ablab.experiments.run.sequential import Looked, Looking, hours_of, with_looks
from tests.experiments.run.grids import Drawn

ARMS = ["qk_norm", "value_residual", "ema"]


@pytest.fixture
def experiment(lab):
    return load(
        str(lab.root / lab.sheet("looks", arms=ARMS, seeds=[4, 2])), {}, lambda data: "0" * 16
    )


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def look(experiment, drawn: Drawn, hours: float = 100.0) -> Looked:
    sequential = with_looks(experiment, hours)
    return Looking(sequential, drawn.store, Quiet(), 1, drawn).until_decided()


# Beyond doubt at once; after five seeds; never.
CLEAR = {"- qk_norm": 0.5}


def test_seeds_are_added_to_undecided_arms_and_what_they_are_measured_against(
    experiment, store
):
    drawn = Drawn(store, CLEAR | {"base": 0.5})
    looked = look(experiment, drawn)
    assert looked.undecided == ["- value_residual", "- ema"]
    assert looked.seeds == 8
    assert not looked.stopped
    first, second, third = drawn.asked
    cells = {"full", "base", "- qk_norm", "- value_residual", "- ema"}
    assert first == {(cell, seed) for cell in cells for seed in (4, 2, 5)}
    open_cells = {"full", "- value_residual", "- ema"}
    assert second == {(cell, seed) for cell in open_cells for seed in (6, 7)}
    assert third == {(cell, seed) for cell in open_cells for seed in (8, 9, 10)}


def test_where_all_is_decided_there_is_no_further_look(experiment, store):
    decided = {cell.name: 0.5 for cell in experiment.cells if cell.reference}
    looked = look(experiment, Drawn(store, decided))
    assert looked.seeds == 3
    assert looked.undecided == []


def test_the_same_call_again_trains_nothing_and_adds_nothing_to_the_ledger(experiment, store):
    look(experiment, Drawn(store, CLEAR))
    before = Ledger(store.root).entries()
    again = Drawn(store, CLEAR)
    looked = look(experiment, again)
    assert again.asked == [set(), set(), set()]
    assert Ledger(store.root).entries() == before
    assert looked.seeds == 8


def test_the_looks_are_registered_once_and_each_leaves_its_verdicts_with_their_runs(
    experiment, store
):
    drawn = Drawn(store, CLEAR)
    look(experiment, drawn)
    promise, *verdicts = Ledger(store.root).entries("looks")
    assert promise.content["looks"] == [3, 5, 8]
    assert promise.content["seeds"] == [4, 2, 5, 6, 7, 8, 9, 10]
    assert [entry.content["look"] for entry in verdicts] == [3, 5, 8]
    last = verdicts[-1].content["arms"]
    assert last["- qk_norm"]["verdict"] == "helps"
    assert len(last["- qk_norm"]["runs"]) == 2 * 3
    assert len(last["- ema"]["runs"]) == 2 * 8


def test_a_look_sees_no_seed_beyond_its_own(experiment, store):
    """Else a second call would judge its first look by all eight, and ask for other runs than the first did."""
    drawn = Drawn(store, CLEAR)
    for run in experiment.runs([6, 7, 8, 9, 10]):
        drawn.finish(run)
    look(experiment, drawn)
    verdicts = Ledger(store.root).entries("looks", "verdicts")
    assert len(verdicts[0].content["arms"]["- ema"]["seeds"]) == 3


def test_a_budget_that_does_not_carry_the_next_look_stops_before_it_and_says_what_it_needs(
    experiment, store
):
    drawn = Drawn(store, CLEAR, seconds=3600.0)
    looked = look(experiment, drawn, hours=20.0)
    assert looked.seeds == 3
    # An hour a run, and what evaluating them takes.
    assert re.search(
        r"a look at 5 seeds needs 8 runs, about (8|9)\.\d h of training", looked.stopped
    )
    assert "5.0 h of the budget are left; raise --budget" in looked.stopped
    more = look(experiment, Drawn(store, CLEAR, seconds=3600.0), hours=27.0)
    assert more.seeds == 5


def test_an_arm_that_lost_a_seed_is_undecided_and_one_that_lost_all_is_not_asked_again(
    experiment, store
):
    def ended(run) -> str:
        lost = run.cell == "- qk_norm" and run.recipe.seed == 4
        return "diverged" if lost or run.cell == "- ema" else "finished"

    drawn = Drawn(store, {"base": 0.5, "- value_residual": 0.5}, status=ended)
    look(experiment, drawn)
    assert {cell for cell, _ in drawn.asked[1]} == {"full", "- qk_norm"}


def test_a_grid_in_which_nothing_finishes_has_nothing_to_look_at(experiment, store):
    with pytest.raises(
        UserError, match="no run of looks has finished, so there is nothing to look"
    ):
        look(experiment, Drawn(store, status=lambda run: "diverged"))


@pytest.mark.parametrize(
    ("text", "hours"), [("90m", 1.5), ("4h", 4), ("2d", 48), (" 1.5 h ", 1.5), ("36s", 0.01)]
)
def test_a_budget_is_a_time(text, hours):
    assert hours_of(text) == pytest.approx(hours)


@pytest.mark.parametrize("text", ["4", "h", "0h", "-1h", "1e3h", "4 weeks", ""])
def test_another_budget_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="must be a time above 0, such as 90m, 4h or 2d"):
        hours_of(text)


WORDS = {
    "no budget": (["--until-decided"], "say what it may spend: --budget 4h"),
    "a budget alone": (["--budget", "4h"], "is what --until-decided may spend; give both"),
    "seeds": (["--until-decided", "--budget", "4h", "--seeds", "0"], "drop --seeds"),
    "cells": (["--until-decided", "--budget", "4h", "--only", "full"], "drop --only"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_that_do_not_go_together_are_refused_before_anything_runs(lab, ablab, case):
    words, said = WORDS[case]
    ended = ablab("run", lab.sheet("looks"), *words)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_design_without_arms_has_nothing_to_decide(lab, ablab):
    sheet = lab.sheet("alone", design="single")
    ended = ablab("run", sheet, "--until-decided", "--budget", "4h")
    assert ended.code == 2
    assert "alone has no arm to decide: design 'single' compares nothing" in ended.err
