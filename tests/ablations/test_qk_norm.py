"""QK-norm: unit RMS per head, whatever the size of the projections; only the per-channel gain minds the positions."""

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.qk_norm import QKNorm
from ablab.core.language.declare import Where
from ablab.core.model.layers import StageModule
from ablab.core.model.objective import token_losses
from ablab.core.parts.position import Rope

GAINS = ["channel", "scalar", "none"]
PLACE = Where(
    layer=1,
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    context=16,
    vocab=64,
    eps=1e-6,
)


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stage(gain, **dose):
    """With every learned gain away from its start of 1."""
    made = StageModule(QKNorm(gain, **dose).build(PLACE))
    for i, value in enumerate(made.parameters()):
        value.data.copy_(1 + 0.5 * randn(*value.shape, seed=10 + i))
    return made


def gains_of(made, gain):
    q = fp64(made.q_gain) if gain != "none" else 1.0
    return q, fp64(made.k_gain) if gain == "channel" else 1.0


@pytest.mark.parametrize("gain", GAINS)
def test_queries_and_keys_are_divided_by_their_rms_and_scaled_on_the_query_side_alone(gain):
    q = 3 * randn(2, 5, 4, 8)
    k = 0.1 * randn(2, 5, 2, 8, seed=1)
    made = stage(gain, scale=1.44, eps=1e-2)
    for out, x, g in zip(
        made(q, k),
        (q, k),
        (gains_of(made, gain)[0] * 1.44, gains_of(made, gain)[1]),
        strict=True,
    ):
        x = fp64(x)
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * g
        assert apart(fp64(out), expected) < 2e-6


def test_the_learned_gains_are_those_of_each_variant():
    shapes = {
        gain: {
            name: tuple(value.shape)
            for name, value in StageModule(QKNorm(gain).build(PLACE)).named_parameters()
        }
        for gain in GAINS
    }
    assert shapes == {
        "channel": {"q_gain": (8,), "k_gain": (8,)},
        "scalar": {"q_gain": (1,)},
        "none": {},
    }


@pytest.mark.parametrize("gain", GAINS)
def test_the_size_of_the_query_and_key_projections_does_not_matter(tiny, build, batch, gain):
    recipe = tiny([{"qk_norm": {"gain": gain, "eps": 1e-10}}])
    model = build(recipe, stirred=0.05)
    tokens = batch(recipe)[:, :-1]
    before = model(tokens)
    for rows, factor in (
        (slice(0, 32), 7.0),
        (slice(32, 64), 7.0),
        (slice(0, 64), 0.1),
    ):
        for block in model.blocks:
            block.attention.qkv.weight.data[rows] *= factor
        assert apart(model(tokens), before) < 1e-5
    for block in model.blocks:
        block.attention.qkv.weight.data[64:] *= 2.0  # values are not normalised
    assert apart(model(tokens), before) > 0.1


@pytest.mark.parametrize("gain", GAINS)
def test_no_attention_logit_exceeds_gain_times_root_of_head_dim(tiny, build, batch, gain):
    """Before, with queries and keys of this size, they reach the hundreds."""
    recipe = tiny([{"qk_norm": {"gain": gain, "scale": 1.2}}])
    model = build(recipe, stirred=0.3)
    tokens = batch(recipe)[:, :-1]
    attention = model.blocks[1].attention
    attention.qkv.weight.data *= 20
    q, k, _, _ = attention.project(
        attention.normed(model.embedding(tokens)), {"first_values": None}, 0
    )
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    q_gain, k_gain = gains_of(attention.on_qk["qk_norm"], gain)
    bound = 1.2 * np.abs(q_gain).max() * np.abs(k_gain).max() * 8**0.5
    assert 0.3 * bound < logits.abs().max().item() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("gain", "commutes"),
    [
        ("channel", False),
        ("scalar", True),
        ("none", True),
    ],
)
def test_only_a_per_channel_gain_cares_whether_it_comes_before_the_positions(gain, commutes):
    norm = stage(gain)
    rope = StageModule(Rope().build(PLACE))
    q = randn(2, 16, 4, 8)
    k = randn(2, 16, 2, 8, seed=1)
    before = rope(*norm(q, k), 0)
    behind = norm(*rope(q, k, 0))
    far = max(apart(a, b).item() for a, b in zip(before, behind, strict=True))
    assert far < 1e-5 if commutes else far > 0.1


def test_the_norm_stands_before_the_positions(tiny, build, batch):
    """So the per-channel form is Qwen3's."""
    recipe = tiny(["qk_norm"])
    model = build(recipe, stirred=0.3)
    tokens = batch(recipe)[:, :-1]
    attention = model.blocks[0].attention
    x = model.embedding(tokens)
    q, k, _, _ = attention.project(attention.normed(x), {}, 0)
    raw = attention.qkv(attention.norm(x)).unflatten(-1, (12, 8))
    expected = attention.position(*attention.on_qk["qk_norm"](raw[:, :, :4], raw[:, :, 4:8]), 0)
    assert torch.equal(q.transpose(1, 2), expected[0])
    assert torch.equal(k.transpose(1, 2), expected[1])


def test_bf16_activations_are_normalised_in_fp32_and_stay_bf16():
    q = (300 * randn(2, 5, 4, 8)).bfloat16()
    k = randn(2, 5, 2, 8, seed=1).bfloat16()
    out, _ = stage("channel", eps=1e-6)(q, k)
    wide, _ = stage("channel", eps=1e-6)(q.float(), k.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.bfloat16())


@pytest.mark.parametrize("gain", ["channel", "scalar"])
def test_every_gain_receives_a_gradient_in_every_layer(tiny, build, batch, gain):
    recipe = tiny([{"qk_norm": {"gain": gain}}])
    model = build(recipe)
    block = batch(recipe)
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    learned = {name: value for name, value in model.named_parameters() if "qk_norm" in name}
    assert len(learned) == 3 * (2 if gain == "channel" else 1)
    assert all(
        (value.grad.abs() > 1e-7).all() and value.declared.role == "vector"
        for value in learned.values()
    )
