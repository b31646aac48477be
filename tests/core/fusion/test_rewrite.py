"""A kernel takes what it computes, or steps aside: it drops no stage, in no slot, known or new."""

import functools
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ablab.ablations.checks.liveness import trace
from ablab.core.fusion.optimizer import claimed_chain
from ablab.core.fusion.places import KERNELS, flaw, plan_with
from ablab.core.fusion.rewrite import Region, StepsAside
from ablab.core.language.declare import Stage
from ablab.core.language.offers import CausalMix, LogitFactor, only
from ablab.core.language.part import Part
from ablab.core.model import plan as plans
from ablab.core.model import transformer
from ablab.core.model.init import initialise
from ablab.core.model.layers import StageModules
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.plan import AttentionPlan, plan_of
from ablab.core.model.transformer import Attention, Transformer
from ablab.core.parts.transforms import Adam, Decay, Momentum, Orthogonalize
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.recipe import Chain

SHAPE = {"model__width": 32, "model__attention__head_dim": 32}
cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


def served(recipe) -> frozenset[str]:
    return frozenset(place for place in KERNELS if not flaw(place, recipe, "fp32"))


def nats(recipe, kernels) -> torch.Tensor:
    """Cross-entropy of each token of one row."""
    model = Transformer(recipe, plan=plan_with(kernels, recipe))
    initialise(model, recipe)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(recipe.data.vocab, (1, recipe.data.context + 1), generator=draw)
    _, measure = heads_of(model)
    with torch.no_grad():
        return of_rows(model, measure)(rows)


# ---- a stage that no kernel knows, wherever it stands ----


def half(x, *others):
    """Halves what goes through it; whatever else comes with it goes on as it is."""
    return (x / 2, *others) if others else x / 2


def half_alone(y, *read):
    return y / 2


def half_heads(q, k, v, carry, start):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) / 2


def half_loss(features, logits, targets, read):
    return features.float().square().mean() / 2


@dataclass(frozen=True)
class Halving(Part):
    """A part of somebody's own, without an offer; not registered."""

    function: str
    kind: str = "halving"

    def build(self, where) -> Stage:
        return Stage(globals()[self.function])


PLACES = {  # path -> function, who must step aside, with which words
    "model.attention.on_qk": ("half", "attention", "on_qk holds halving"),
    "model.attention.on_values": ("half", "attention", "on_values holds halving"),
    "model.attention.on_heads": ("half_alone", "attention", "on_heads holds halving"),
    "model.attention.mix": ("half_heads", "attention", "mix is half_heads"),
    "model.on_logits": ("half", "loss", "on_logits holds halving"),
    "objective": ("half_loss", "loss", "objective holds halving"),
}
AROUND = {  # where kernels leave room: none need step aside, and none may lose it
    "model.on_norm": "half",
    "model.on_block": "half",
    "model.on_features": "half_alone",
}


def with_halving(recipe, path, function):
    part = Halving(function)
    change = (lambda old: part) if path.endswith("mix") else append(part)
    return edit(recipe, path, change)


@cpu
@pytest.mark.parametrize("path", PLACES)
def test_a_stage_that_offers_nothing_makes_its_kernel_step_aside_by_name(tiny, path):
    function, place, said = PLACES[path]
    recipe = with_halving(tiny([], **SHAPE), path, function)
    assert flaw(place, recipe, "fp32") == f"{said}, which the kernel does not know"
    assert served(recipe) == served(tiny([], **SHAPE)) - {place}


@pytest.fixture(scope="module")
def plain_trace(tiny):
    """Places that kernels serve -> the trace of a recipe without a halving stage; each is taken once."""
    plain = tiny([], **SHAPE, model__layers=1)
    return functools.cache(lambda kernels: trace(plain, kernels=kernels))


@cpu
@pytest.mark.parametrize("path", [*PLACES, *AROUND])
def test_a_stage_that_offers_nothing_is_alive_on_the_path_that_serves(tiny, plain_trace, path):
    function = AROUND.get(path) or PLACES[path][0]
    recipe = with_halving(tiny([], **SHAPE, model__layers=1), path, function)
    kernels = served(recipe) & {"attention", "residual", "loss"}
    assert trace(recipe, kernels=kernels) != plain_trace(kernels)
    torch.testing.assert_close(nats(recipe, kernels), nats(recipe, ()), rtol=1e-5, atol=1e-5)


# ---- a slot that no kernel has heard of ----


@dataclass(frozen=True)
class WiderPlan(AttentionPlan):
    on_output: dict[str, Stage] = field(default_factory=dict)


class WiderAttention(Attention):
    """One more slot, behind the gates."""

    def __init__(self, plan, head_dim):
        super().__init__(plan, head_dim)
        self.on_output = StageModules(plan.on_output)

    def gated(self, y, x):
        y = super().gated(y, x)
        for stage in self.on_output.values():
            y = stage(y)
        return y


@pytest.fixture
def new_slot(monkeypatch):
    """stages -> from here on every block has them in a slot `on_output` that today's kernels have never heard of."""

    def of(stages):
        def widened(**fields):
            return WiderPlan(**fields, on_output=stages)

        monkeypatch.setattr(plans, "AttentionPlan", widened)
        monkeypatch.setattr(transformer, "Attention", WiderAttention)
        plans.plan_for.cache_clear()

    yield of
    plans.plan_for.cache_clear()


@cpu
def test_a_stage_in_a_slot_that_came_later_is_alive_and_computed_on_the_path_that_serves(
    tiny, new_slot
):
    recipe = tiny([], **SHAPE, model__layers=2)
    new_slot({})
    assert flaw("attention", recipe, "fp32") == ""
    empty = served(recipe) & {"attention", "residual", "loss"}
    before = trace(recipe, kernels=empty)
    new_slot({"half": Stage(half)})
    said = "on_output holds half, which the kernel does not know"
    assert flaw("attention", recipe, "fp32") == said
    kernels = served(recipe) & {"attention", "residual", "loss"}
    assert kernels == empty - {"attention"}
    assert trace(recipe, kernels=kernels) != before
    torch.testing.assert_close(nats(recipe, kernels), nats(recipe, ()), rtol=1e-5, atol=1e-5)
    with pytest.raises(StepsAside, match=said):
        plan_with({"attention"}, recipe)


def test_a_field_that_came_later_and_is_no_stage_is_left_too(tiny):
    @dataclass(frozen=True)
    class Windowed(AttentionPlan):
        window: int = 0

    plan = plan_of(tiny([], **SHAPE)).blocks[0].attention
    values = {name: getattr(plan, name) for name in AttentionPlan.__dataclass_fields__}
    region = Region(Windowed(**values), outside=set(values))
    with pytest.raises(StepsAside, match="window is 0, which the kernel does not know"):
        region.close()


# ---- what a region gives ----


def test_stages_are_taken_in_the_order_in_which_they_run(tiny):
    """A factor behind a cap is not the factor before it."""
    behind = edit(
        tiny(["soft_cap"], **SHAPE), "model.on_logits", append(Halving("half", "behind"))
    )
    plan = plan_of(behind)
    factor = Stage(half, offer=LogitFactor(only("factor")), factor=2.0)
    late = replace(plan, on_logits={**plan.on_logits, "behind": factor})
    early = replace(plan, on_logits={"before": factor, **plan.on_logits})
    for given, count in ((late, 0), (early, 1)):
        region = Region(given, outside=())
        assert len(region.take_all("on_logits", LogitFactor)) == count


def test_a_stage_that_binds_what_its_offer_cannot_say_is_not_taken(tiny):
    plan = plan_of(tiny([], **SHAPE)).blocks[0].attention
    scaled = replace(plan, mix=Stage(half, offer=CausalMix(), scale=2.0))
    assert Region(plan, outside=()).take("mix", CausalMix)
    assert Region(scaled, outside=()).take("mix", CausalMix) is None


def test_an_offered_function_refuses_a_bound_value_that_it_does_not_know():
    assert only("cap")(cap=3.0) == 3.0 and only("cos", "sin")(cos=1, sin=2) == (1, 2)
    with pytest.raises(TypeError, match="bound are cap, tilt, offered cap"):
        only("cap")(cap=3.0, tilt=1.0)


# ---- optimizer steps ----


@dataclass(frozen=True)
class Reversed(Adam):
    """Overrides the update, and so has no offer."""

    def update(self, update, weight, state, bank, now):
        update, new = super().update(update, weight, state, bank, now)
        return -update, new


@dataclass(frozen=True)
class Rising(Momentum):
    """Overrides what the update calls."""

    def keep(self, now):
        return now.progress


@pytest.mark.parametrize(
    "steps", [(Reversed(),), (Rising(), Orthogonalize())], ids=["update", "what it calls"]
)
def test_a_step_that_changes_what_it_inherits_offers_nothing(steps):
    with pytest.raises(StepsAside, match="which the kernel does not know"):
        claimed_chain("hidden", Chain(steps))


@pytest.mark.parametrize(
    "steps", [(Decay(), Adam()), (Adam(), Decay(), Decay()), (Adam(), Adam())], ids=str
)
def test_a_chain_in_another_order_or_with_a_step_left_is_named(steps):
    kinds = ", ".join(step.kind for step in steps)
    with pytest.raises(StepsAside, match=f"the chain of hidden is {kinds}, which the kernel"):
        claimed_chain("hidden", Chain(steps))
    assert claimed_chain("hidden", Chain((Adam(), Decay())))


# ---- decoding, and the life of a rewritten plan ----


@cpu
def test_a_model_of_a_rewritten_plan_has_the_same_parameters_and_decodes_alike(tiny):
    stack = ["qk_norm", "gating", "value_residual", "soft_cap", "z_loss"]
    recipe = tiny(stack, **SHAPE)
    plain, ours = (
        Transformer(recipe),
        Transformer(recipe, plan=plan_with(served(recipe), recipe)),
    )
    for model in (plain, ours):
        initialise(model, recipe)
    names = [name for name, _ in plain.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected, _ = plain.extend(tokens, None)
        found, _ = ours.extend(tokens, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@cpu
def test_equal_blocks_with_kernels_share_one_compiled_graph(tiny):
    """As they do without kernels: the first layer remembers its values, the other two mix them in."""
    recipe = tiny(["qk_norm", "gating", "value_residual"], **SHAPE, model__layers=3)
    counts = []
    for kernels in (frozenset(), served(recipe)):
        torch._dynamo.reset()
        model = Transformer(recipe, plan=plan_with(kernels, recipe))
        initialise(model, recipe)
        counter = CompileCounter()
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter)
        model.trunk(torch.arange(16)[None])
        counts.append(counter.frame_count)
    assert counts == [2, 2]


def test_claims_are_made_without_torch():
    """So that a plan can be rewritten, and a chain judged, wherever recipes are read."""
    script = (
        "import sys; from ablab.core.fusion import attention, feedforward, head, optimizer, places;"
        "print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout.strip() == "False", told.stderr
