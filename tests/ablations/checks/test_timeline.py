"""Liveness: what acts at some steps alone shows, wherever it acts; what computes the same leaves no trace."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from ablab.ablations.checks.liveness import steps_of, trace
from ablab.core.language.part import Part
from ablab.core.parts.gradient import GradientFactor
from ablab.core.parts.schedule import Constant, Cosine
from ablab.core.parts.shape import Phase
from ablab.core.parts.transforms import Adam, Transform
from ablab.core.recipe.edit import append, edit, put
from ablab.core.recipe.recipe import Attention, Budget, Data, Model, Recipe

STEPS = 40
BASE = Recipe(
    Data("tiny", "00000000deadbeef", vocab=64, context=16, batch=4, held_out=160),
    Model(width=16, layers=1, attention=Attention(head_dim=8)),
    schedule=Constant(warmup_steps=3),
    budget=Budget(STEPS * 64),
)
FIRST, LAST = 9, 18  # the window: none of the steps that the model takes


@dataclass(frozen=True)
class Window(Part):
    """Acts by `strength` within the window; 1: not at all."""

    kind: str = "window"
    strength: float = 0.5

    def at(self, t: int) -> float:
        return self.strength if FIRST <= t <= LAST else 1.0


@dataclass(frozen=True)
class Halved(Window):
    def multiplier(self, t: int, steps: int) -> float:
        return BASE.schedule.multiplier(t, steps) * self.at(t)


@dataclass(frozen=True)
class Damped(Window, GradientFactor):
    def factor(self, norm: Any, state: Any, now: Any) -> Any:
        inside = (now.step >= FIRST) * (now.step <= LAST)
        return 1 - (1 - self.strength) * inside, {}


@dataclass(frozen=True)
class Shortened(Window, Transform):
    def update(self, update: Any, weight: Any, state: Any, bank: Any, now: Any) -> Any:
        inside = (now.step >= FIRST) * (now.step <= LAST)
        return update * (1 - (1 - self.strength) * inside), {}


@dataclass(frozen=True)
class Refreshed(Window, Transform):
    """Its factor is set by the refresh after step 17, and that after step 33 sets it back."""

    refresh_every = 16

    def state(self, weight: Any, bank: Any) -> Any:
        return {"factor": weight.new_ones(())}

    def update(self, update: Any, weight: Any, state: Any, bank: Any, now: Any) -> Any:
        return update * state["factor"], {}

    def refresh(self, state: Any, bank: Any, t: int) -> None:
        state["factor"].fill_(self.at(t))


@dataclass(frozen=True)
class PulledBack(Window):
    def begin(self, weights: Any) -> Any:
        return {}

    def advance(self, state: Any, weights: Any, t: int, steps: int) -> None:
        for weight in weights:
            weight.mul_(self.at(t))

    def readout(self, state: Any, weights: Any) -> Any:
        return weights


@dataclass(frozen=True)
class Narrowed(Window):
    def phases(self, batch: int, context: int) -> tuple[Phase, ...]:
        inside = round(batch * self.strength)
        return (
            Phase(0.25, batch, context),
            Phase(0.4, inside, context),
            Phase(1.0, batch, context),
        )


def hidden_step(part: Transform) -> Recipe:
    return edit(BASE, "optim.chains.hidden.steps", append(part))


IN_A_WINDOW = {
    "schedule": lambda strength: edit(BASE, "schedule", put(Halved(strength=strength))),
    "on_gradient": lambda strength: edit(
        BASE, "optim.on_gradient", append(Damped(strength=strength))
    ),
    "chain": lambda strength: hidden_step(Shortened(strength=strength)),
    "refresh": lambda strength: hidden_step(Refreshed(strength=strength)),
    "after_step": lambda strength: edit(
        BASE, "after_step", append(PulledBack(strength=strength))
    ),
    "batch shape": lambda strength: edit(BASE, "data.shape", put(Narrowed(strength=strength))),
}


@pytest.fixture(scope="module")
def base() -> str:
    return trace(BASE)


def test_the_window_holds_no_step_that_the_model_takes():
    assert not {t for t in steps_of(STEPS) if FIRST <= t <= LAST}


@pytest.mark.parametrize("slot", IN_A_WINDOW)
def test_what_acts_in_a_window_alone_is_alive(base, slot):
    assert trace(IN_A_WINDOW[slot](0.5)) != base


@pytest.mark.parametrize("slot", IN_A_WINDOW)
def test_what_acts_nowhere_is_inert_whatever_its_name(base, slot):
    assert trace(IN_A_WINDOW[slot](1.0)) == base


def test_what_acts_on_rare_large_gradients_shows(base):
    """The norm of the four steps lies below either limit."""
    assert trace(edit(BASE, "optim.clip", put(50.0))) != trace(
        edit(BASE, "optim.clip", put(80.0))
    )


def test_another_length_of_run_or_other_tokens_are_no_inert_toggle(base):
    longer = replace(BASE, budget=Budget((STEPS + 1) * 64))
    others = edit(BASE, "data.digest", put("0000000000000bad"))
    assert len({base, trace(longer), trace(others)}) == 3


def test_a_chain_of_parameters_that_nothing_reads_is_inert(base):
    """Tied or not, this model has no gates."""
    gates = edit(BASE, "optim.chains.gate.steps", put((Adam(beta1=0.5),)))
    assert trace(gates) == base


def test_a_schedule_that_ends_elsewhere_shows_though_its_name_is_the_same():
    floors = {trace(edit(BASE, "schedule", put(Cosine(3, floor)))) for floor in (0.1, 0.2)}
    assert len(floors) == 2
