"""Value residual: later layers mix in the raw values of the first, which nothing learned in the mix may touch."""

import numpy as np
import pytest
import torch

from ablab.core.model.objective import token_losses

VALUES = slice(64, 96)  # rows of v in qkv, after q and k: 4 heads of 8 each


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def form(name, **dose):
    return [{"value_residual": {"form": name, **dose}}]


def mixes(model):
    return [block.attention.on_values["value_residual"] for block in model.blocks[1:]]


def values_of(model, tokens):
    """Each layer's raw values, as `qkv` gives them, and the values that attention mixes.  Both [B,T,KV,D], fp64."""
    raw = []
    for block in model.blocks:
        attention = block.attention
        kv = block.attention.heads[2]
        attention.qkv.register_forward_hook(
            lambda _, __, out, kv=kv: raw.append(
                out.detach().double().unflatten(-1, (-1, 8))[:, :, -kv:].numpy()
            )
        )
    _, cache = model.extend(tokens, None)
    return raw, [values.transpose(1, 2).detach().double().numpy() for _, values in cache.blocks]


@pytest.mark.parametrize(
    "treatment",
    [
        form("normalised"),
        form("learnable", own=1.0, first=0.0),
        form("constant", own=1.0, first=0.0),
    ],
)
def test_one_and_zero_are_exactly_the_baseline(tiny, build, batch, treatment):
    plain = build(tiny())
    mixed = build(tiny(treatment))
    block = batch(tiny())
    tokens = block[:, :-1]
    assert torch.equal(plain(tokens), mixed(tokens))


@pytest.mark.parametrize(
    ("name", "own", "first", "layers", "mixing"),
    [
        ("identity", 0.5, 0.5, 6, {2, 3, 4, 5, 6}),
        ("constant", 1, 2, 6, {2, 3, 4, 5, 6}),
        ("sparse", 1, 5, 6, {5, 6}),
        ("sparse", 1, 5, 8, {6, 7, 8}),  # the source's model
        ("sparse", 1, 5, 4, {3, 4}),
        ("learnable", 0.5, 0.5, 6, {2, 3, 4, 5, 6}),
    ],
)
def test_each_form_mixes_raw_first_values_by_its_own_weights(
    tiny, build, batch, name, own, first, layers, mixing
):
    """Layer 3 takes layer 1's raw values, not layer 2's mixture; `sparse` leaves all but the last third alone."""
    recipe = tiny(form(name), model__attention__group=2, model__layers=layers)
    raw, used = values_of(build(recipe), batch(recipe)[:, :-1])
    assert np.array_equal(used[0], raw[0])
    for layer in range(1, layers):
        mixes_here = layer + 1 in mixing
        expected = own * raw[layer] + first * raw[0] if mixes_here else raw[layer]
        assert apart(used[layer], expected) < 2e-6, layer
        assert apart(raw[layer], raw[0]) > 0.5


def test_the_normalised_form_divides_by_the_length_of_its_weights(tiny, build, batch):
    """s (a V + b V_1) / sqrt(a^2 + b^2), with weights of every layer's own."""
    model = build(tiny(form("normalised")), stirred=0.5)
    weights = [
        [mix.get_parameter(name).item() for name in ("scale", "own", "first")]
        for mix in mixes(model)
    ]
    raw, used = values_of(model, batch(tiny())[:, :-1])
    for layer, (s, a, b) in enumerate(weights, 1):
        expected = s * (a * raw[layer] + b * raw[0]) / np.sqrt(a * a + b * b)
        assert apart(used[layer], expected) < 5e-6
    assert weights[0] != weights[1]


@pytest.mark.parametrize("factor", [0.01, 3.0, 250.0])
def test_the_normalised_form_does_not_see_the_common_size_of_its_weights(
    tiny, build, batch, factor
):
    model = build(tiny(form("normalised")), stirred=0.3)
    tokens = batch(tiny())[:, :-1]
    before = model(tokens)
    for mix in mixes(model):
        mix.own.data *= factor
        mix.first.data *= factor
    assert apart(model(tokens), before) < 1e-5
    mixes(model)[0].own.data *= -1
    assert apart(model(tokens), before) > 1e-3


def test_with_first_values_alone_no_later_value_projection_matters(tiny, build, batch):
    model = build(tiny(form("learnable", own=0.0, first=1.0)))
    block = batch(tiny())
    tokens = block[:, :-1]
    before = model(tokens)
    token_losses(before, block[:, 1:]).mean().backward()
    qkv = [one.attention.qkv.weight for one in model.blocks]
    assert all(not weight.grad[VALUES].any() and weight.grad[:64].any() for weight in qkv[1:])
    assert qkv[0].grad[VALUES].any()
    for weight in qkv[1:]:
        weight.data[VALUES] += 1
    assert torch.equal(model(tokens), before)
    qkv[0].data[VALUES] += 0.1
    assert not torch.equal(model(tokens), before)


@pytest.mark.parametrize("name", ["normalised", "learnable"])
def test_the_first_layer_has_no_weights_of_the_mix_and_feels_none(tiny, build, batch, name):
    recipe = tiny(form(name))
    model = build(recipe)
    tokens = batch(recipe)[:, :-1]
    outputs = []
    model.blocks[0].register_forward_hook(
        lambda _, __, out: outputs.append((out[0], out[1]["first_values"]))
    )
    learned = [
        parameter for parameter, _ in model.named_parameters() if "value_residual" in parameter
    ]
    assert len(learned) == 2 * (3 if name == "normalised" else 2)
    assert not any(one.startswith("blocks.0.") for one in learned)
    logits = [model(tokens)]
    for mix in mixes(model):
        for value in mix.parameters():
            value.data += 0.7
    logits.append(model(tokens))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert not torch.equal(*logits)


def test_mixing_before_the_expansion_of_grouped_heads_equals_mixing_after(tiny, build, batch):
    grouped = build(tiny(form("learnable"), model__attention__group=2), stirred=0.1)
    full = build(tiny(form("learnable")))
    weights = dict(grouped.named_parameters())
    for name, value in full.named_parameters():
        source = weights[name].detach()
        if name.endswith("qkv.weight"):
            q, k, v = source.split((32, 16, 16))
            source = torch.cat(
                [
                    q,
                    *(
                        part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
                        for part in (k, v)
                    ),
                ]
            )
        value.data.copy_(source)
    tokens = batch(tiny())[:, :-1]
    assert apart(full(tokens), grouped(tokens)) < 1e-5


@pytest.mark.parametrize("name", ["normalised", "learnable", "identity", "constant", "sparse"])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, batch, name):
    model = build(tiny(form(name)), stirred=0.2)
    tokens = batch(tiny())[:, :-1]
    pieces = []
    cache = None
    seen = 0
    for size in (4, 1, 3, 1, 7):
        logits, cache = model.extend(tokens[:, seen : seen + size], cache)
        pieces.append(logits)
        seen += size
    assert apart(torch.cat(pieces, 1), model(tokens)) < 1e-5


@pytest.mark.parametrize("name", ["normalised", "learnable", "constant"])
def test_values_keep_the_activations_dtype(tiny, build, batch, name):
    """A [1] fp32 weight would promote bf16 values, and attention refuses mixed dtypes."""
    model = build(tiny(form(name)), dtype=torch.bfloat16, stirred=0.1)
    logits, cache = model.extend(batch(tiny())[:, :-1], None)
    assert logits.dtype == torch.bfloat16
    assert all(past[1].dtype == torch.bfloat16 for past in cache.blocks)


@pytest.mark.parametrize("name", ["normalised", "learnable"])
def test_the_weight_of_the_first_values_learns_from_the_first_step(tiny, build, batch, name):
    model = build(tiny(form(name)))
    block = batch(tiny())
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    assert all(
        mix.first.grad.abs() > 1e-6 and mix.own.declared.role == "vector"
        for mix in mixes(model)
    )
