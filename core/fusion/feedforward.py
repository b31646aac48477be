"""The feed-forward's claim: silu(gate) * up between the two projections (kernels/swiglu.py)."""

from dataclasses import replace
from typing import Any

from ablab.core.fusion.rewrite import Region, StepsAside
from ablab.core.language.declare import Stage
from ablab.core.language.offers import GatedSilu
from ablab.core.model.plan import BlockPlan, FeedForwardPlan, Plan
from ablab.core.recipe.recipe import Recipe

OUTSIDE = ("norm", "on_norm", "on_branch")


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel between the projections of every block.  Raises StepsAside."""
    blocks = tuple(_block(block, recipe.model.ffn.kind) for block in plan.blocks)
    return replace(plan, blocks=blocks)


def _block(block: BlockPlan, kind: str) -> BlockPlan:
    return replace(block, ffn=_claimed(block.ffn, kind))


def _claimed(ffn: FeedForwardPlan, kind: str) -> FeedForwardPlan:
    region = Region(ffn, OUTSIDE)
    gated = region.take("inner", GatedSilu)
    if gated is None:
        raise StepsAside(f"the feed-forward is {kind}, which the kernel does not know")
    region.close()
    fused = Stage(FusedSilu(gated.offer), **ffn.inner.bound)
    return replace(ffn, inner=fused)


class FusedSilu:
    """x [B,T,W] -> [B,T,W]: a stage's function, with the bound values of the one that it replaces."""

    def __init__(self, offer: GatedSilu):
        self.offer = offer

    def __call__(self, x: Any, **bound: Any) -> Any:
        from ablab.kernels.swiglu import swiglu

        gate_up, down = self.offer.maps(**bound)
        return down(swiglu(gate_up(x)))
