"""The feed-forward's claim: silu(gate) * up between the two projections (kernels/swiglu.py).

Where both projections multiply in 8-bit floats, the whole feed-forward in training (kernels/fp8_swiglu.py).
"""

from dataclasses import replace
from typing import Any

from ablab.core.fusion.rewrite import Region, StepsAside
from ablab.core.language.declare import Stage
from ablab.core.language.offers import EightBits, GatedSilu, offer_of_product
from ablab.core.model.plan import BlockPlan, FeedForwardPlan, Plan
from ablab.core.recipe.recipe import Recipe

OUTSIDE = ("norm", "on_norm", "on_branch")
MULTIPLE = 16  # of the sides that matrix units for 8-bit floats take


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
    bits = _eight_bits(gated.offer, ffn.inner)
    fused = EightBitFeedForward(gated.offer, bits) if bits else FusedSilu(gated.offer)
    return replace(ffn, inner=Stage(fused, **ffn.inner.bound))


def _eight_bits(gated: GatedSilu, inner: Stage) -> EightBits | None:
    """What both projections offer, if it is the same: else each multiplies for itself."""
    maps: Any = gated.maps(**inner.bound)  # as declared
    offers = {offer_of_product(one.product) for one in maps}
    (offer, *others) = offers
    if others or not isinstance(offer, EightBits):
        return None
    sides = {side for one in maps for side in one.weight.shape}
    if odd := sorted(side for side in sides if side % MULTIPLE):
        raise StepsAside(
            f"8-bit products take sides in multiples of {MULTIPLE},"
            f" and the feed-forward has {odd[0]}"
        )
    return offer


class FusedSilu:
    """x [B,T,W] -> [B,T,W]: a stage's function, with the bound values of the one that it replaces."""

    def __init__(self, offer: GatedSilu):
        self.offer = offer

    def __call__(self, x: Any, **bound: Any) -> Any:
        from ablab.kernels.swiglu import swiglu

        gate_up, down = self.offer.maps(**bound)
        return down(swiglu(gate_up(x)))


class EightBitFeedForward:
    """The same where gradients are wanted in 8-bit floats; elsewhere the maps multiply plainly, by themselves."""

    def __init__(self, offer: GatedSilu, bits: EightBits):
        self.maps = offer.maps
        self.plain = FusedSilu(offer)
        self.gradient = bits.gradient
        self.weight_gradient = bits.weight_gradient

    def __call__(self, x: Any, **bound: Any) -> Any:
        import torch

        from ablab.kernels.fp8_swiglu import fp8_swiglu

        if not torch.is_grad_enabled():
            return self.plain(x, **bound)
        maps: Any = self.maps(**bound)
        gate_up, down = maps
        return fp8_swiglu(x, gate_up.weight, down.weight, self.gradient, self.weight_gradient)
