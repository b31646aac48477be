"""The feed-forward's claims.

silu(gate) * up between the two projections (kernels/swiglu.py); and where both projections multiply in 8-bit floats,
the whole of it in training (kernels/fp8_swiglu.py).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ablab.core.fusion.rewrite import Region, StepsAside
from ablab.core.language.declare import Linear, Stage
from ablab.core.language.offers import EightBits, GatedSilu, offer_of_product
from ablab.core.model.plan import FeedForwardPlan, Plan
from ablab.core.recipe.recipe import Recipe

OUTSIDE = ("norm", "on_norm", "on_branch")
MULTIPLE = 16  # of the sides that matrix units for 8-bit floats take
# What stands there, what it offers -> what stands there instead.
Fuse = Callable[[Stage, GatedSilu], Stage]


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel between the projections of every block.  Raises StepsAside."""
    return _each_block(plan, recipe, _silu)


def claim_in_8_bits(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with kernels that cast what they make, where gradients are wanted.  Raises StepsAside.

    After `claim`, whose kernel then serves where none are.
    """
    return _each_block(plan, recipe, _whole)


def in_8_bits(plan: Plan) -> bool:
    """Whether a map of some feed-forward multiplies in 8-bit floats."""
    maps = [one for block in plan.blocks for one in block.ffn.inner.bound.values()]
    return any(isinstance(one, Linear) and _bits(one) for one in maps)


def _each_block(plan: Plan, recipe: Recipe, fuse: Fuse) -> Plan:
    kind = recipe.model.ffn.kind
    blocks = [replace(block, ffn=_claimed(block.ffn, kind, fuse)) for block in plan.blocks]
    return replace(plan, blocks=tuple(blocks))


def _claimed(ffn: FeedForwardPlan, kind: str, fuse: Fuse) -> FeedForwardPlan:
    region = Region(ffn, OUTSIDE)
    gated = region.take("inner", GatedSilu)
    if gated is None:
        raise StepsAside(f"the feed-forward is {kind}, which the kernel does not know")
    region.close()
    return replace(ffn, inner=fuse(ffn.inner, gated.offer))


def _silu(inner: Stage, gated: GatedSilu) -> Stage:
    return Stage(FusedSilu(gated), offer=gated, **inner.bound)


def _whole(inner: Stage, gated: GatedSilu) -> Stage:
    maps: Any = gated.maps(**inner.bound)  # as declared
    (bits, *others) = {_bits(one) for one in maps}
    if others or bits is None:
        raise StepsAside("the feed-forward's maps do not both multiply in 8 bits")
    sides = {side for one in maps for side in one.weight.shape}
    if odd := sorted(side for side in sides if side % MULTIPLE):
        raise StepsAside(
            f"8-bit products take sides in multiples of {MULTIPLE},"
            f" and the feed-forward has {odd[0]}"
        )
    return Stage(EightBitFeedForward(gated, bits, inner.function), **inner.bound)


def _bits(linear: Linear) -> EightBits | None:
    offer = offer_of_product(linear.product)
    return offer if isinstance(offer, EightBits) else None


class FusedSilu:
    """x [B,T,W] -> [B,T,W]: a stage's function, with the bound values of the one that it replaces."""

    def __init__(self, offer: GatedSilu):
        self.offer = offer

    def __call__(self, x: Any, **bound: Any) -> Any:
        from ablab.kernels.swiglu import swiglu

        gate_up, down = self.offer.maps(**bound)
        return down(swiglu(gate_up(x)))


class EightBitFeedForward:
    """The same in 8-bit floats where gradients are wanted.  plain: the function that serves where none are."""

    def __init__(self, offer: GatedSilu, bits: EightBits, plain: Callable[..., Any]):
        self.maps = offer.maps
        self.plain = plain
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
