"""Soft cap: bounded, odd, the identity for small logits, and the last thing before the loss."""

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.soft_cap import SoftCap
from ablab.core.model.layers import StageModule

FORMULA = {
    "tanh": lambda z, c: c * np.tanh(z / c),
    "rational": lambda z, c: c * z / np.sqrt(z**2 + c**2),
}
FORMS = pytest.mark.parametrize("form", FORMULA)


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def stage(form, cap):
    return StageModule(SoftCap(cap, form).build(None))


@FORMS
@pytest.mark.parametrize("cap", [15.0, 30.0, 0.5])
def test_it_equals_its_formula_in_fp64(form, cap):
    z = torch.cat((torch.linspace(-100, 100, 2001), torch.linspace(-0.1, 0.1, 101)))
    assert apart(fp64(stage(form, cap)(z)), FORMULA[form](fp64(z), cap)) < 3e-6 * max(cap, 1)


@FORMS
def test_it_bounds_what_is_huge_and_leaves_what_is_small(form):
    capped = stage(form, 15.0)
    assert capped(torch.tensor([1e6, -1e6])).tolist() == pytest.approx([15, -15], rel=1e-6)
    z = torch.linspace(-0.1, 0.1, 21)
    assert apart(capped(z), z) < 1e-4 * 0.1  # the next term is z^3 / c^2
    rising = capped(torch.linspace(-40, 40, 200)).diff()
    assert (rising > 0).all()


@FORMS
def test_the_gradient_is_that_of_the_formula(form):
    z = torch.linspace(-30, 30, 61).requires_grad_()
    stage(form, 10.0)(z).sum().backward()
    wide = np.linspace(-30, 30, 61)
    h = 1e-5
    slope = (FORMULA[form](wide + h, 10.0) - FORMULA[form](wide - h, 10.0)) / (2 * h)
    assert apart(fp64(z.grad), slope) < 1e-5


@FORMS
@pytest.mark.parametrize("tied", [False, True])
def test_the_models_logits_are_the_capped_logits_of_the_baseline(
    tiny, build, batch, form, tied
):
    plain, capped = (
        build(tiny(treatment, model__tied=tied), stirred=0.2)
        for treatment in ([], [{"soft_cap": {"cap": 2.0, "form": form}}])
    )
    tokens = batch(tiny())[:, :-1]
    before = fp64(plain(tokens))
    after = fp64(capped(tokens))
    assert np.abs(before).max() > 3
    assert np.abs(after).max() < 2
    assert apart(after, FORMULA[form](before, 2.0)) < 1e-5
    extended, _ = capped.extend(tokens, None)
    assert apart(fp64(extended), after) < 1e-5


def test_the_cap_comes_after_the_width_multiplier(tiny, build, batch):
    """Dividing capped logits by m would move the cap with the width."""
    paths = {"model__tied": True}
    plain, both = (
        build(tiny(treatment, **paths), stirred=0.2)
        for treatment in ([], [{"soft_cap": {"cap": 2.0}}, {"mup": {"base_width": 64}}])
    )
    tokens = batch(tiny())[:, :-1]
    before = fp64(plain(tokens))
    after = fp64(both(tokens))
    assert apart(after, FORMULA["tanh"](2 * before, 2.0)) < 1e-5  # m = 1/2


@FORMS
def test_bf16_logits_stay_bf16(form):
    z = torch.tensor([1.0, 50.0, -50.0]).bfloat16()
    assert stage(form, 15.0)(z).dtype == torch.bfloat16
    assert stage(form, 15.0)(z)[1:].abs().max() <= 15
