"""Epsilon inside: the direction of a hand-written Adam in fp64, and where the two differ."""

import pytest
import torch

from ablab.ablations.interventions.adam_eps_inside import AdamInside
from ablab.core.errors import UserError
from ablab.core.language.declare import Param
from ablab.core.parts.transforms import Adam

SHAPE = (6, 5)


def by_hand(grads, beta1, beta2, eps, inside):
    """The directions, in fp64."""
    m = v = torch.zeros(SHAPE, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * grad.double()
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
        corrected = 1 - beta2**t
        root = (v.sqrt() + eps) / corrected**0.5 if inside else (v / corrected).sqrt() + eps
        yield m / (1 - beta1**t) / root


@pytest.mark.parametrize("inside", [True, False])
def test_the_direction_is_that_of_the_formula(tiny, drive, inside):
    """A large epsilon, so that its place shows: by a third at the first step."""
    part = {"kind": "adam", "beta1": 0.95, "beta2": 0.99, "eps": 0.1}
    arms = ["adam_eps_inside"] if inside else []
    chains = {"optim__chains__vector__steps": [part], "optim__clip": None, "optim__lr": 0.5}
    recipe = tiny(arms, schedule__warmup_steps=0, schedule__floor=1.0, **chains)
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(SHAPE, generator=draw) for _ in range(6)]
    start = {"w": (Param(SHAPE, "vector"), torch.zeros(SHAPE))}
    seen, _ = drive(recipe, start, [{"w": grad} for grad in grads])
    expected = list(by_hand(grads, 0.95, 0.99, 0.1, inside))
    for before, after, direction in zip(seen, seen[1:], expected, strict=False):
        moved = (before["w"] - after["w"]).double() / 0.5
        torch.testing.assert_close(moved, direction, rtol=1e-5, atol=1e-6)
    other = next(by_hand(grads, 0.95, 0.99, 0.1, not inside))
    assert (expected[0] - other).abs().max() > 0.1


def test_every_adam_is_replaced_dose_and_all(tiny):
    chains = {"optim__chains__gate__steps": [{"kind": "adam", "eps": 1e-6}]}
    found = tiny(["adam_eps_inside"], **chains).optim.chains
    assert found["gate"].steps == (AdamInside(eps=1e-6),)
    assert not any(type(step) is Adam for chain in found.values() for step in chain.steps)


def test_without_an_adam_it_is_refused(tiny):
    roles = ("embedding", "hidden", "readout", "vector", "gate")
    none = {f"optim__chains__{role}__steps": ["sgd"] for role in roles}
    with pytest.raises(UserError, match="adam_eps_inside needs an adam step to act on"):
        tiny(["adam_eps_inside"], **none)
