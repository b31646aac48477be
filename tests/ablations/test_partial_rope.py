"""Partial rotary positions: which channels turn with which, how fast, and that the others know no position."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.partial_rope import PartialRope
from ablab.core.errors import UserError
from ablab.core.fusion.places import flaw, places
from ablab.core.language.declare import Where
from ablab.core.model.layers import StageModule
from ablab.core.model.plan import plan_of
from ablab.core.parts.position import Rope
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
FORMS = ["leading", "half_truncate"]
SERVED = {"model__width": 64, "model__attention__head_dim": 32}
PLACE = Where(
    layer=1,
    layers=3,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    context=32,
    vocab=64,
    eps=1e-6,
)


def partial(**dose):
    return [{"partial_rope": dose}]


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw)


def fp64(tensor):
    return tensor.detach().double().numpy()


def stage(**dose):
    return StageModule(PartialRope(**dose).build(PLACE))


def pairs_of(form, dim, fraction, base):
    """(channel, its partner, radians a token) of each pair that turns."""
    turned = round(fraction * dim)
    if form == "leading":
        for i in range(turned // 2):
            yield i, i + turned // 2, base ** (-2 * i / turned)
    else:
        for i in range(turned // 2):
            yield i, i + dim // 2, base ** (-2 * i / dim)


def turned_by_hand(x, start, form, fraction, base):
    """Each pair as a complex number times exp(i angle).  x: [B,T,H,D], fp64."""
    out = x.copy()
    positions = start + np.arange(x.shape[1])
    for one, other, speed in pairs_of(form, x.shape[-1], fraction, base):
        whirl = np.exp(1j * positions * speed)[None, :, None]
        pair = (x[..., one] + 1j * x[..., other]) * whirl
        out[..., one] = pair.real
        out[..., other] = pair.imag
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("start", "base"), [(0, 1e4), (7, 1e4), (7, 100.0)])
def test_the_named_pairs_turn_by_their_angles_and_no_other_channel_moves(
    form, fraction, start, base
):
    made = stage(form=form, fraction=fraction, base=base)
    q = randn(2, 9, 4, 16)
    k = randn(2, 9, 2, 16, seed=1)
    for ours, x in zip(made(q, k, start), (q, k), strict=True):
        expected = turned_by_hand(fp64(x), start, form, fraction, base)
        assert abs(fp64(ours) - expected).max() < 2e-6
        still = set(range(16))
        for one, other, _ in pairs_of(form, 16, fraction, base):
            still -= {one, other}
        still = sorted(still)
        assert len(still) == 16 - round(fraction * 16)
        assert torch.equal(ours[..., still], x[..., still])


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_of_a_head_is_rope_bit_for_bit(tiny, build, batch, form):
    plain = build(tiny(), stirred=0.1)
    whole = build(tiny(partial(fraction=1.0, form=form)), stirred=0.1)
    tokens = batch(tiny())[:, :-1]
    ours, theirs = whole(tokens), plain(tokens)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_the_forms_differ_in_partners_and_in_speeds():
    leading = list(pairs_of("leading", 16, 0.5, 1e4))
    truncated = list(pairs_of("half_truncate", 16, 0.5, 1e4))
    assert [other - one for one, other, _ in leading] == [4] * 4
    assert [other - one for one, other, _ in truncated] == [8] * 4
    assert leading[-1][2] == pytest.approx(1e-3)
    assert truncated[-1][2] == pytest.approx(1e-4**0.375)
    q = randn(1, 5, 4, 16)
    ours, _ = stage(form="leading")(q, q, 3)
    theirs, _ = stage(form="half_truncate")(q, q, 3)
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_a_query_and_a_key_depend_on_their_distance_alone(form):
    made = stage(form=form)
    q = randn(1, 1, 1, 16)
    k = randn(1, 1, 1, 16, seed=1)

    def logit(query_at, key_at):
        turned_q, _ = made(q, q, query_at)
        _, turned_k = made(k, k, key_at)
        return (turned_q * turned_k).sum().item()

    assert logit(9, 4) == pytest.approx(logit(25, 20), abs=1e-5)
    assert abs(logit(9, 4) - logit(9, 5)) > 1e-3


def test_the_base_is_that_of_the_positions_it_replaces_unless_given(tiny):
    wide = {"model__attention__position": {"kind": "rope", "base": 500_000.0}}
    assert tiny(partial(), **wide).model.attention.position == PartialRope(base=500_000.0)
    assert tiny(partial()).model.attention.position == PartialRope(base=Rope.base)
    given = tiny(partial(base=77.0), **wide)
    assert given.model.attention.position == PartialRope(base=77.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[1] * 16, [5, 1, 1, 9]])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, batch, form, sizes):
    recipe = tiny(partial(form=form), model__attention__group=2)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    pieces = []
    cache = None
    for piece in tokens.split(sizes, dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - model(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_bf16_queries_and_keys_stay_bf16(form):
    q = randn(2, 5, 4, 16).bfloat16()
    ours, theirs = stage(form=form)(q, q, 0)
    assert ours.dtype == theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_it_owns_no_parameter_and_every_other_one_learns(tiny, build, batch, form):
    model = build(tiny(partial(form=form)), stirred=0.05)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in build(tiny()).named_parameters()]
    block = batch(tiny())
    model(block[:, :-1]).square().mean().backward()
    assert all(value.grad.abs().max() > 0 for value in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_run_learns(tiny, token_folder, form):
    trainer = Trainer(tiny(partial(form=form)), CPU, token_folder)
    before = trainer.evaluate()["val/loss"]
    while trainer.step < trainer.recipe.steps:
        trainer.advance()
    assert trainer.evaluate()["val/loss"] < before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("fraction", "said"),
    [
        (0.3, "fraction=0.3 is 2.4 channels of 8, and they turn in pairs; nearest: 0.25"),
        (0.125, "fraction=0.125 is 1 channels of 8, and they turn in pairs; nearest: 0.25"),
        (0.01, "fraction=0.01 is 0.08 channels of 8, and they turn in pairs; nearest: 0.25"),
    ],
)
def test_a_share_that_is_no_whole_pairs_is_refused_with_the_nearest(tiny, form, fraction, said):
    recipe = tiny(partial(fraction=fraction, form=form))
    with pytest.raises(UserError, match=f"^partial_rope.{said}$"):
        plan_of(recipe)


def test_a_third_of_a_head_is_whole_pairs_where_the_head_has_them():
    """A third is no binary number: a hair beside whole pairs is whole."""
    third = PartialRope(fraction=1 / 3).build(replace(PLACE, head_dim=96))
    assert StageModule(third).cos.shape == (32, 16)


# ---- kernels ----


def test_the_attention_kernel_steps_aside_from_leading_channels_and_says_so(tiny):
    recipe = tiny(partial(), **SERVED)
    said = "position is rotate_leading, which the kernel does not know"
    assert flaw("attention", recipe, "fp32") == said
    asked = settle(Runtime(device="cpu", dtype="fp32", kernels="triton"), 2)
    with pytest.raises(UserError, match=f"cannot serve the attention: {said}"):
        places(recipe, asked)


@pytest.mark.parametrize("dose", [{"form": "half_truncate"}, {"fraction": 1.0}])
def test_the_attention_kernel_serves_what_differs_in_tables_alone(tiny, dose):
    assert flaw("attention", tiny(partial(**dose), **SERVED), "fp32") == ""
