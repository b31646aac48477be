"""Interventions together: every pair in either order, and all that are compatible at once."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.recipe.intervention import REGISTRY, at, dependents
from ablab.core.recipe.recipe import run_id
from ablab.core.recipe.slots import CHOICES, slot_at
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

PAIRS = list(itertools.combinations(sorted(REGISTRY), 2))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_has_both_effects_in_either_order_or_a_declared_reason_not_to(
    tiny, needs, shows, pair
):
    """Requirements are added.  Without either one, its slots and the bits that are computed both differ."""
    names = list(dict.fromkeys([*needs(pair[0]), *needs(pair[1]), *pair]))
    if reason := clash(names):
        for order in (names, names[::-1]):
            with pytest.raises(UserError, match=reason) as refusal:
                tiny(order)
            assert "\n" not in str(refusal.value)
        return
    both = tiny(names)
    assert tiny(names[::-1]) == both and run_id(tiny(names[::-1])) == run_id(both)
    for name in pair:
        gone = dependents(name, {one: REGISTRY[one]() for one in names})
        without = tiny([one for one in names if one not in gone])
        for slot in REGISTRY[name].about.slots:
            assert at(both, slot) != at(without, slot), (
                f"{name} leaves no trace in {slot} beside {pair}"
            )
        assert shows(both) != shows(without), f"{name} is inert beside {pair}"


def clash(names) -> str:
    """A pattern of the refusal that their declarations foretell; '' when they go together."""
    abouts = [REGISTRY[name].about for name in names]
    if any(other in about.excludes for about in abouts for other in names):
        return "exclude each other"
    for one, other in itertools.combinations(abouts, 2):
        related = one.name in other.requires or other.name in one.requires
        later = max(one, other, key=lambda about: (about.order, about.name))
        shared = [slot for slot in CHOICES if slot in one.slots and slot in other.slots]
        if not related and not all(holds(later.name, slot) for slot in shared):
            return "both choose"
    return ""


def holds(name: str, slot: str) -> bool:
    """Whether the intervention has a field for a part of that slot: the one that it finds there."""
    asked = slot_at(slot).asks
    hints = fields_of(REGISTRY[name]).values()
    return any(asked in (hint, *get_args(hint)) for hint in hints)


@pytest.mark.parametrize(
    "name", sorted(name for name, cls in REGISTRY.items() if cls.about.requires)
)
def test_alone_it_asks_for_what_it_builds_on(tiny, name):
    with pytest.raises(
        UserError, match=f"{name} builds on {REGISTRY[name].about.requires[0]}; add"
    ) as refusal:
        tiny([name])
    assert "\n" not in str(refusal.value)


@pytest.fixture
def full(tiny):
    """The recipe with everything that goes together, first come first served, and the names in it."""
    names = []
    for name in sorted(REGISTRY, key=lambda name: (len(REGISTRY[name].about.requires), name)):
        if set(REGISTRY[name].about.requires) <= set(names) and not clash([*names, name]):
            names.append(name)
    return tiny(names), names


def test_the_full_stack_trains(full, token_folder):
    recipe, names = full
    assert len(names) > 10
    trainer = Trainer(recipe, Runtime(device="cpu"), token_folder)
    for _ in range(3):
        assert trainer.advance().isfinite()
    assert all(value.isfinite().all() for value in trainer.tensors().values())
    assert 0 < trainer.evaluate()["val/loss"] < 10


@pytest.mark.slow
def test_the_full_stack_compiled_by_inductor_equals_eager(full, build, batch):
    """Model and objective, forward and backward, as on a GPU but on this CPU: 30 s, of which g++ takes most.

    The optimizer step would add 45 s; the eager backend traces it for every intervention instead.
    """
    recipe, found = replace(full[0], model=replace(full[0].model, layers=2)), []
    block = batch(recipe)
    for compiled in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, dynamic=False)):
        torch._dynamo.reset()
        model = build(recipe, stirred=0.02)
        loss, _ = compiled(of_rows(model, heads_of(model)[0]))(block)
        loss.backward()
        found.append(
            {"loss": loss.detach()}
            | {name: value.grad for name, value in model.named_parameters()}
        )
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=name
        )
