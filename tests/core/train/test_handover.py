"""A run that goes on from another: the bits of never stopping where it takes all, and one line where it cannot."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.model.heritage import Wish, following
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import Recipe, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, Result
from ablab.core.store.state import left_state, state_of
from ablab.core.train import checkpoint
from ablab.core.train.run import run
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu", log_every=3, evaluations=2, save_seconds=0)
KEEPS = replace(CPU, keep_state=True)
ALL = Wish(("optimizer", "steps", "average"))
WEIGHTS = Wish(())
NORMUON = ("muon", "normuon", "cautious_wd")
EMA = {"ema": {"horizon": 5}}


@dataclass(frozen=True)
class House:
    """Run folders beside one another, and the tokens that their runs read."""

    root: Path
    tokens: Path

    def folder(self, recipe: Recipe) -> Path:
        return self.root / run_id(recipe)

    def train(self, recipe: Recipe, runtime: Runtime = CPU, **more) -> Result:
        record = Record(self.folder(recipe), run_id(recipe))
        return run(recipe, runtime, self.tokens, record, warn=lambda line: None, **more)

    def trainer(self, recipe: Recipe) -> Trainer:
        return Trainer(recipe, CPU, self.tokens)


@pytest.fixture
def house(tmp_path, token_folder):
    return House(tmp_path, token_folder)


@pytest.fixture
def cut(tiny):
    """Twelve steps of a treatment under WSD, and the same cut after the eighth: whole, trunk, cooldown."""

    def of(treatment=(), wish=Wish()):
        falls = {"wsd": {"decay_fraction": 1 / 3, "warmup_steps": 3}}
        whole = tiny([*treatment, falls])
        trunk = assign(
            tiny(treatment, budget__tokens=8 * 64),
            "schedule",
            {"kind": "constant", "warmup_steps": 3},
        )
        falling = {"wsd": {"decay_fraction": 1.0, "warmup_steps": 0}}
        short = {"budget__tokens": 4 * 64, "schedule__warmup_steps": 0}
        return whole, trunk, following(trunk, tiny([*treatment, falling], **short), wish)

    return of


# -- going on ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "treatment", [(), ("soap",), (*NORMUON, EMA)], ids=["adamw", "soap", "all"]
)
def test_trunk_and_cooldown_are_the_bits_of_one_run(cut, house, treatment):
    whole, trunk, cooldown = cut(treatment, ALL if EMA in treatment else Wish())
    never_stopped = house.train(whole)
    assert house.train(trunk, KEEPS).status == FINISHED
    went_on = house.train(cooldown)
    assert went_on.weights == never_stopped.weights
    assert went_on.evaluated == never_stopped.evaluated
    assert went_on.metrics["val/loss"] == never_stopped.metrics["val/loss"]


class Killed(BaseException):
    """Nothing of the run happens after it."""


def killed_at_step_3(step, scalars, seconds):
    if step >= 3:
        raise Killed


def test_killed_in_each_stage_it_ends_with_the_same_bits(cut, house):
    _, trunk, cooldown = cut(NORMUON)
    house.train(trunk, KEEPS)
    bits = house.train(cooldown).weights
    for recipe, runtime in ((trunk, KEEPS), (cooldown, CPU)):
        shutil.rmtree(house.folder(recipe))
        with pytest.raises(Killed):
            house.train(recipe, runtime, log=killed_at_step_3)
        assert checkpoint.listed(house.folder(recipe) / "checkpoints")
        ended = house.train(recipe, runtime)
    assert ended.weights == bits


def test_weights_alone_begin_a_fresh_optimizer_at_step_1(cut, house):
    _, trunk, cooldown = cut(NORMUON, WEIGHTS)
    house.train(trunk, KEEPS)
    went_on = house.train(cooldown)
    before, by_hand = house.trainer(trunk), house.trainer(cooldown)
    train_to_the_end(before)
    by_hand.begin_with(dict(before.model.named_parameters()))
    train_to_the_end(by_hand)
    assert by_hand.digest() == went_on.weights


def train_to_the_end(trainer):
    while trainer.step < trainer.recipe.steps:
        trainer.advance()


def test_the_average_may_be_what_goes_on(cut, house):
    _, trunk, cooldown = cut([EMA], Wish((), read="evaluated"))
    house.train(trunk, KEEPS)
    went_on = house.train(cooldown)
    before, by_hand = house.trainer(trunk), house.trainer(cooldown)
    train_to_the_end(before)
    with before.as_evaluated():
        average = {
            name: value.detach().clone() for name, value in before.model.named_parameters()
        }
    by_hand.begin_with(average)
    train_to_the_end(by_hand)
    assert by_hand.digest() == went_on.weights


@pytest.mark.parametrize("change", ["takes", "read", "steps", "averaged", "windows"])
def test_each_thing_that_is_taken_over_shows(cut, house, change):
    _, trunk, cooldown = cut([*NORMUON, EMA], ALL)
    house.train(trunk, KEEPS)
    # A rise of momentum, which the steps before would have left behind.
    rising = {"kind": "momentum", "warmup_from": 0.5, "warmup_steps": 20}
    steps = [rising, *cooldown.optim.chains["hidden"].steps[1:]]
    cooldown = assign(cooldown, "optim.chains.hidden.steps", steps)
    others = {
        "takes": ("average",),
        "read": "evaluated",
        "steps": 1,
        "averaged": 1,
        "windows": 1,
    }
    other = replace(cooldown, init=replace(cooldown.init, **{change: others[change]}))
    one, another = house.train(cooldown), house.train(other)
    assert (one.weights, one.evaluated) != (another.weights, another.evaluated)


# -- what cannot be ----------------------------------------------------------------------------------------------------
def test_a_parent_that_diverged_is_a_child_that_diverged(cut, house):
    _, trunk, cooldown = cut()
    ended = Result(run_id(trunk), DIVERGED, step=3, tokens=192, error="at step 3")
    leave(house, trunk, ended)
    result = house.train(cooldown)
    assert (result.status, result.step) == (DIVERGED, 0)
    assert result.error == f"run {run_id(trunk)}, from which it goes on, diverged: at step 3"


def leave(house, recipe, result):
    house.folder(recipe).mkdir()
    Record(house.folder(recipe)).finish(result)


def test_a_parent_that_has_no_good_end_is_refused(cut, house):
    _, trunk, cooldown = cut()
    with pytest.raises(
        UserError, match="from which this one goes on, has not finished; train it"
    ):
        house.train(cooldown)
    leave(house, trunk, Result(run_id(trunk), FAILED, step=0, tokens=0))
    with pytest.raises(UserError, match="ended as failed; train it again first"):
        house.train(cooldown)


@pytest.mark.parametrize("flaw", ["removed", "damaged", "foreign"])
def test_a_parent_without_a_state_of_its_own_is_refused(cut, house, flaw):
    _, trunk, cooldown = cut()
    house.train(trunk, KEEPS)
    assert left_state(house.folder(trunk))
    place = state_of(house.folder(trunk))
    (file,) = checkpoint.listed(place)
    if flaw == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    if flaw == "foreign":
        checkpoint.write(
            place, 8, {"model/norm.gain": torch.ones(32)}, checkpoint.Origin("another")
        )
    with pytest.raises(
        UserError, match="left no state to go on from; delete .* to train it again"
    ):
        house.train(cooldown)


def test_a_state_of_another_shape_is_refused(cut, house):
    _, trunk, cooldown = cut(NORMUON)
    house.train(trunk, KEEPS)
    by_shape = assign(cooldown, "optim.chains.hidden.steps.normuon.axis", "shape_rule")
    with pytest.raises(
        UserError, match=r"cannot be taken over: \w+ has \[.*; keep its optimizer"
    ):
        house.train(by_shape)


def test_no_run_leaves_a_state_unasked(cut, house):
    _, trunk, _ = cut()
    house.train(trunk)
    assert not left_state(house.folder(trunk))
