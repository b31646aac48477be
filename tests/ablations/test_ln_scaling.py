"""LayerNorm scaling: l^-1/2 on both norms of block l, counted from 1; a factor, not a smaller gain."""

import pytest
import torch

from ablab.core.model.cost import cost_of
from ablab.core.model.objective import token_losses


def norm_outputs(model, tokens) -> list[list[torch.Tensor]]:
    """Per block: what the attention's and the feed-forward's first matrix receives; last: what the readout receives."""
    heard = [[] for _ in range(len(model.blocks) + 1)]
    for i, block in enumerate(model.blocks):
        for matrix in (block.attention.qkv, block.ffn.inner.gate_up):
            matrix.register_forward_pre_hook(
                lambda _, inputs, i=i: heard[i].append(inputs[0].detach())
            )
    model.readout.register_forward_pre_hook(
        lambda _, inputs: heard[-1].append(inputs[0].detach())
    )
    model(tokens)
    return heard


def rms(x) -> torch.Tensor:
    return x.double().square().mean(-1).sqrt()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_both_norms_of_block_l_have_rms_l_to_the_minus_power(tiny, build, batch, power):
    model = build(
        tiny([{"ln_scaling": {"power": power}}], model__layers=5, model__norm_eps=1e-10)
    )
    heard = norm_outputs(model, batch(tiny())[:, :-1])
    for layer, pair in enumerate(heard[:-1], 1):
        assert len(pair) == 2
        for x in pair:
            assert (rms(x) * layer**power - 1).abs().max() < 1e-5


def test_the_first_block_and_the_final_norm_are_those_of_the_baseline(tiny, build, batch):
    plain, scaled = (
        norm_outputs(build(tiny(treatment)), batch(tiny())[:, :-1])
        for treatment in ([], ["ln_scaling"])
    )
    assert all(torch.equal(*pair) for pair in zip(plain[0], scaled[0], strict=True))
    assert (rms(scaled[-1][0]) - 1).abs().max() < 1e-4
    assert not torch.equal(plain[1][0], scaled[1][0])


def test_the_forward_is_that_of_gains_divided_by_root_l_but_their_gradient_is_not(
    tiny, build, batch
):
    """Folding 1/sqrt(l) into the gain would make its update sqrt(l) times too large."""
    scaled = build(tiny(["ln_scaling"]), stirred=0.2)
    folded = build(tiny())
    block = batch(tiny())
    tokens = block[:, :-1]
    weights = dict(scaled.named_parameters())
    for name, value in folded.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 1
        value.data.copy_(
            weights[name].detach() / (layer**0.5 if name.endswith("norm.gain") else 1)
        )
    for model in (scaled, folded):
        token_losses(model(tokens), block[:, 1:]).mean().backward()
    torch.testing.assert_close(scaled(tokens), folded(tokens), rtol=0, atol=2e-6)
    for layer, (one, other) in enumerate(zip(scaled.blocks, folded.blocks, strict=True), 1):
        for part in ("attention", "ffn"):
            ours, theirs = (getattr(model, part).norm.gain.grad for model in (one, other))
            torch.testing.assert_close(ours, theirs / layer**0.5, rtol=2e-3, atol=1e-7)
            assert theirs.abs().max() > 1e-4


def test_the_factor_stands_behind_the_gain(tiny, build, batch):
    model = build(tiny(["ln_scaling"]))
    model.blocks[2].ffn.norm.gain.data.fill_(5.0)
    assert (
        rms(norm_outputs(model, batch(tiny())[:, :-1])[2][1]) * 3**0.5 / 5 - 1
    ).abs().max() < 1e-4


def test_no_parameter_and_no_flop_is_added(tiny):
    assert cost_of(tiny(["ln_scaling"])) == cost_of(tiny())
