"""Sliding window: a short layer's query sees the last few keys, a long layer's all; the cost counts what is seen."""

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.sliding_window import windowed
from ablab.core.errors import UserError
from ablab.core.fusion.places import flaw, places
from ablab.core.model.cost import cost_of, keys_seen
from ablab.core.model.plan import plan_of, wheres
from ablab.core.parts.mixing import Causal, causal
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
MIXES = {"S": windowed, "L": causal}
EVERY_LAYER = {"pattern": "S", "last": "pattern"}


def windows(**dose):
    return [{"sliding_window": dose}]


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw)


def fp64(tensor):
    return tensor.detach().double().numpy()


def masked_softmax(q, k, v, start, window):
    """Query by query over the keys that it may see.  q: [B,H,T,D], k and v: [B,KV,S,D], fp64."""
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for t in range(q.shape[2]):
            position = start + t
            seen = slice(max(0, position - window + 1), position + 1)
            keys = k[:, head // group, seen]
            values = v[:, head // group, seen]
            logits = np.einsum("bd,bsd->bs", q[:, head, t], keys) / q.shape[-1] ** 0.5
            odds = np.exp(logits - logits.max(-1, keepdims=True))
            odds /= odds.sum(-1, keepdims=True)
            out[:, head, t] = np.einsum("bs,bsd->bd", odds, values)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 3, 9, 20])
@pytest.mark.parametrize("start", [0, 1, 6])
def test_each_query_mixes_the_last_keys_up_to_its_own(kv_heads, window, start):
    q = randn(2, 4, 9, 8)
    k = randn(2, kv_heads, start + 9, 8, seed=1)
    v = randn(2, kv_heads, start + 9, 8, seed=2)
    ours = windowed(q, k, v, {}, start, window=window)
    expected = masked_softmax(fp64(q), fp64(k), fp64(v), start, window)
    assert abs(fp64(ours) - expected).max() < 1e-6


def test_a_window_of_the_whole_row_is_causal_attention():
    q, k, v = (randn(2, 4, 9, 8, seed=seed) for seed in range(3))
    ours = windowed(q, k, v, {}, 0, window=9)
    assert (ours - causal(q, k, v, {}, 0)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("layers", "dose", "letters"),
    [
        (5, {}, "SSSLL"),
        (8, {}, "SSSLSSSL"),
        (4, {"pattern": "S"}, "SSSL"),
        (5, {"pattern": "SL"}, "SLSLL"),
        (5, {"pattern": "LSS"}, "LSSLL"),
        (5, {"pattern": "LSS", "last": "pattern"}, "LSSLS"),
        (3, EVERY_LAYER, "SSS"),
    ],
)
def test_the_pattern_is_tiled_and_the_last_layer_is_long_unless_it_says_so(
    tiny, layers, dose, letters
):
    plan = plan_of(tiny(windows(**dose), model__layers=layers))
    functions = [block.attention.mix.function for block in plan.blocks]
    assert functions == [MIXES[letter] for letter in letters]


@pytest.mark.parametrize(("context", "window"), [(16, 4), (18, 5), (384, 96), (2, 1)])
def test_the_window_is_a_quarter_of_the_context_unless_it_is_given(tiny, context, window):
    quarter = plan_of(tiny(windows(), data__context=context, budget__tokens=10_000))
    assert quarter.blocks[0].attention.mix.bound == {"window": window}
    given = plan_of(tiny(windows(window=7)))
    assert given.blocks[0].attention.mix.bound == {"window": 7}


def test_through_two_short_layers_a_token_reaches_no_further_than_two_windows(
    tiny, build, batch
):
    recipe = tiny(windows(window=3, **EVERY_LAYER), model__layers=2)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 64
    difference = model(changed) - model(tokens)
    moved = difference.abs().amax((0, 2))
    assert moved.gt(0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("dose", [{}, EVERY_LAYER, {"pattern": "SL", "window": 1}])
@pytest.mark.parametrize("sizes", [[1] * 16, [5, 1, 1, 9], [15, 1]])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, batch, dose, sizes):
    recipe = tiny(windows(**dose), model__attention__group=2)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    pieces = []
    cache = None
    for piece in tokens.split(sizes, dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - model(tokens)).abs().max() < 1e-5


def test_it_owns_no_parameter_and_every_other_one_learns(tiny, build, batch):
    model = build(tiny(windows()), stirred=0.05)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in build(tiny()).named_parameters()]
    block = batch(tiny())
    model(block[:, :-1]).square().mean().backward()
    assert all(value.grad.abs().max() > 0 for value in model.parameters())


def test_a_run_learns(tiny, token_folder):
    trainer = Trainer(tiny(windows()), CPU, token_folder)
    before = trainer.evaluate()["val/loss"]
    while trainer.step < trainer.recipe.steps:
        trainer.advance()
    assert trainer.evaluate()["val/loss"] < before


# ---- what is refused ----


@pytest.mark.parametrize(
    ("dose", "said"),
    [
        ({"window": 16}, r"window=16 hides no key of a context of 16; use at most 15$"),
        ({"pattern": "L"}, r"pattern=L with last=long makes none of 3 layers short; begin it"),
        ({"pattern": "LLS"}, r"pattern=LLS with last=long makes none of 3 layers short"),
    ],
)
def test_what_would_be_causal_attention_is_refused(tiny, dose, said):
    with pytest.raises(UserError, match=f"^sliding_window.{said}"):
        plan_of(tiny(windows(**dose)))


def test_a_pattern_of_other_letters_is_refused(tiny):
    with pytest.raises(UserError, match="pattern='SSX' must be letters S and L, such as SSSL$"):
        tiny(windows(pattern="SSX"))


# ---- what it costs ----


@pytest.mark.parametrize("window", [1, 5, 15])
def test_the_keys_seen_are_the_mean_over_a_row_with_half_of_the_own_key(tiny, window):
    """As T/2 is of causal attention: (T + 1)/2, less half a key, of which a window holds w of T."""
    recipe = tiny(windows(window=window))
    context = recipe.data.context
    mean = np.mean([min(t, window) for t in range(1, context + 1)])
    short, _, long = wheres(recipe.model, recipe.data.vocab, context)
    mix = recipe.model.attention.mix
    assert keys_seen(mix, short) == pytest.approx(mean - window / (2 * context))
    assert keys_seen(mix, long) == keys_seen(Causal(), long) == context / 2


def test_flops_fall_by_the_scores_and_the_mixing_of_the_hidden_keys(tiny):
    plain = cost_of(tiny())
    narrow = cost_of(tiny(windows(window=4)))
    assert narrow.parameters == plain.parameters
    hidden = 2 * (8 - (4 - 4 * 4 / 32))  # two short layers; T/2 = 8 keys, w - w^2/2T = 3.5
    forward_and_backward = 3
    flops_a_key = 2 * 2 * 32  # a multiply-add a channel, in scores and in mixing
    saved = forward_and_backward * flops_a_key * hidden
    assert plain.flops_per_token - narrow.flops_per_token == saved


# ---- kernels ----


def test_the_attention_kernel_steps_aside_and_says_so_and_the_others_serve(tiny):
    recipe = tiny(windows(), model__width=64, model__attention__head_dim=32)
    assert (
        flaw("attention", recipe, "fp32") == "mix is windowed, which the kernel does not know"
    )
    assert flaw("ffn", recipe, "fp32") == flaw("loss", recipe, "fp32") == ""
    asked = settle(Runtime(device="cpu", dtype="fp32", kernels="triton"), 2)
    with pytest.raises(UserError, match="cannot serve the attention: mix is windowed"):
        places(recipe, asked)
