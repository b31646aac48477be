"""The transformer against formulas written again in fp64, and the promises of its trunk."""

import numpy as np
import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.language.declare import Where, params
from ablab.core.model.cost import cost_of
from ablab.core.model.decode import generate
from ablab.core.model.layers import StageModule
from ablab.core.model.objective import token_losses
from ablab.core.model.plan import plan_of
from ablab.core.parts.feedforward import SwiGLU
from ablab.core.parts.norm import rms_norm
from ablab.core.parts.position import Rope
from ablab.core.recipe.load import recipe_from

EVERY_STAGE = [
    "qk_norm",
    {"gating": {"init": "normal"}},
    {"value_residual": {"form": "normalised"}},
    "ln_scaling",
    {"mup": {"base_width": 16, "alpha_in": 2.0, "depth": "complete", "base_layers": 2}},
    "soft_cap",
]


def place(**sizes) -> Where:
    return Where(
        **{
            "layer": 0,
            "layers": 3,
            "width": 32,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 8,
            "context": 16,
            "vocab": 64,
            "eps": 1e-6,
        }
        | sizes
    )


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp64(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# ---- rotary positions ----


def turned_by(x: np.ndarray, start: int, base: float) -> np.ndarray:
    """x: [B,T,H,D] at positions start..: channels i and i + D/2 as a complex number, times its phase."""
    half = x.shape[-1] // 2
    position = np.arange(start, start + x.shape[1])
    angle = np.outer(position, base ** (-np.arange(half) / half))
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * angle)[None, :, None]
    return np.concatenate((z.real, z.imag), axis=-1)


@pytest.mark.parametrize("base", [10_000.0, 500.0])
@pytest.mark.parametrize("start", [0, 1900])
def test_rotary_multiplies_channel_pairs_i_and_i_plus_half_by_a_complex_phase(base, start):
    rope = StageModule(Rope(base).build(place(context=2048)))
    q = randn(2, 100, 4, 8)
    k = randn(2, 100, 2, 8, seed=1)
    for turned, x in zip(rope(q, k, start), (q, k), strict=True):
        expected = turned_by(fp64(x), start, base)
        # angles in fp32 would err by 1e-4
        assert np.abs(fp64(turned) - expected).max() < 2e-6


def test_rotary_preserves_norms():
    q = randn(2, 16, 4, 8)
    turned, _ = StageModule(Rope().build(place()))(q, randn(2, 16, 4, 8, seed=1), 0)
    assert (turned - q).abs().max() > 0.5
    sizes = (turned.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(*sizes, rtol=1e-6, atol=0)


def test_rotary_scores_depend_on_relative_position_alone():
    rope = StageModule(Rope().build(place(context=600)))
    q = randn(1, 16, 4, 8)
    k = randn(1, 16, 4, 8, seed=1)

    def scores(q_start, k_start):
        turned_q, _ = rope(q, k, q_start)
        _, turned_k = rope(q, k, k_start)
        return torch.einsum("bihd,bjhd->bhij", turned_q.double(), turned_k.double())

    here = scores(40, 3)
    assert (here - scores(540, 503)).abs().max() < 1e-5
    assert (here - scores(41, 3)).abs().max() > 0.1


# ---- blocks ----


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    mean_square = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + 1e-6) * gain


def test_swiglu_is_down_of_silu_gate_times_up():
    ffn = StageModule(SwiGLU().build(place()))
    gate_up, down = ffn.gate_up.weight, ffn.down.weight
    assert gate_up.shape == (128, 32) and down.shape == (32, 64)
    gate_up.data.copy_(randn(128, 32, seed=1))
    down.data.copy_(randn(32, 64, seed=2))
    x = randn(2, 5, 32)
    gate, up = np.split(fp64(x) @ fp64(gate_up).T, 2, axis=-1)
    expected = (silu(gate) * up) @ fp64(down).T
    error = np.abs(fp64(ffn(x)) - expected).max()
    assert error < 1e-3 * np.abs(expected).std()


def test_rms_norm_adds_eps_to_the_mean_square_and_applies_the_gain_last():
    x = 1e-3 * randn(4, 32)  # here eps is as large as x^2
    gain = randn(32, seed=1)
    expected = normed(fp64(x), fp64(gain))
    found = rms_norm(x, gain=gain, eps=1e-6)
    assert np.abs(fp64(found) - expected).max() < 1e-6


# ---- the whole baseline ----


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal softmax attention, a head at a time.  q: [B,T,H,D], k and v: [B,T,KV,D] -> [B,T,H,D]."""
    length, heads, dim = q.shape[1:]
    future = np.triu(np.full((length, length), -np.inf), 1)
    mixed = np.empty_like(q)
    for head in range(heads):
        serving = head // (heads // k.shape[2])
        pairs = q[:, :, head] @ k[:, :, serving].transpose(0, 2, 1)
        scores = pairs / np.sqrt(dim) + future
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        odds /= odds.sum(-1, keepdims=True)
        mixed[:, :, head] = odds @ v[:, :, serving]
    return mixed


def reference_logits(weights, tokens, heads, kv_heads, dim, layers):
    """The baseline decoder in fp64: pre-norm, rotary, causal attention, SwiGLU, residuals."""
    rows, length = tokens.shape
    table = weights["embedding.table"]
    x = table[tokens]
    for layer in range(layers):
        own = f"blocks.{layer}."
        w = {name.removeprefix(own): value for name, value in weights.items()}
        qkv = normed(x, w["attention.norm.gain"]) @ w["attention.qkv.weight"].T
        ends = [heads * dim, (heads + kv_heads) * dim]
        cut = np.split(qkv, ends, axis=-1)
        q, k, v = (part.reshape(rows, length, -1, dim) for part in cut)
        y = attended(turned_by(q, 0, 1e4), turned_by(k, 0, 1e4), v)
        x = x + y.reshape(rows, length, -1) @ w["attention.out.weight"].T
        inner = normed(x, w["ffn.norm.gain"]) @ w["ffn.inner.gate_up.weight"].T
        gate, up = np.split(inner, 2, axis=-1)
        x = x + (silu(gate) * up) @ w["ffn.inner.down.weight"].T
    return normed(x, weights["norm.gain"]) @ weights.get("readout.weight", table).T


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_baseline_forward_equals_an_fp64_reference(tiny, build, batch, group, tied):
    recipe = tiny(model__attention__group=group, model__tied=tied)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    weights = {name: fp64(value) for name, value in model.named_parameters()}
    expected = reference_logits(weights, tokens.numpy(), 4, 4 // group, 8, 3)
    assert expected.std() > 0.3
    assert np.abs(fp64(model(tokens)) - expected).max() < 1e-5


# ---- the trunk's promises ----


def test_future_tokens_never_change_past_logits(tiny, build, batch):
    recipe = tiny(EVERY_STAGE, model__attention__group=2)
    model, tokens = build(recipe, stirred=0.1), batch(recipe)[:, :-1]
    before = model(tokens)
    for cut in (1, 7, 15):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 64
        moved = (model(changed) - before).abs()
        assert (moved[:, :cut] == 0).all()
        assert moved[:, cut:].amin(-1).max() > 1e-4


def doubled(rows):
    """Each of two heads of 8 rows, twice."""
    return rows.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)


def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values(tiny, build, batch):
    grouped, full = build(tiny(model__attention__group=2), stirred=0.1), build(tiny())
    weights = dict(grouped.named_parameters())
    for name, value in full.named_parameters():
        source = weights[name].detach()
        if name.endswith("qkv.weight"):
            q, k, v = source.split((32, 16, 16))
            source = torch.cat([q, doubled(k), doubled(v)])
        value.data.copy_(source)
    tokens = batch(tiny())[:, :-1]
    assert (full(tokens) - grouped(tokens)).abs().max() < 1e-5


def test_tied_logits_read_the_table_and_its_gradient_is_the_sum_of_both_uses(
    tiny, build, batch
):
    tied = build(tiny(model__tied=True), stirred=0.1)
    untied = build(tiny(), stirred=0.1)
    theirs = dict(untied.named_parameters())
    assert theirs.keys() - dict(tied.named_parameters()).keys() == {"readout.weight"}
    for name, value in tied.named_parameters():
        theirs[name].data.copy_(value)
    untied.readout.weight.data.copy_(tied.embedding.table)
    block = batch(tiny())
    inputs = block[:, :-1]
    assert torch.equal(tied(inputs), untied(inputs))
    once, apart = gradients(tied, block), gradients(untied, block)
    uses = (apart["embedding.table"], apart["readout.weight"])
    assert all(use.abs().max() > 1e-3 for use in uses)
    torch.testing.assert_close(once["embedding.table"], sum(uses), rtol=0, atol=1e-7)


def gradients(model, block, forward=None):
    model.zero_grad()
    forward = model if forward is None else forward  # a compiled module has no truth value
    inputs, targets = block[:, :-1], block[:, 1:]
    token_losses(forward(inputs), targets).mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_recomputing_the_first_blocks_changes_no_bit_of_the_gradient(
    tiny, build, batch, blocks
):
    recipe = tiny(EVERY_STAGE)
    block = batch(recipe)
    kept = gradients(build(recipe, stirred=0.1), block)
    model = build(recipe, stirred=0.1, recompute=blocks)
    calls = []
    for i, one in enumerate(model.blocks):
        one.attention.qkv.register_forward_hook(lambda *_, i=i: calls.append(i))
    again = gradients(model, block)
    counts = [calls.count(i) for i in range(3)]
    assert counts == [2] * blocks + [1] * (3 - blocks)
    assert all(value.abs().max() > 0 for value in kept.values())
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # inductor: 30 s of g++
def test_recomputing_under_compilation_gives_the_eager_gradient(tiny, build, batch, backend):
    recipe = tiny(["value_residual", "qk_norm"], model__layers=2)
    model, block = build(recipe, stirred=0.1, recompute=2), batch(recipe)
    eager = gradients(build(recipe, stirred=0.1), block)
    compiled = gradients(model, block, torch.compile(model, backend=backend))
    for name, value in eager.items():
        size = max(value.abs().max(), 0.1)
        assert (compiled[name] - value).abs().max() < 1e-5 * size, name


@pytest.mark.parametrize("group", [1, 2])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, batch, group):
    recipe = tiny(EVERY_STAGE, model__attention__group=group)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    pieces, cache = [], None
    for piece in tokens.split([5, 1, 1, 3, 6], dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - model(tokens)).abs().max() < 1e-5


# ---- sampling ----


def test_greedy_generation_takes_the_argmax_of_the_full_forward_each_time(tiny, build, batch):
    recipe = tiny(EVERY_STAGE)
    model, start = build(recipe, stirred=0.1), batch(recipe)[:, :3]
    expected = start
    for _ in range(8):
        best = model(expected)[:, -1:].argmax(-1)
        expected = torch.cat((expected, best), dim=1)
    assert torch.equal(generate(model, start, 8, temperature=0), expected)
    assert torch.equal(generate(model, start, 8, temperature=0, seed=5), expected)


def test_sampling_repeats_under_one_seed_and_differs_under_another(tiny, build, batch):
    model, start = build(tiny()), batch(tiny())[:, :3]
    once, again, other = (generate(model, start, 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert torch.equal(once[:, :3], start)
    assert not torch.equal(once, other)


def test_generating_past_the_context_is_refused_in_numbers(tiny, build, batch):
    with pytest.raises(UserError, match=r"10 \+ 7 tokens exceed the model's context of 16"):
        generate(build(tiny()), batch(tiny())[:, :10], 7)


# ---- the plan ----


def test_the_70m_recipe_weighs_what_its_file_says():
    recipe = recipe_from(["base", "size/70m", "data/docs"])
    block, table = 4 * 768 * 768 + 3 * 768 * 2048, 32_000 * 768
    cost = cost_of(recipe)
    assert cost.matmul_parameters == 8 * block + table
    assert cost.parameters == 8 * block + 2 * table + (2 * 8 + 1) * 768
    assert round(cost.matmul_parameters / 1e6, 1) == 81.2
    assert round(cost.parameters / 1e6, 1) == 105.8
    attended = 8 * 3 * 2 * 2 * 768 * 384 // 2  # scores and mixing see T/2
    assert cost.flops_per_token == 6 * cost.matmul_parameters + attended
    assert round(cost.flops_per_token / 1e6, 1) == 501.4


def test_tying_saves_the_readout_but_not_its_flops(tiny):
    free, tied = cost_of(tiny()), cost_of(tiny(model__tied=True))
    assert free.parameters - tied.parameters == 64 * 32
    assert tied.flops_per_token == free.flops_per_token


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "treatment",
    [
        [],
        EVERY_STAGE,
        ["relu2", {"value_residual": {"form": "sparse"}}, {"gating": {"per": "elementwise"}}],
    ],
)
def test_the_plan_names_the_very_parameters_that_are_built(tiny, build, treatment, tied):
    recipe = tiny(treatment, model__tied=tied)
    model = build(recipe)
    planned = dict(params(plan_of(recipe)))
    built = dict(model.named_parameters())
    assert planned == {name: value.declared for name, value in built.items()}
    shapes = {name: tuple(value.shape) for name, value in built.items()}
    assert shapes == {name: one.shape for name, one in planned.items()}
    assert cost_of(recipe).parameters == sum(value.numel() for value in built.values())
