"""The parallel block: both branches read what enters the block, each through its own norm."""

import pytest
import torch

from ablab.core.fusion.places import plan_with
from ablab.core.model.cost import cost_of
from ablab.core.model.objective import token_losses
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
PARALLEL = ["parallel_block"]
cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


def apart(ours, theirs) -> float:
    """The largest difference."""
    return (ours - theirs).abs().max().item()


def formula(block, x) -> torch.Tensor:
    """x + attention(x) + ffn(x), all in fp64 and from the weights alone.  x: [B,T,W]."""
    weights = {name: value.detach().double() for name, value in block.named_parameters()}
    x = x.double()
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    attended = heads_of(unit * weights["attention.norm.gain"], weights["attention.qkv.weight"])
    gate_up = unit * weights["ffn.norm.gain"] @ weights["ffn.inner.gate_up.weight"].T
    gate, up = gate_up.chunk(2, dim=-1)
    fed = gate / (1 + (-gate).exp()) * up
    y = attended @ weights["attention.out.weight"].T
    z = fed @ weights["ffn.inner.down.weight"].T
    return x + y + z


def heads_of(x, qkv) -> torch.Tensor:
    """Causal softmax attention of 4 heads of 8 channels.  x: [B,T,W], qkv: [3W,W] -> [B,T,W]."""
    packed = (x @ qkv.T).unflatten(-1, (12, 8))
    q, k, v = packed.chunk(3, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", turned(q), turned(k))
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    shares = (scores / 8**0.5).masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", shares, v).flatten(2)


def turned(x) -> torch.Tensor:
    """Rotary positions as a product of complex numbers: channel i with channel i + D/2.  x: [B,T,H,D]."""
    real, imaginary = x.chunk(2, dim=-1)
    half = real.shape[-1]
    speeds = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * speeds
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((product.real, product.imag), dim=-1)


def test_a_block_is_x_and_both_branches_of_x_in_fp64(tiny, build, batch):
    recipe = tiny(PARALLEL)
    model = build(recipe, stirred=0.2)
    x = model.embed(batch(recipe)[:, :-1])
    for block in model.blocks:
        y, _ = block(x, {})
        assert apart(y.double(), formula(block, x)) < 1e-5
        assert apart(y, x) > 0.1
        x = y.detach()


def test_the_feed_forward_never_sees_the_attention_of_its_own_block(tiny, build, batch):
    """The control's does."""
    heard = {}
    for label, treatment in (("parallel", PARALLEL), ("serial", [])):
        recipe = tiny(treatment)
        model = build(recipe)
        block = model.blocks[0]
        inputs = heard[label] = []
        block.ffn.register_forward_pre_hook(
            lambda _, given, inputs=inputs: inputs.append(given[0].detach())
        )
        tokens = batch(recipe)[:, :-1]
        model(tokens)
        block.attention.out.weight.data.mul_(3)
        model(tokens)
    assert torch.equal(*heard["parallel"])
    assert apart(*heard["serial"]) > 0.01


def test_with_a_silent_branch_it_is_the_baseline_bit_for_bit(tiny, build, batch):
    """Serial and parallel differ by what one branch says to the other, and by nothing else."""
    tokens = batch(tiny())[:, :-1]
    for silent in ("attention.out.weight", "ffn.inner.down.weight"):
        logits = []
        for treatment in (PARALLEL, []):
            model = build(tiny(treatment), stirred=0.1)
            for block in model.blocks:
                block.get_parameter(silent).data.zero_()
            logits.append(model(tokens))
        assert torch.equal(*logits)


def test_a_gain_of_its_own_is_a_gain_folded_into_the_feed_forwards_first_matrix(
    tiny, build, batch
):
    """So that two norms compute what the sources' shared one does."""
    recipe = tiny(PARALLEL)
    own, shared = (build(recipe, stirred=0.2) for _ in range(2))
    for block in shared.blocks:
        ratio = block.ffn.norm.gain.data / block.attention.norm.gain.data
        block.ffn.inner.gate_up.weight.data *= ratio
        block.ffn.norm.gain.data.copy_(block.attention.norm.gain.data)
    tokens = batch(recipe)[:, :-1]
    assert apart(own(tokens), shared(tokens)) < 1e-4


def test_no_parameter_and_no_flop_is_added(tiny):
    assert cost_of(tiny(PARALLEL)) == cost_of(tiny())


def test_every_parameter_has_a_gradient(tiny, build, batch):
    recipe = tiny(PARALLEL)
    model = build(recipe)
    block = batch(recipe)
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    assert all(value.grad.abs().max() > 0 for value in model.parameters())


@pytest.mark.parametrize("group", [1, 2])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, batch, group):
    recipe = tiny(["parallel_block", "value_residual"], model__attention__group=group)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    pieces, cache = [], None
    with torch.no_grad():
        for piece in tokens.split([5, 1, 1, 3, 6], dim=1):
            logits, cache = model.extend(piece, cache)
            pieces.append(logits)
        assert apart(torch.cat(pieces, dim=1), model(tokens)) < 1e-5


@cpu
def test_the_kernels_within_the_branches_compute_the_same(tiny, build, batch):
    recipe = tiny(PARALLEL, model__width=64, model__attention__head_dim=32, model__layers=2)
    served = plan_with({"attention", "ffn"}, recipe)
    block = batch(recipe, rows=1)
    found = []
    for plan in (None, served):
        model = build(recipe, stirred=0.1, plan=plan)
        logits = model(block[:, :-1])
        token_losses(logits, block[:, 1:]).sum().backward()
        found.append([logits, *(value.grad for value in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert apart(ours, theirs) < 1e-4 * theirs.abs().max()


def test_a_run_learns(tiny, token_folder):
    trainer = Trainer(tiny(PARALLEL, budget__tokens=40 * 64, optim__lr=0.01), CPU, token_folder)
    before = trainer.evaluate()["val/loss"]
    for _ in range(40):
        assert trainer.advance().isfinite()
    assert trainer.evaluate()["val/loss"] < before - 0.3
