"""The attention output gate: an identity at the start, between heads and output projection, fed by the normed input."""

import numpy as np
import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.model.objective import token_losses

PER = ["head", "elementwise", "first_channels"]


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gates(model):
    return [block.attention.on_heads["gating"].project.weight for block in model.blocks]


@pytest.mark.parametrize("per", PER)
def test_zero_weights_under_two_sigmoid_are_exactly_the_baseline(tiny, build, batch, per):
    plain = build(tiny())
    gated = build(tiny([{"gating": {"per": per}}]))
    block = batch(tiny())
    tokens = block[:, :-1]
    assert all(not weight.any() for weight in gates(gated))
    assert torch.equal(plain(tokens), gated(tokens))
    gates(gated)[1].data += 0.1
    assert not torch.equal(plain(tokens), gated(tokens))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("activation", "factor"), [("sigmoid", 1.0), ("2sigmoid", 2.0)])
def test_the_output_projection_reads_the_heads_times_the_gate_of_the_normed_input(
    tiny, build, batch, per, activation, factor
):
    """The place check, in numbers: what `out` receives, what feeds the gate, and one weight row a head or a channel."""
    recipe = tiny(
        [{"gating": {"per": per, "activation": activation, "init": "normal"}}],
        model__attention__group=2,
    )
    gated = build(recipe, stirred=0.2)
    plain = build(tiny(model__attention__group=2))
    tokens = batch(recipe)[:, :-1]
    heard = {}
    weights = dict(gated.named_parameters())
    for name, value in plain.named_parameters():
        value.data.copy_(weights[name])
    for label, model in (("gated", gated), ("plain", plain)):
        attention = model.blocks[0].attention
        attention.out.register_forward_pre_hook(
            lambda _, inputs, label=label: heard.__setitem__(label, fp64(inputs[0]))
        )
        attention.qkv.register_forward_pre_hook(
            lambda _, inputs: heard.__setitem__("x", fp64(inputs[0]))
        )
        model(tokens)
    weight = fp64(gates(gated)[0])
    assert (
        weight.shape
        == {
            "head": (4, 32),
            "elementwise": (32, 32),
            "first_channels": (4, 8),
        }[per]
    )
    strength = factor / (1 + np.exp(-heard["x"][..., : weight.shape[1]] @ weight.T))
    strength = np.repeat(strength, 8, axis=-1) if len(weight) == 4 else strength
    assert strength.std() > 0.1
    assert apart(heard["gated"], strength * heard["plain"]) < 1e-5


def test_a_gate_a_head_is_an_elementwise_gate_with_tied_channels(tiny, build, batch):
    head, element = (build(tiny([{"gating": {"per": per}}])) for per in ("head", "elementwise"))
    for i, (small, large) in enumerate(zip(gates(head), gates(element), strict=True)):
        small.data.copy_(randn(4, 32, seed=i))
        large.data.copy_(small.data.repeat_interleave(8, 0))
    tokens = batch(tiny())[:, :-1]
    torch.testing.assert_close(head(tokens), element(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "read"), [(0, 8), (12, 12)])
def test_a_gate_on_the_first_channels_ignores_the_others(tiny, build, channels, read):
    stage = (
        build(
            tiny(
                [{"gating": {"per": "first_channels", "channels": channels, "init": "normal"}}]
            )
        )
        .blocks[0]
        .attention.on_heads["gating"]
    )
    y = randn(2, 5, 4, 8)
    x = randn(2, 5, 32, seed=1)
    noise = randn(2, 5, 32, seed=2)
    later = x.clone()
    earlier = x.clone()
    later[..., read:] += noise[..., read:]
    earlier[..., read - 1] += noise[..., read - 1]
    assert stage.project.weight.shape == (4, read)
    assert torch.equal(stage(y, later), stage(y, x))
    assert not torch.equal(stage(y, earlier), stage(y, x))


def test_more_first_channels_than_the_width_are_refused(tiny, build):
    with pytest.raises(UserError, match="gating.channels=33 exceeds the width of 32"):
        build(tiny([{"gating": {"per": "first_channels", "channels": 33}}]))


@pytest.mark.parametrize("per", PER)
def test_permuting_the_heads_with_their_gates_changes_nothing(tiny, build, batch, per):
    recipe = tiny([{"gating": {"per": per, "init": "normal"}}])
    model = build(recipe, stirred=0.1)
    other = build(recipe, stirred=0.1)
    order = [2, 0, 3, 1]
    for block in other.blocks:
        attention = block.attention
        attention.qkv.weight.data = attention.qkv.weight.data.view(3, 4, 8, 32)[
            :, order
        ].reshape(96, 32)
        attention.out.weight.data = attention.out.weight.data.view(32, 4, 8)[:, order].reshape(
            32, 32
        )
        gate = attention.on_heads["gating"].project.weight
        gate.data = gate.data.unflatten(0, (4, -1))[order].flatten(0, 1)
    tokens = batch(recipe)[:, :-1]
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=5e-6)
    gate.data = gate.data.roll(gate.shape[0] // 4, 0)  # the gates alone, one head on
    assert apart(other(tokens), model(tokens)) > 1e-3


def test_a_closed_gate_silences_the_branch_and_leaves_keys_and_values_alone(tiny, build, batch):
    """Channel 0 of every embedding is made large and positive; a weight of -1000 on it closes the gate."""
    recipe = tiny([{"gating": {"activation": "sigmoid"}}])
    model = build(recipe)
    tokens = batch(recipe)[:, :-1]
    model.embedding.table.data[:, 0] = 1.0
    open_logits, open_cache = model.extend(tokens, None)
    gates(model)[0].data[:, 0] = -1000.0
    closed_logits, closed_cache = model.extend(tokens, None)
    for part in (0, 1):
        assert torch.equal(closed_cache.blocks[0][part], open_cache.blocks[0][part])
    attention = model.blocks[0].attention
    x = model.embedding(tokens)
    assert not attention(x, {})[0].any()
    assert not torch.equal(closed_logits, open_logits)


@pytest.mark.parametrize("per", PER)
def test_gates_learn_from_the_first_step(tiny, build, batch, per):
    recipe = tiny([{"gating": {"per": per}}])
    model = build(recipe)
    block = batch(recipe)
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    assert all((weight.grad.abs().sum(1) > 1e-5).all() for weight in gates(model))


def test_gates_keep_adam_without_decay_beside_muon_and_decaying_matrices(tiny, build):
    """The row rule would normalise a [heads, width] gate over heads, per input channel."""
    recipe = tiny(["gating", "muon", "normuon", "cautious_wd"])
    assert [step.kind for step in recipe.optim.chains["gate"].steps] == ["adam"]
    assert [step.kind for step in recipe.optim.chains["hidden"].steps] == [
        "momentum",
        "orthogonalize",
        "normuon",
        "cautious_decay",
    ]
    assert all(weight.declared.role == "gate" for weight in gates(build(recipe)))
