"""A challenge: fresh seeds, as many as before, and whether the verdict stands."""

import pytest

from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger
from ablab.core.store.planned import command
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.run.challenge import Challenge
from tests.experiments.run.grids import Drawn

ARM = "- qk_norm"


@pytest.fixture
def experiment(lab):
    sheet = lab.sheet("doubted", arms=["qk_norm", "ema"], seeds=[0, 1, 7])
    return load(str(lab.root / sheet), {}, lambda data: "0" * 16)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def challenged(experiment, store, drawn: Drawn, arm: str = ARM):
    asked = Challenge(experiment, store, arm)
    drawn(asked.experiment, asked.experiment.runs(asked.seeds))
    return asked.judge(print)


def test_the_arm_and_its_reference_run_on_as_many_of_the_next_unused_seeds(experiment, store):
    drawn = Drawn(store, {ARM: 0.5})
    drawn(experiment, experiment.runs())
    found = challenged(experiment, store, drawn)
    assert drawn.asked[1] == {(cell, seed) for cell in ("full", ARM) for seed in (8, 9, 10)}
    assert found.stands
    assert found.sentence.startswith("`- qk_norm`: helps +0.")
    assert "stands: helps" in found.sentence
    assert found.sentence.endswith("on fresh seeds 8, 9, 10")


def test_a_verdict_that_fresh_seeds_do_not_show_does_not_stand(experiment, store):
    drawn = Drawn(store, {ARM: 0.5})
    drawn(experiment, experiment.runs())
    found = challenged(experiment, store, Drawn(store))
    assert not found.stands
    assert " does not stand: " in found.sentence


def test_the_same_challenge_again_asks_for_the_same_runs_and_is_written_down_once(
    experiment, store
):
    drawn = Drawn(store, {ARM: 0.5})
    drawn(experiment, experiment.runs())
    first = challenged(experiment, store, drawn)
    again = Drawn(store)
    assert challenged(experiment, store, again) == first
    assert again.asked == [set()]
    (entry,) = Ledger(store.root).entries("doubted", "challenge")
    assert entry.content["stands"]
    assert len(entry.content["before"]["runs"]) == len(entry.content["after"]["runs"]) == 6


def test_seeds_that_the_experiment_has_used_since_are_not_fresh(experiment, store):
    drawn = Drawn(store, {ARM: 0.5})
    drawn(experiment, experiment.runs())
    challenged(experiment, store, drawn)
    drawn(experiment, experiment.runs([0, 1, 7, 8]))
    found = challenged(experiment, store, drawn)
    assert found.after.seeds == (9, 10, 11, 12)


def test_the_experiment_itself_keeps_its_runs(experiment, store):
    drawn = Drawn(store, {ARM: 0.5})
    drawn(experiment, experiment.runs())
    before = store.plan_path("doubted").read_bytes()
    challenged(experiment, store, drawn)
    assert store.plan_path("doubted").read_bytes() == before
    assert "doubted@challenge=- qk_norm" in store.experiments()


def test_what_to_type_to_go_on_with_a_challenge_is_the_challenge():
    assert command("doubted@optim.lr=0.1@challenge=- qk_norm") == (
        "ablab challenge doubted '- qk_norm' optim.lr=0.1"
    )


REFUSED = {
    "full": "it is what others are measured against; arms with one: base, - qk_norm",
    "- ema": "no run of it has finished",
    "- qk_nrm": "has no arm '- qk_nrm'. Did you mean '- qk_norm'",
}


@pytest.mark.parametrize("arm", REFUSED)
def test_an_arm_without_a_verdict_cannot_be_challenged(experiment, store, arm):
    dead = Drawn(store, status=lambda run: "diverged" if run.cell == "- ema" else "finished")
    dead(experiment, experiment.runs())
    with pytest.raises(UserError, match=REFUSED[arm]):
        Challenge(experiment, store, arm)


def test_an_experiment_that_has_not_run_has_nothing_to_challenge(lab, ablab):
    ended = ablab("challenge", lab.sheet("doubted"), ARM)
    assert ended.code == 2
    assert "has no runs in" in ended.err


def test_two_seeds_are_no_verdict_to_challenge(experiment, store):
    Drawn(store)(experiment, experiment.runs([0, 1]))
    with pytest.raises(UserError, match=r"no verdict to challenge: it has too few seeds \(2\)"):
        Challenge(experiment, store, ARM)


def test_an_arm_is_typed_as_it_is_named_whatever_letters_follow_its_dash(lab, ablab):
    """- qk_norm holds the letter of -q, --quiet."""
    sheet = lab.sheet("doubted", arms=["qk_norm"])
    for verb, *options in (["challenge", "-q"], ["why"]):
        ended = ablab(verb, sheet, "- qk_nrm", *options)
        assert ended.code == 2
        assert "No such option" not in ended.err
    assert "- qk_norm, seed 0: run " in ablab("why", sheet, "- qk_norm").out
