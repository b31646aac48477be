"""Kernels in their places: the same function of the same parameters as the stages that they replace."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.fusion import feedforward
from ablab.core.fusion import places as fuse
from ablab.core.fusion.optimizer import FusedMove
from ablab.core.language.declare import Param, Stage
from ablab.core.language.offers import Factor, LogitFactor, only
from ablab.core.language.part import Part
from ablab.core.model.init import initialise
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.transformer import Transformer
from ablab.core.parts.norm import multiply
from ablab.core.recipe.edit import append, edit
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.store.record import Record
from ablab.core.train.run import run
from ablab.core.train.trainer import Trainer

SHAPE = {
    "model__width": 64,
    "model__attention__head_dim": 32,
    "model__layers": 3,
    "data__context": 24,
    "data__batch": 2,
    "budget__tokens": 4 * 48,
}
STACK = ["qk_norm", {"gating": {"per": "head"}}, "value_residual", "z_loss"]
ATTENTION = {  # treatments that differ in what the attention kernel holds
    "nothing": [],
    "channel": ["qk_norm"],
    "scalar": [{"qk_norm": {"gain": "scalar", "scale": 1.4}}],
    "no gain": [{"qk_norm": {"gain": "none"}}],
    "normalised": ["value_residual"],
    "learnable": [{"value_residual": {"form": "learnable"}}],
    "constant": [{"value_residual": {"form": "constant"}}],
    "sparse": [{"value_residual": {"form": "sparse"}}],
    "gate": [{"gating": {"per": "head"}}],
    "sparse gate": [{"gating": {"per": "first_channels"}}],
    "all": STACK,
}
NORMS = {  # treatments that differ in what stands around the branches
    "nothing": [],
    "factor": ["ln_scaling"],
    "multiplied branches": [{"mup": {"base_layers": 1, "depth": "sqrt"}}],
    "carry": ["value_residual", "ln_scaling"],
    "stages between blocks": ["unet_skips", {"x0_lambdas": {"start": "nanochat"}}],
}
LOSS = {
    "nothing": [],
    "z": [{"z_loss": {"weight": 0.01}}],
    "cap": [{"soft_cap": {"cap": 2.0}}],
    "rational": [{"soft_cap": {"cap": 2.0, "form": "rational"}}],
    "multiplier": [{"mup": {"base_width": 32, "readout": "multiplier"}}],
    "all": [{"mup": {"readout": "multiplier"}}, {"soft_cap": {"cap": 2.0}}, "z_loss"],
}
ASKED = settle(Runtime(device="cpu", dtype="fp32", kernels="triton"), 2)
cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


def evaluated(recipe, kernels: set[str]) -> dict[str, torch.Tensor]:
    """Loss, nats and every gradient on one batch, parameters stirred."""
    model = Transformer(recipe, plan=fuse.plan_with(kernels, recipe))
    initialise(model, recipe)
    draw = torch.Generator().manual_seed(3)
    for value in model.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=draw)
    block = torch.randint(
        recipe.data.vocab, (recipe.data.batch, recipe.data.context + 1), generator=draw
    )
    descend, _ = heads_of(model)
    loss, nats = of_rows(model, descend)(block)
    (loss / 7).backward()
    return {"loss": loss.detach(), "nats": nats} | {
        name: value.grad for name, value in model.named_parameters()
    }


def far(ours, theirs) -> dict[str, float]:
    """Names whose relative difference is above what fp32 sums in another order leave."""
    error = {
        name: ((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)).item()
        for name in theirs
    }
    return {name: size for name, size in error.items() if not size < 2e-5}


@cpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("treatment", LOSS)
def test_the_fused_loss_is_the_same_function_of_the_same_parameters(tiny, treatment, tied):
    if tied and treatment in ("multiplier", "all"):
        pytest.skip("a tied head takes its multiplier from mup alone")
    recipe = tiny(LOSS[treatment], **SHAPE, model__tied=tied)
    assert fuse.places(recipe, ASKED)["loss"].kernel
    ours, theirs = evaluated(recipe, {"loss"}), evaluated(recipe, set())
    assert ours.keys() == theirs.keys() and far(ours, theirs) == {}


@cpu
@pytest.mark.parametrize("form", ["e5m2", "e4m3"])
def test_the_fused_loss_in_8_bits_reads_the_same_logits_and_its_gradients_are_near(tiny, form):
    """A step of e5m2 is a quarter of a number at most, of e4m3 an eighth; the scale is another than in torch."""
    stack = [{"soft_cap": {"cap": 2.0}}, "z_loss"]
    readout = {"fp8": {"where": "readout", "gradient": form}}
    recipe = tiny([*stack, readout], **SHAPE)
    assert fuse.places(recipe, ASKED)["loss"].kernel
    ours = evaluated(recipe, {"loss"})
    theirs = evaluated(recipe, set())
    plain = evaluated(tiny(stack, **SHAPE), set())
    assert not far(ours, theirs).keys() & {"loss", "nats"}
    assert far(ours, plain).keys() == plain.keys()
    noise = {
        name: ((ours[name] - exact).norm() / exact.norm()).item()
        for name, exact in plain.items()
    }
    assert max(noise.values()) < {"e5m2": 0.12, "e4m3": 0.08}[form]


@cpu
def test_a_readout_that_multiplies_in_a_way_of_its_own_makes_the_kernel_step_aside(
    tiny, monkeypatch
):
    from ablab.ablations.interventions.fp8 import FP8

    def product(self, path, linear):
        return (lambda x, weight: x @ weight.T) if path == "readout" else None

    monkeypatch.setattr(FP8, "product", product)
    recipe = tiny([{"fp8": {"where": "both", "gradient": "e4m3"}}], **SHAPE)
    said = "the readout multiplies by fp8, which the kernel does not know"
    assert fuse.flaw("loss", recipe, "fp32") == said


@cpu
@pytest.mark.parametrize("treatment", ATTENTION)
def test_the_fused_attention_is_the_same_function_of_the_same_parameters(tiny, treatment):
    recipe = tiny(ATTENTION[treatment], **SHAPE)
    assert fuse.places(recipe, ASKED)["attention"].kernel
    ours, theirs = evaluated(recipe, {"attention"}), evaluated(recipe, set())
    assert ours.keys() == theirs.keys() and far(ours, theirs) == {}


@cpu
def test_the_fused_feed_forward_is_the_same_function_of_the_same_parameters(tiny, monkeypatch):
    from ablab.kernels import swiglu

    called, kernel = [], swiglu.swiglu
    monkeypatch.setattr(
        swiglu, "swiglu", lambda packed: called.append(packed.shape) or kernel(packed)
    )
    recipe = tiny([], **SHAPE)
    assert fuse.places(recipe, ASKED)["ffn"].kernel
    assert (
        far(evaluated(recipe, {"ffn"}), evaluated(recipe, set())) == {}
        and len(called) == recipe.model.layers
    )


@cpu
@pytest.mark.parametrize(
    ("dose", "whole"),
    [
        ({"gradient": "e4m3"}, True),
        ({"weight_gradient": "wide"}, True),
        ({"where": "readout"}, False),
    ],
)
def test_a_feed_forward_whose_maps_multiply_in_8_bits_is_one_kernel_where_gradients_are_wanted(
    tiny, monkeypatch, dose, whole
):
    """With scales of its own, so it errs by other roundings, and no more than the maps by themselves."""
    from ablab.kernels import fp8_swiglu

    called = []
    kernel = fp8_swiglu.fp8_swiglu

    def noted(x, gate_up, down, *how):
        called.append(how[:2])
        return kernel(x, gate_up, down, *how)

    monkeypatch.setattr(fp8_swiglu, "fp8_swiglu", noted)
    recipe = tiny([{"fp8": dose}], **SHAPE)
    kernels = fuse.served(recipe, ASKED) & {"ffn", "ffn_fp8"}
    ours = evaluated(recipe, kernels)
    theirs = evaluated(recipe, set())
    how = (dose.get("gradient", "e5m2"), dose.get("weight_gradient", "fp8"))
    assert called == [how] * recipe.model.layers * whole
    exact = evaluated(tiny([], **SHAPE), set())

    def error(found):
        return torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()

    assert ours.keys() == theirs.keys() == exact.keys()
    assert 0 < error(ours) < 1.2 * error(theirs)
    with torch.no_grad():
        model = Transformer(recipe, plan=fuse.plan_with(kernels, recipe))
        initialise(model, recipe)
        model(torch.zeros(1, 8, dtype=torch.long))
    assert len(called) == recipe.model.layers * whole


@cpu
@pytest.mark.parametrize("offered", [True, False])
def test_a_norm_that_bounds_its_rows_lets_the_feed_forward_cast_them_as_they_are_made(
    tiny, monkeypatch, offered
):
    """Not where a stage follows it that says nothing of its factor: then they are measured."""
    from ablab.kernels import fp8_swiglu

    seen = []
    kernel = fp8_swiglu.fp8_swiglu

    def noted(x, gate_up, down, gradient, weights, longest):
        seen.append((x.detach(), longest))
        return kernel(x, gate_up, down, gradient, weights, longest)

    monkeypatch.setattr(fp8_swiglu, "fp8_swiglu", noted)
    if not offered:
        monkeypatch.setattr(feedforward, "Factor", LogitFactor)
    recipe = tiny(["ln_scaling", "fp8"], **SHAPE | {"model__layers": 2})
    evaluated(recipe, {"ffn_fp8"})
    known = [longest is not None for _, longest in seen]
    assert known == [True, offered]  # the first norm has no factor
    for x, longest in seen[: 1 + offered]:
        length = x.norm(dim=-1).amax()
        assert length <= longest < 2 * length


@cpu
def test_projections_that_multiply_in_8_bits_cast_each_operand_once(tiny, monkeypatch):
    """The same numbers, in other layouts; no kernel for wide gradients of weights, whose operands stay as they are."""
    from ablab.kernels import fp8_projection

    called = []
    kernel = fp8_projection.fp8_projection

    def noted(x, weight, gradient):
        called.append((*weight.shape, gradient))
        return kernel(x, weight, gradient)

    monkeypatch.setattr(fp8_projection, "fp8_projection", noted)
    shape = SHAPE | {"model__layers": 1}
    recipe = tiny([{"fp8": {"where": "attention", "gradient": "e4m3"}}], **shape)
    assert fuse.places(recipe, ASKED)["attention_fp8"].kernel
    theirs = evaluated(recipe, set())
    assert not called
    ours = evaluated(recipe, {"attention_fp8"})
    assert called == [(192, 64, "e4m3"), (64, 64, "e4m3")]
    exact = evaluated(tiny([], **shape), set())

    def error(found):
        return torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()

    assert 0 < error(ours) < 1.2 * error(theirs)
    wide = tiny([{"fp8": {"where": "attention", "weight_gradient": "wide"}}], **SHAPE)
    assert "attention_fp8" not in fuse.places(wide, ASKED)
    odd = tiny(
        [{"fp8": {"where": "attention"}}], model__width=24, model__attention__head_dim=12
    )
    assert fuse.flaw("attention_fp8", odd, "fp32") == (
        "8-bit products take sides in multiples of 16, and a projection of the attention has 24"
    )


@cpu
def test_a_feed_forward_in_epilogues_serves_where_gradients_are_wanted_alone(tiny, monkeypatch):
    """Their formula in its place: the kernels have tests of their own, on a GPU."""
    from ablab.kernels import swiglu, swiglu_epilogue

    called = []

    def formula(x, gate_up, down):
        called.append(x.shape)
        return swiglu.reference(x @ gate_up.T) @ down.T

    monkeypatch.setattr(swiglu_epilogue, "feed_forward", formula)
    recipe = tiny([], **SHAPE)
    kernels = {"ffn", "ffn_epilogue"}
    assert far(evaluated(recipe, kernels), evaluated(recipe, set())) == {}
    assert len(called) == recipe.model.layers
    with torch.no_grad():
        model = Transformer(recipe, plan=fuse.plan_with(kernels, recipe))
        initialise(model, recipe)
        model(torch.zeros(1, 8, dtype=torch.long))
    assert len(called) == recipe.model.layers


@pytest.fixture
def on_an_h100(monkeypatch):
    """asked -> the settled runtime of a card that is not there."""
    monkeypatch.setattr(fuse, "_card", lambda: fuse.Card("NVIDIA H100 80GB HBM3", (9, 0)))
    return lambda asked: replace(ASKED, kernels=asked, dtype="bf16", device="cuda")


def test_a_library_that_is_not_installed_is_missed_only_where_its_place_is_named(
    tiny, monkeypatch, on_an_h100
):
    monkeypatch.setattr(fuse, "OPTIONAL", {"ffn_epilogue": "no_such_library"})
    recipe = tiny([], **SHAPE)
    for asked in ("auto", "same", "triton", "torch", ("ffn",)):
        assert "ffn_epilogue" not in fuse.places(recipe, on_an_h100(asked))
    said = "cannot serve the ffn_epilogue: no_such_library is not installed; pip install 'ablab"
    with pytest.raises(UserError, match=said):
        fuse.places(recipe, on_an_h100(("ffn_epilogue",)))


def test_a_library_that_is_installed_serves_what_it_can_and_is_named(
    tiny, monkeypatch, on_an_h100
):
    monkeypatch.setattr(fuse, "OPTIONAL", {"ffn_epilogue": "msgspec"})
    monkeypatch.setattr("ablab.kernels.swiglu_epilogue.LIBRARY", "msgspec")
    monkeypatch.setattr(fuse, "FASTER", {(9, 0): {"ffn_epilogue": lambda recipe: True}})

    def served(recipe, asked="auto"):
        return fuse.places(recipe, on_an_h100(asked)).get("ffn_epilogue")

    assert served(tiny([], **SHAPE)) == fuse.Place(True, "msgspec")
    assert served(tiny([], **SHAPE), "triton") is None
    for other in ("fp8", "relu2"):
        assert served(tiny([other], **SHAPE)) is None
    odd = served(tiny([], **SHAPE, model__ffn={"kind": "swiglu", "multiple": 102}))
    assert odd and odd.flaw and "multiples of 8, and the feed-forward has 204" in odd.why
    with pytest.raises(UserError, match="compute capability 9.0; use runtime.kernels=auto"):
        monkeypatch.setattr(fuse, "_card", lambda: fuse.Card("another", (8, 0)))
        served(tiny([], **SHAPE), ("ffn_epilogue",))


@cpu
def test_grouped_heads_and_everything_at_once_too(tiny):
    recipe = tiny(
        [*STACK, {"soft_cap": {"cap": 2.0}}],
        **SHAPE | {"model__width": 128, "model__attention__group": 2},
    )
    assert far(evaluated(recipe, {"attention", "ffn", "loss"}), evaluated(recipe, set())) == {}


@cpu
@pytest.mark.parametrize("treatment", NORMS)
def test_the_fused_stream_is_the_same_function_of_the_same_parameters(tiny, joined, treatment):
    recipe = tiny(NORMS[treatment], **SHAPE)
    assert fuse.places(recipe, ASKED)["residual"].kernel
    theirs = evaluated(recipe, set())
    assert not joined
    ours = evaluated(recipe, {"residual"})
    # the first block's attention, and whatever a stage stands before, read a stream that has joined
    apart = recipe.model.layers if recipe.model.on_block else 1
    assert len(joined) == 2 * recipe.model.layers - apart
    assert ours.keys() == theirs.keys() and far(ours, theirs) == {}


@pytest.fixture
def joined(monkeypatch):
    """A factor for each sum that the kernel has made."""
    from ablab.kernels import residual_norm

    factors = []
    kernel = residual_norm.residual_norm

    def noted(x, y, gain, eps, factor):
        factors.append(factor)
        return kernel(x, y, gain, eps, factor)

    monkeypatch.setattr(residual_norm, "residual_norm", noted)
    return factors


@dataclass(frozen=True)
class LearnedFactor(Part):
    """A part of somebody's own; not registered."""

    kind: str = "learned_factor"

    def build(self, where) -> Stage:
        return Stage(
            multiply, offer=Factor(only("factor")), factor=Param((1,), "vector", fill=1.0)
        )


@cpu
def test_a_factor_that_is_learned_is_left_to_the_stage_and_keeps_its_gradient(tiny, joined):
    recipe = edit(tiny([], **SHAPE), "model.on_norm", append(LearnedFactor()))
    theirs = evaluated(recipe, set())
    ours = evaluated(recipe, {"residual"})
    assert len(joined) == 2 * recipe.model.layers - 1 and set(joined) == {None}
    learned = [name for name in theirs if "learned_factor" in name]
    assert learned and all(theirs[name].any() for name in learned)
    assert far(ours, theirs) == {}


@cpu
def test_a_model_with_kernels_compiles_as_one_graph_to_the_same_bits(tiny):
    """One block keeps its activations, two are recomputed."""
    recipe = tiny([*STACK, "ln_scaling"], **SHAPE | {"data__context": 16})
    plan = fuse.plan_with({"attention", "residual", "loss"}, recipe)
    model = Transformer(recipe, recompute=2, plan=plan)
    initialise(model, recipe)
    descend, _ = heads_of(model)
    loss, seen = of_rows(model, descend), []
    block = torch.randint(
        recipe.data.vocab, (2, 17), generator=torch.Generator().manual_seed(1)
    )
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        total, nats = function(block)
        total.backward()
        seen.append([total.detach(), nats, *(value.grad for value in model.parameters())])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_what_a_kernel_cannot_serve_is_named_and_torch_serves_it(tiny, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fuse, "_card", lambda: fuse.Card("this GPU", (1, 0)))
    faster = {place: lambda recipe: True for place in fuse.REWRITES}
    monkeypatch.setattr(fuse, "FASTER", {(1, 0): faster})
    cases = [
        (tiny(), "attention", "head_dim=8: the attention kernel serves 32, 64, 128"),
        (
            tiny([{"gating": {"per": "elementwise"}}], **SHAPE),
            "attention",
            "64 gates for 2 heads; the kernel knows one a head",
        ),
        (
            tiny([{"relu2": {}}], **SHAPE),
            "ffn",
            "the feed-forward is relu2, which the kernel does not know",
        ),
        (
            tiny(["fp8"], **SHAPE, model__ffn={"kind": "swiglu", "multiple": 100}),
            "ffn_fp8",
            "8-bit products take sides in multiples of 16, and the feed-forward has 200",
        ),
        (
            tiny([{"fp8": {"where": "both"}}], **SHAPE, data__vocab=72),
            "loss",
            "8-bit products need sides of multiples of 16, and the vocabulary is 72",
        ),
        (
            tiny(["parallel_block"], **SHAPE),
            "residual",
            "block is parallel, which the kernel does not know",
        ),
    ]
    for recipe, place, said in cases:
        auto = fuse.places(recipe, replace(ASKED, kernels="auto", dtype="bf16"))[place]
        assert (auto.kernel, auto.flaw, auto.why) == (False, True, f"torch: {said}")
        with pytest.raises(
            UserError,
            match=f"runtime.kernels=triton cannot serve the {place}: {said}; use runtime.kernels=auto",
        ):
            fuse.places(recipe, ASKED)
    for served in ([], ["fp8"], [{"fp8": {"where": "both"}}]):
        assert fuse.places(tiny(served, **SHAPE), replace(ASKED, kernels="auto", dtype="bf16"))[
            "loss"
        ].kernel


def test_auto_takes_no_kernel_that_was_not_measured_to_be_faster_here(tiny, monkeypatch):
    monkeypatch.setattr(fuse, "FASTER", {})
    monkeypatch.setattr(fuse, "OPTIONAL", {"ffn_epilogue": "no_such_library"})
    monkeypatch.setattr(fuse, "_card", lambda: fuse.Card("this GPU", (1, 0)))
    held = fuse.places(
        tiny(["muon"], **SHAPE), replace(ASKED, kernels="auto", dtype="bf16", device="cuda")
    )
    assert list(held) == ["attention", "ffn", "residual", "loss", "newton_schulz", "optimizer"]
    assert {(one.kernel, one.flaw, one.why) for one in held.values()} == {
        (False, False, "torch: the kernel is not known to be faster on this GPU")
    }


@pytest.mark.parametrize(
    ("shape", "served"),
    [
        ({}, True),
        ({"model__attention__head_dim": 128}, False),
        ({"data__context": 4096}, False),
    ],
    ids=str,
)
def test_auto_takes_a_kernel_at_the_shapes_where_it_was_measured_alone(
    tiny, monkeypatch, shape, served
):
    card = fuse.Card("NVIDIA H100 80GB HBM3", (9, 0))
    monkeypatch.setattr(fuse, "_card", lambda: card)
    recipe = tiny(
        [],
        **{
            "model__width": 768,
            "model__attention__head_dim": 64,
            "data__context": 384,
            "budget__tokens": 10**6,
        }
        | shape,
    )
    held = fuse.places(recipe, replace(ASKED, kernels="auto", dtype="bf16", device="cuda"))
    assert held["attention"].kernel is served and held["ffn"].kernel
    assert (
        held["attention"].why == "triton"
    ) is served and "at this shape on NVIDIA H100" in held["attention"].why + held["loss"].why


def test_auto_takes_the_8_bit_kernels_that_a_card_has_compared(tiny, monkeypatch):
    monkeypatch.setattr(fuse, "_card", lambda: fuse.Card("NVIDIA H100 80GB HBM3", (9, 0)))
    large = {"model__width": 768, "data__vocab": 32_000, "budget__tokens": 10**6}
    auto = replace(ASKED, kernels="auto", dtype="bf16", device="cuda")
    held = fuse.places(tiny([{"fp8": {"where": "all"}}], **SHAPE | large), auto)
    assert held["loss"].kernel and held["ffn_fp8"].kernel
    assert held["attention_fp8"].why.startswith("torch: the kernel is not known to be faster")


@cpu
def test_triton_without_a_gpu_and_without_the_interpreter_is_refused(tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        UserError,
        match="runtime.kernels=triton needs a CUDA GPU, and there is none; use runtime.kernels=auto",
    ):
        settled = settle(Runtime(device="cpu", kernels="triton"), 2)
        fuse.places(tiny(), settled)
    assert fuse.places(tiny(), replace(ASKED, kernels="auto"))["loss"].why == "torch: no GPU"


@cpu
def test_a_run_by_kernels_follows_the_run_by_torch_and_says_what_served_it(
    tiny, token_folder, tmp_path
):
    recipe, curves, weights = (
        tiny(
            [*STACK, "muon", "normuon"],
            **SHAPE | {"model__layers": 2, "data__held_out": 48, "budget__tokens": 3 * 48},
        ),
        {},
        set(),
    )
    for kernels in ("torch", "triton"):
        record = Record(tmp_path / kernels)
        result = run(
            recipe,
            Runtime(device="cpu", kernels=kernels, log_every=1, evaluations=1),
            token_folder,
            record,
        )
        assert result.status == "finished" and record.about()["kernels"]["attention"] == {
            "torch": "torch: runtime.kernels=torch"
        }.get(kernels, kernels)
        assert result.kernels == record.about()["kernels"] == record.result().kernels
        trainer = Trainer(recipe, Runtime(device="cpu", kernels=kernels), token_folder)
        assert isinstance(trainer.optimizer.move, FusedMove) is (kernels == "triton")
        weights.add(result.weights)
        curves[kernels] = torch.tensor([line["train/loss"] for line in record.metrics()])
    assert len(curves["torch"]) == 3 and (curves["triton"] - curves["torch"]).abs().max() < 2e-4
    assert len(weights) == 2  # another order of sums: the kernels did run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "names",
    [list(names) for n in range(4) for names in itertools.combinations(STACK[:3], n)],
    ids=str,
)
def test_on_a_gpu_two_hundred_steps_follow_the_torch_path_within_seed_noise(
    tiny, token_folder, names
):
    shape = SHAPE | {"data__batch": 8, "data__context": 32, "budget__tokens": 200 * 256}

    def last(kernels, seed):
        recipe = tiny([*names, "z_loss", "muon", "normuon"], **shape, seed=seed)
        trainer = Trainer(
            recipe,
            Runtime(device="cuda", dtype="bf16", compile=False, kernels=kernels),
            token_folder,
        )
        for _ in range(recipe.steps):
            trainer.advance()
        return trainer.evaluate()["val/loss"]

    theirs = [last("torch", seed) for seed in range(3)]
    assert abs(last("triton", 0) - theirs[0]) <= max(theirs) - min(theirs)
