"""The feed-forward's claims.

silu(gate) * up between the two projections (kernels/swiglu.py).  In training the whole of it: where both projections
multiply in 8-bit floats (kernels/fp8_swiglu.py), and where neither has a product of its own, in the epilogues of
quack-kernels (kernels/swiglu_epilogue.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ablab.core.fusion.eight_bits import bits_of, need_sides
from ablab.core.fusion.rewrite import Built, Claimed, Region, StepsAside
from ablab.core.language.declare import Linear, Stage, params
from ablab.core.language.offers import EightBits, Factor, GatedSilu, UnitRows
from ablab.core.model.plan import FeedForwardPlan, Plan
from ablab.core.recipe.recipe import Recipe

BEFORE = ("norm", "on_norm")
OUTSIDE = (*BEFORE, "on_branch", "kernel")
# What rounding to bf16 may add to a normed number: of the gain, of the norm, of a factor or two.
ROUNDED = (1 + 2.0**-8) ** 4
Fuse = Callable[[FeedForwardPlan, Claimed[GatedSilu]], FeedForwardPlan]


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel between the projections of every block.  Raises StepsAside."""
    return _each_block(plan, recipe, _silu)


def claim_in_8_bits(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with kernels that cast what they make, where gradients are wanted.  Raises StepsAside.

    The stage, also with the kernel of `claim` in it, serves where none are.
    """
    return _each_block(plan, recipe, _whole)


def claim_in_epilogues(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with products that end in silu(gate) * up and its gradient, where gradients are wanted.

    The stage, also with the kernel of `claim` in it, serves where none are.  Raises StepsAside.
    """
    return _each_block(plan, recipe, _in_epilogues)


def in_8_bits(plan: Plan) -> bool:
    """Whether a map of some feed-forward multiplies in 8-bit floats."""
    maps = [one for block in plan.blocks for one in block.ffn.inner.bound.values()]
    return any(isinstance(one, Linear) and bits_of(one) for one in maps)


def gated_plainly(plan: Plan) -> bool:
    """Whether every feed-forward is silu(gate) * up between two maps without products of their own."""
    inner = [block.ffn.inner for block in plan.blocks]
    return all(isinstance(one.offer, GatedSilu) and _plain(one) for one in inner)


def epilogue_refusal(plan: Plan, dtype: str, capability: tuple[int, int] | None) -> str:
    """Why the epilogues cannot serve a plan that is gated plainly; "" where they can."""
    from ablab.kernels import swiglu_epilogue

    weights = [weight for block in plan.blocks for _, weight in params(block.ffn.inner)]
    sides = {side for weight in weights for side in weight.shape}
    return swiglu_epilogue.refusal(dtype, sides, capability)


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
    return fuse(ffn, gated)


def _silu(ffn: FeedForwardPlan, gated: Claimed[GatedSilu]) -> FeedForwardPlan:
    inner = Stage(FusedSilu(gated.offer), offer=gated.offer, **ffn.inner.bound)
    return replace(ffn, inner=inner)


def _whole(ffn: FeedForwardPlan, gated: Claimed[GatedSilu]) -> FeedForwardPlan:
    maps: Any = gated.offer.maps(**ffn.inner.bound)  # as declared
    (bits, *others) = {bits_of(one) for one in maps}
    if others or bits is None:
        raise StepsAside("the feed-forward's maps do not both multiply in 8 bits")
    need_sides((side for one in maps for side in one.weight.shape), "the feed-forward")
    claims = Claims(gated, bits, _normed(ffn))
    return replace(ffn, kernel=partial(EightBitFeedForward, claims))


def _in_epilogues(ffn: FeedForwardPlan, gated: Claimed[GatedSilu]) -> FeedForwardPlan:
    if not _plain(ffn.inner):
        raise StepsAside("a map of the feed-forward has a product of its own")
    return replace(ffn, kernel=partial(EpilogueFeedForward, gated))


def _plain(inner: Stage) -> bool:
    maps = [one for one in inner.bound.values() if isinstance(one, Linear)]
    return all(one.product is None for one in maps)


class FusedSilu:
    """x [B,T,W] -> [B,T,W]: a stage's function, with the bound values of the one that it replaces."""

    def __init__(self, offer: GatedSilu):
        self.offer = offer

    def __call__(self, x: Any, **bound: Any) -> Any:
        from ablab.kernels.swiglu import swiglu

        gate_up, down = self.offer.maps(**bound)
        return down(swiglu(gate_up(x)))


class InTraining:
    """normed x [B,T,W] -> [B,T,W]: by `trained` where gradients are wanted, elsewhere as the stage has it.

    ffn: the module that was built from a claimed plan.
    """

    def __init__(self, gated: Claimed[GatedSilu], ffn: Any):
        self.plain = ffn.inner
        maps: Any = gated.of(ffn)
        self.gate_up, self.down = maps.offer.maps(**maps.bound())

    def __call__(self, x: Any) -> Any:
        import torch

        return self.trained(x) if torch.is_grad_enabled() else self.plain(x)

    def trained(self, x: Any) -> Any:
        raise NotImplementedError


class EpilogueFeedForward(InTraining):
    """By products with epilogues."""

    def trained(self, x: Any) -> Any:
        from ablab.kernels.swiglu_epilogue import feed_forward

        return feed_forward(x, self.gate_up.weight, self.down.weight)


# -- in 8 bits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normed:
    """What makes the feed-forward's input, where that bounds the length of its rows."""

    norm: Claimed[UnitRows]
    factors: list[Claimed[Factor]]


@dataclass(frozen=True)
class Claims:
    """What the kernel computes, and how.  normed: None: rows are as long as they are."""

    gated: Claimed[GatedSilu]
    bits: EightBits
    normed: Normed | None


def _normed(ffn: FeedForwardPlan) -> Normed | None:
    """It is read, not claimed: the norm and what follows it run as they are written."""
    region = Region(ffn, [name for name in ("inner", *OUTSIDE) if name not in BEFORE])
    norm = region.take("norm", UnitRows)
    factors = region.take_all("on_norm", Factor)
    unknown = any(region.left.values())
    return None if norm is None or unknown else Normed(norm, factors)


class EightBitFeedForward(InTraining):
    """In 8-bit floats."""

    def __init__(self, claims: Claims, ffn: Any):
        super().__init__(claims.gated, ffn)
        self.bits = claims.bits
        self.longest = Longest(claims.normed, ffn) if claims.normed else unknown

    def trained(self, x: Any) -> Any:
        from ablab.kernels.fp8_swiglu import fp8_swiglu

        return fp8_swiglu(
            x,
            self.gate_up.weight,
            self.down.weight,
            self.bits.gradient,
            self.bits.weight_gradient,
            self.longest(x.shape[-1]),
        )


def unknown(width: int) -> None:
    """How long a row of x may be."""


class Longest:
    """Channels W -> a bound on the norm of a row of x, fp32 0-D."""

    def __init__(self, normed: Normed, ffn: Any):
        self.norm: Built[UnitRows] = normed.norm.of(ffn)
        self.factors = [factor.of(ffn) for factor in normed.factors]

    def __call__(self, width: int) -> Any:
        gain = self.norm.offer.gain(**self.norm.bound())
        longest = ROUNDED * width**0.5 * gain.detach().abs().amax()
        for one in self.factors:
            longest = longest * abs(one.offer.factor(**one.bound()))
        return longest.reshape(())
