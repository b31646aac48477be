"""Sandwich norm: each branch adds a vector of a learned size, whatever happens inside it."""

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.fusion.places import flaw
from ablab.core.model.cost import cost_of
from ablab.core.model.objective import token_losses
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
EXACT = {"model__norm_eps": 1e-12}  # small outputs do not fall short of the gain


def sandwiched(gain=1.0):
    return [{"sandwich_norm": {"gain": gain}}]


def apart(ours, theirs) -> float:
    """The largest difference."""
    return (ours - theirs).abs().max().item()


def rms(x) -> torch.Tensor:
    """Over the last axis, in fp64."""
    return x.detach().double().square().mean(-1).sqrt()


def stream(model, tokens) -> list[torch.Tensor]:
    """The stream [B,T,W] before each branch of each block, and after the last."""
    heard = []
    for block in model.blocks:
        for branch in (block.attention, block.ffn):
            branch.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    last = model.trunk(tokens).detach()
    return [*heard, last]


def additions(model, tokens) -> list[torch.Tensor]:
    """What each branch adds to the stream."""
    points = stream(model, tokens)
    return [behind - before for before, behind in zip(points, points[1:], strict=False)]


def test_the_block_is_the_formula_in_fp64(tiny, build, batch):
    recipe = tiny(sandwiched())
    model = build(recipe, stirred=0.2)
    x = model.embed(batch(recipe)[:, :-1])

    def normed(y, gain):
        y = y.detach().double()
        return gain.detach().double() * y / (rms(y)[..., None] ** 2 + 1e-6).sqrt()

    for block in model.blocks:
        gains = block.block
        y, _ = block.attention(x, {})
        middle = x.double() + normed(y, gains.after_attention)
        expected = middle + normed(block.ffn(middle.float()), gains.after_ffn)
        x, _ = block(x, {})
        assert apart(x.double(), expected) < 5e-6
        assert apart(gains.after_attention, gains.after_ffn) > 0.1


@pytest.mark.parametrize("gain", [1.0, 0.25, 3.0])
def test_each_branch_adds_a_vector_whose_rms_is_the_gain(tiny, build, batch, gain):
    recipe = tiny(sandwiched(gain), **EXACT)
    added = additions(build(recipe), batch(recipe)[:, :-1])
    assert len(added) == 2 * recipe.model.layers
    for vector in added:
        assert (rms(vector) / gain - 1).abs().max() < 1e-4


@pytest.mark.parametrize("size", [0.01, 20.0])
def test_the_size_of_what_a_branch_returns_does_not_matter(tiny, build, batch, size):
    """It does in the control."""
    moved = {}
    for label, treatment in (("sandwich", sandwiched()), ("plain", [])):
        recipe = tiny(treatment, **EXACT)
        model = build(recipe)
        tokens = batch(recipe)[:, :-1]
        before = model(tokens)
        for block in model.blocks:
            block.attention.out.weight.data *= size
            block.ffn.inner.down.weight.data *= size
        moved[label] = apart(model(tokens), before)
    assert moved["sandwich"] < 1e-4
    assert moved["plain"] > 0.1


def test_the_stream_grows_by_at_most_the_gain_a_branch_whatever_the_weights(tiny, build, batch):
    recipe = tiny(sandwiched(0.5), model__layers=6)
    model = build(recipe)
    for name, value in model.named_parameters():
        if not name.endswith(("after_attention", "after_ffn")):
            value.data *= 10
    points = stream(model, batch(recipe)[:, :-1])
    for branches, x in enumerate(points):
        assert (rms(x) <= rms(points[0]) + 0.5 * branches + 1e-5).all()


@pytest.mark.parametrize(("depth", "alpha"), [("none", 0.0), ("sqrt", 0.5), ("complete", 1.0)])
def test_mups_depth_factor_stands_behind_the_norm_and_only_once(
    tiny, build, batch, depth, alpha
):
    """Inside the branch the norm would divide it out, and `depth` would be inert."""
    mup = {"mup": {"base_width": 16, "base_layers": 2, "depth": depth}}
    recipe = tiny([*sandwiched(), mup], model__layers=4, **EXACT)
    for vector in additions(build(recipe), batch(recipe)[:, :-1]):
        assert (rms(vector) * 2**alpha - 1).abs().max() < 1e-4


def test_a_gain_of_zero_is_a_model_without_blocks_that_learns(tiny, build, batch):
    recipe = tiny(sandwiched(0.0))
    model = build(recipe)
    block = batch(recipe)
    tokens = block[:, :-1]
    assert torch.equal(model.trunk(tokens), model.embed(tokens))
    token_losses(model(tokens), block[:, 1:]).mean().backward()
    for one in model.blocks:
        assert all(value.grad.abs().max() > 0 for value in one.block.parameters())


def test_two_gains_a_layer_are_added_and_they_do_not_decay(tiny, build):
    on, off = tiny(sandwiched(0.7)), tiny()
    assert cost_of(on).parameters == cost_of(off).parameters + 2 * 3 * 32
    assert cost_of(on).flops_per_token == cost_of(off).flops_per_token
    for block in build(on).blocks:
        gains = dict(block.block.named_parameters())
        assert list(gains) == ["after_attention", "after_ffn"]
        for gain in gains.values():
            assert gain.declared.role == "vector"
            assert (gain == 0.7).all()


def test_every_parameter_has_a_gradient(tiny, build, batch):
    recipe = tiny(sandwiched())
    model = build(recipe)
    block = batch(recipe)
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    assert all(value.grad.abs().max() > 0 for value in model.parameters())


@pytest.mark.parametrize("group", [1, 2])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, batch, group):
    recipe = tiny([*sandwiched(), "value_residual"], model__attention__group=group)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    pieces, cache = [], None
    with torch.no_grad():
        for piece in tokens.split([5, 1, 1, 3, 6], dim=1):
            logits, cache = model.extend(piece, cache)
            pieces.append(logits)
        assert apart(torch.cat(pieces, dim=1), model(tokens)) < 1e-5


@pytest.mark.parametrize("place", ["attention", "ffn", "loss"])
def test_the_kernels_within_the_branches_serve_it_too(tiny, place):
    recipe = tiny(sandwiched(), model__width=64, model__attention__head_dim=32)
    assert flaw(place, recipe, "fp32") == ""


@pytest.mark.parametrize("gain", [-0.5, float("inf")])
def test_a_negative_or_infinite_gain_is_refused(tiny, gain):
    with pytest.raises(UserError, match="sandwich_norm.gain"):
        tiny(sandwiched(gain))


def test_a_run_learns(tiny, token_folder):
    recipe = tiny(sandwiched(), budget__tokens=40 * 64, optim__lr=0.01)
    trainer = Trainer(recipe, CPU, token_folder)
    before = trainer.evaluate()["val/loss"]
    for _ in range(40):
        assert trainer.advance().isfinite()
    assert trainer.evaluate()["val/loss"] < before - 0.3
