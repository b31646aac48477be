"""Cautious decay: the sign of the final update decides, coordinate by coordinate; the control decays them all."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.ablations.interventions.cautious_wd import CautiousDecay
from ablab.core.errors import UserError
from ablab.core.language.declare import Param
from ablab.core.parts.transforms import Decay

NOW = SimpleNamespace(progress=torch.tensor(0.5), multiplier=torch.tensor(0.25))
BANK = SimpleNamespace(decay=1.0)
STEADY = {"schedule": "constant", "optim__clip": None}


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(rule, update, weight, bank=BANK):
    return rule.update(update, weight, {}, bank, NOW)[0]


@pytest.mark.parametrize(("ties", "zero"), [(True, 0.5), (False, 0.0)])
def test_four_signs_and_the_zeros(ties, zero):
    """Decay where update and weight agree in sign; a zero on either side counts as agreement only with ties."""
    update = torch.tensor([3.0, -3.0, 3.0, -3.0, 0.0, 0.0, 3.0, -0.0])
    weight = torch.tensor([2.0, -2.0, -2.0, 2.0, 2.0, -2.0, 0.0, 2.0])
    expected = torch.tensor([0.5, 0.5, 0.0, 0.0, zero, zero, 0.0, zero]) * weight
    assert torch.equal(
        through(CautiousDecay(0.5, ties=ties), update, weight) - update, expected
    )


def test_an_update_along_the_weights_is_ordinary_decay_bit_for_bit():
    weight = randn(40, 30)
    assert torch.equal(
        through(CautiousDecay(0.3), weight, weight), through(Decay(0.3), weight, weight)
    )
    assert torch.equal(
        through(CautiousDecay(0.3), 1e-3 * weight, weight),
        through(Decay(0.3), 1e-3 * weight, weight),
    )


def test_an_update_against_the_weights_is_no_decay_bit_for_bit():
    weight = randn(40, 30)
    assert torch.equal(
        through(CautiousDecay(0.3), -weight, weight),
        through(CautiousDecay(0.0), -weight, weight),
    )
    assert torch.equal(through(CautiousDecay(0.3), -weight, weight), -weight)


def test_rate_zero_is_no_decay_bit_for_bit():
    update = randn(40, 30)
    weight = randn(40, 30, seed=1)
    assert torch.equal(through(CautiousDecay(0.0), update, weight), update)


@settings(max_examples=40)
@given(
    st.integers(0, 1000),
    st.floats(0.001, 1000),
    st.sampled_from([True, False]),
    st.floats(0, 2),
)
def test_the_decay_does_not_depend_on_the_size_of_the_update(seed, size, ties, rate):
    update = randn(20, seed=seed).double()
    weight = randn(20, seed=seed + 1).double()
    rule = CautiousDecay(rate, ties=ties)
    small, large = (
        through(rule, factor * update, weight) - factor * update for factor in (1.0, size)
    )
    expected = rate * weight * ((update > 0) == (weight > 0))
    assert apart(small, expected) < 1e-12
    assert apart(large, expected) < 1e-9


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", 1.0),
        ("linear", 0.5),
        ("lr", 0.25),
    ],
)
def test_rate_schedule_and_width_factor_are_those_of_the_decay_it_replaces(schedule, factor):
    weight = randn(10)
    added = (
        through(CautiousDecay(0.4, schedule), weight, weight, SimpleNamespace(decay=3.0))
        - weight
    )
    torch.testing.assert_close(added, 0.4 * 3.0 * factor * weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        through(CautiousDecay(0.4, schedule), weight, weight),
        through(Decay(0.4, schedule), weight, weight),
    )


def test_the_final_direction_decides_not_the_gradient(tiny, drive):
    """Step 2: the gradient turns, the momentum of step 1 still carries the update; the mask follows the update."""
    recipe = tiny(
        ["cautious_wd"],
        optim__lr=1.0,
        optim__chains__hidden__steps=[
            {"kind": "sgd", "momentum": 0.9},
            {"kind": "decay", "rate": 0.5},
        ],
        **STEADY,
    )
    start = {"w": (Param((1, 2), "hidden"), torch.tensor([[8.0, -8.0]]))}
    seen, _ = drive(
        recipe, start, [{"w": torch.tensor([[1.0, 1.0]])}, {"w": torch.tensor([[-0.5, -0.5]])}]
    )
    # First agrees, second does not.
    assert torch.equal(seen[1]["w"], torch.tensor([[8 - 1 - 0.5 * 8, -8 - 1.0]]))
    # update 0.9 - 0.5 = 0.4.
    torch.testing.assert_close(seen[2]["w"], torch.tensor([[3 - 0.4 - 0.5 * 3, -9 - 0.4]]))


@pytest.mark.parametrize(
    "treatment",
    [
        [],
        [{"muon": {"ns": "exact"}}],
        ["muon", "normuon"],
    ],
)
def test_a_step_with_and_without_differs_by_the_masked_decay_alone(tiny, drive, treatment):
    start = {"w": (Param((12, 8), "hidden"), randn(12, 8))}
    gradient = [{"w": randn(12, 8, seed=1)}]
    none, cautious, plain = (
        drive(
            tiny(
                [*treatment, *more],
                optim__chains__hidden__steps=["adam", {"kind": "decay", "rate": rate}],
                optim__lr=0.01,
                **STEADY,
            ),
            start,
            gradient,
        )[0]
        for more, rate in (
            ([], 0.0),
            (["cautious_wd"], 0.2),
            ([], 0.2),
        )
    )
    weight = start["w"][1]
    rate = 0.01 * (3.36 if treatment else 1.0) * 0.2
    agrees = ((weight - none[1]["w"]) > 0) == (weight > 0)
    assert 0.2 < agrees.float().mean() < 0.8
    torch.testing.assert_close(
        none[1]["w"] - cautious[1]["w"], rate * weight * agrees, rtol=0, atol=5e-7
    )
    torch.testing.assert_close(none[1]["w"] - plain[1]["w"], rate * weight, rtol=0, atol=5e-7)


@pytest.mark.parametrize("treatment", [[], ["muon"], ["muon", "normuon"]])
def test_the_control_is_ordinary_decay_with_the_same_rate_and_schedule(tiny, treatment):
    """Off is not `no decay`: each chain is the same but for the class of its decay step."""
    paths = {
        "optim__chains__hidden__steps": [
            "adam",
            {"kind": "decay", "rate": 0.3, "schedule": "linear"},
        ]
    }
    off = tiny(treatment, **paths)
    on = tiny([*treatment, {"cautious_wd": {"ties": False}}], **paths)
    for role, chain in off.optim.chains.items():
        twin = on.optim.chains[role]
        assert twin.lr == chain.lr
        assert len(twin.steps) == len(chain.steps)
        for one, other in zip(chain.steps, twin.steps, strict=True):
            assert other == (
                CautiousDecay(0.3, "linear", False) if isinstance(one, Decay) else one
            )
    assert sum(isinstance(step, Decay) for step in off.optim.chains["hidden"].steps) == 1


def test_roles_that_do_not_decay_stay_without(tiny):
    recipe = tiny(["cautious_wd", "gating", "qk_norm"])
    assert {
        role
        for role, chain in recipe.optim.chains.items()
        if any(isinstance(step, Decay) for step in chain.steps)
    } == {"hidden"}


def test_a_decay_given_to_another_role_is_masked_too(tiny):
    recipe = tiny(
        ["cautious_wd"],
        optim__chains__embedding__steps=["adam", {"kind": "decay", "rate": 0.01}],
    )
    assert recipe.optim.chains["embedding"].steps[-1] == CautiousDecay(0.01)


def test_without_any_decay_it_is_refused(tiny):
    with pytest.raises(UserError, match="cautious_wd needs a weight decay to act on"):
        tiny(["cautious_wd"], optim__chains__hidden__steps=["adam"])
