"""Truncated init: no tails, the same draws within them, and the moments of a truncated normal."""

import math

import pytest
import torch

from ablab.core.recipe.intervention import REGISTRY


@pytest.fixture(scope="module")
def drawn(tiny, build):
    """(weights cut at 2 sigmas, the control's), of the largest matrix."""
    wide = {"model__width": 128}
    models = [build(tiny(arms, **wide)) for arms in ([{"truncated_init": {"sigmas": 2.0}}], [])]
    return [dict(one.named_parameters())["blocks.0.ffn.inner.gate_up.weight"] for one in models]


def test_nothing_lies_beyond_and_what_lay_within_is_as_drawn(drawn):
    cut, whole = drawn
    end = 2 * 128**-0.5
    within = whole.abs() <= end
    assert cut.abs().max() <= end < whole.abs().max()
    assert torch.equal(cut[within], whole[within])
    assert not torch.equal(cut[~within], whole[~within])


def test_the_variance_is_that_of_a_truncated_normal(drawn):
    """1 - 2 a phi(a) / (2 Phi(a) - 1) of the whole one's; the sample has 87,000 weights."""
    cut, _ = drawn
    density = math.exp(-2.0) / math.sqrt(2 * math.pi)
    expected = 1 - 2 * 2.0 * density / math.erf(2.0 / math.sqrt(2))
    assert cut.double().var().item() * 128 == pytest.approx(expected, rel=0.02)


def test_it_holds_the_parametrization_that_it_finds(tiny):
    """Whatever else that says stays; a start at zero has no tails."""
    arms = ["mup", "zero_init_projections", "truncated_init"]
    made, found = tiny(arms), tiny(arms[:2])
    for name in ("blocks.0.attention.out.weight", "embedding.table"):
        declared = declared_of(made)[name]
        ours = made.parametrization.scales(name, declared, made.model, "adam")
        theirs = found.parametrization.scales(name, declared, found.model, "adam")
        assert (ours.std, ours.lr, ours.decay) == (theirs.std, theirs.lr, theirs.decay)
        assert ours.cut == (3.0 if theirs.std else 0.0)
    assert REGISTRY["truncated_init"].about.slots == ("parametrization",)


def declared_of(recipe):
    from ablab.core.language.declare import params
    from ablab.core.model.plan import plan_of

    return dict(params(plan_of(recipe)))
