"""Squared ReLU: its formula, its place, and as many parameters as the SwiGLU that it replaces."""

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.relu2 import ReLU2
from ablab.core.model.cost import cost_of
from ablab.core.model.objective import token_losses
from ablab.core.recipe.intervention import resolve, treatment_of
from ablab.core.recipe.load import recipe_from


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def test_it_is_down_of_the_squared_positive_part_of_up(tiny, build, batch):
    model = build(tiny(["relu2"]), stirred=0.1)
    ffn = model.blocks[1].ffn.inner
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    up, down = (fp64(weight) for weight in (ffn.up.weight, ffn.down.weight))
    assert up.shape == (128, 32)
    assert down.shape == (32, 128)
    hidden = fp64(x) @ up.T
    expected = (np.where(hidden > 0, hidden, 0) ** 2) @ down.T
    assert np.abs(fp64(ffn(x)) - expected).max() < 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_the_output_grows_with_the_square_of_a_positive_factor(tiny, build, factor):
    """So LayerNorm scaling acts on it as 1/l, not 1/sqrt(l)."""
    ffn = build(tiny(["relu2"])).blocks[0].ffn.inner
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ffn(factor * x), factor**2 * ffn(x), rtol=1e-5, atol=1e-6)


def test_the_branch_is_normed_and_added_as_swiglu_is(tiny, build, batch):
    model = build(tiny(["relu2"]), stirred=0.1)
    block = model.blocks[0]
    x = model.embedding(batch(tiny())[:, :-1])
    attended = x + block.attention(x, {})[0]
    torch.testing.assert_close(
        block(x, {})[0], attended + block.ffn.inner(block.ffn.norm(attended)), rtol=0, atol=0
    )


def test_at_768_it_has_exactly_the_parameters_and_flops_of_swiglu():
    """2 * 4 = 3 * 8/3: 3072 channels against 2048."""
    base = recipe_from(["base", "size/70m", "data/docs"])
    other = resolve(base, treatment_of(["relu2"]))
    assert cost_of(base) == cost_of(other)
    assert other.model.ffn == ReLU2(4.0, 64)


def test_both_matrices_learn_from_the_first_step(tiny, build, batch):
    model = build(tiny(["relu2"]))
    block = batch(tiny())
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    for one in model.blocks:
        assert all(
            (weight.grad.abs() > 0).float().mean() > 0.9 and weight.declared.role == "hidden"
            for weight in one.ffn.inner.parameters()
        )
