"""Smear: a token takes in its gated share of the token before, of no other, and of none where there is none."""

import numpy as np
import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.fusion.places import flaw
from ablab.core.language.declare import params
from ablab.core.model.objective import token_losses
from ablab.core.model.plan import plan_of
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
# A gate's own gradient is a multiple of lambda, so lambda stands away from 0.
STARTED = [{"smear": {"start": 0.7}}]
STARTED_AT_ZERO_GATE = [{"smear": {"start": 0.7, "init": "zero"}}]


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw)


def fp64(tensor):
    return tensor.detach().double().numpy()


def stage_of(model):
    return model.on_embedding["smear"]


def applied(stage, x):
    """The stage's x [B,T,W], and its carry, beside any tokens."""
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    return stage(x, tokens, {"other": x})


def smeared(x, strength, weight):
    """The formula, token by token.  x: [B,T,W], weight: [channels]; fp64."""
    out = x.copy()
    for t in range(1, x.shape[1]):
        read = x[:, t, : len(weight)]
        gate = 1 / (1 + np.exp(-read @ weight))
        out[:, t] += strength * gate[:, None] * x[:, t - 1]
    return out


@pytest.mark.parametrize("channels", [1, 5, 24, 32])
def test_each_token_takes_its_gated_share_of_the_one_before(tiny, build, channels):
    recipe = tiny([{"smear": {"channels": channels, "start": 0.7}}])
    stage = stage_of(build(recipe, stirred=0.3))
    x = randn(3, 7, 32)
    ours, carry = applied(stage, x)
    weight = fp64(stage.gate.weight)
    assert weight.shape == (1, channels)
    expected = smeared(fp64(x), stage.strength.item(), weight[0])
    assert abs(fp64(ours) - expected).max() < 1e-6
    assert torch.equal(ours[:, 0], x[:, 0])
    assert torch.equal(carry["other"], x)
    assert torch.equal(carry["past/smear"], x[:, -1:])


def test_it_looks_back_one_token_and_never_ahead(tiny, build):
    stage = stage_of(build(tiny(STARTED), stirred=0.3))
    x = randn(1, 6, 32)
    changed = x.clone()
    changed[:, 3] += 1
    ours, _ = applied(stage, changed)
    theirs, _ = applied(stage, x)
    moved = (ours - theirs).abs().amax(-1)
    assert moved[0].gt(0).nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("init", ["normal", "zero"])
def test_with_lambda_at_zero_the_logits_are_the_baselines_bit_for_bit(tiny, build, batch, init):
    plain = build(tiny())
    model = build(tiny([{"smear": {"init": init}}]))
    tokens = batch(tiny())[:, :-1]
    ours, theirs = model(tokens), plain(tokens)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    stage_of(model).strength.data += 0.5
    assert not torch.equal(model(tokens), theirs)


def test_what_it_learns_moves_without_decay(tiny):
    declared = dict(params(plan_of(tiny(["smear"]))))
    assert declared["on_embedding.smear.strength"].role == "vector"
    assert declared["on_embedding.smear.gate.weight"].role == "gate"


def test_the_gate_starts_normal_or_at_zero(tiny, build):
    normal = stage_of(build(tiny(["smear"]))).gate.weight
    zero = stage_of(build(tiny([{"smear": {"init": "zero"}}]))).gate.weight
    assert normal.shape == (1, 24)
    assert 0.5 < normal.std() * 24**0.5 < 1.5
    assert not zero.any()


@pytest.mark.parametrize("treatment", [STARTED, STARTED_AT_ZERO_GATE])
def test_lambda_and_every_channel_of_the_gate_have_a_gradient(tiny, build, batch, treatment):
    model = build(tiny(treatment))
    block = batch(tiny())
    logits = model(block[:, :-1])
    token_losses(logits, block[:, 1:]).mean().backward()
    stage = stage_of(model)
    assert stage.strength.grad.abs() > 1e-6
    assert (stage.gate.weight.grad != 0).all()


def test_from_its_neutral_start_lambda_learns_first_and_then_the_gate(tiny, token_folder):
    trainer = Trainer(tiny(["smear"]), CPU, token_folder)
    stage = stage_of(trainer.model)
    start = stage.gate.weight.clone()
    before = trainer.evaluate()["val/loss"]
    trainer.advance()
    assert stage.strength.abs() > 1e-5
    assert torch.equal(stage.gate.weight, start)
    while trainer.step < trainer.recipe.steps:
        trainer.advance()
    assert not torch.equal(stage.gate.weight, start)
    assert trainer.evaluate()["val/loss"] < before


@pytest.mark.parametrize("sizes", [[1] * 16, [5, 1, 1, 9], [15, 1]])
def test_decoding_keeps_the_last_unsmeared_row_and_equals_the_full_forward(
    tiny, build, batch, sizes
):
    model = build(tiny(STARTED), stirred=0.1)
    tokens = batch(tiny())[:, :-1]
    pieces = []
    cache = None
    for piece in tokens.split(sizes, dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
        last = model.embed(piece[:, -1:])
        assert list(cache.carry) == ["past/smear"]
        assert torch.equal(cache.carry["past/smear"], last)
    assert (torch.cat(pieces, 1) - model(tokens)).abs().max() < 1e-5


def test_activations_keep_their_dtype(tiny, build, batch):
    model = build(tiny(STARTED), dtype=torch.bfloat16)
    logits, cache = model.extend(batch(tiny())[:, :-1], None)
    assert logits.dtype == torch.bfloat16
    assert cache.carry["past/smear"].dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["attention", "ffn", "loss"])
def test_every_kernel_still_serves_for_it_stands_before_the_first_block(tiny, place):
    recipe = tiny(["smear"], model__width=64, model__attention__head_dim=32)
    assert flaw(place, recipe, "fp32") == ""


def test_a_gate_wider_than_the_model_is_refused_in_numbers(tiny):
    wide = tiny([{"smear": {"channels": 40}}])
    with pytest.raises(UserError, match=r"smear.channels=40 exceeds the width of 32; use at"):
        plan_of(wide)
