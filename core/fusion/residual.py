"""The stream's claim: a branch is added to it where the next branch reads its norm (kernels/residual_norm.py).

    x <- x + attention(norm(x));  x <- x + ffn(norm(x));   norm: a root mean square, and a factor on it

So a block hands on what its last branch returned beside the stream that it has not joined yet, in the carry; after the
last block it joins.  Decoding, and whoever asks for a built stage, still finds the stages as they stood.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ablab.core.fusion.rewrite import Built, Claimed, Region
from ablab.core.language.declare import Stage, params
from ablab.core.language.offers import Factor, PlainResidual, UnitRows
from ablab.core.model.plan import AttentionPlan, BlockPlan, FeedForwardPlan, Plan
from ablab.core.recipe.recipe import Recipe

BRANCH = "branch that has not joined"  # of the carry
LAST = "last branch"  # of the stages before the final norm; no part can have the name
Carry = dict[str, Any]


@dataclass(frozen=True)
class NormClaims:
    """What the kernel computes of what a branch reads."""

    norm: Claimed[UnitRows]
    factor: Claimed[Factor] | None


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel at each sum of a branch and the stream.  Raises StepsAside."""
    blocks = tuple(_block(block) for block in plan.blocks)
    on_features = {LAST: Stage(joined), **plan.on_features}
    return replace(plan, blocks=blocks, on_features=on_features)


def shape_flaw(recipe: Recipe) -> str:
    """Which width the kernel does not take, in words; "" where it takes it."""
    from ablab.kernels.residual_norm import WIDEST

    width = recipe.model.width
    if width <= WIDEST:
        return ""
    return f"model.width={width}: the norm's kernel serves up to {WIDEST} channels"


def _block(block: BlockPlan) -> BlockPlan:
    region = Region(block, outside=("on_block", "attention", "ffn", "kernel"))
    region.need("block", PlainResidual)
    region.close()
    join = partial(JoinedBranches, _claims(block.attention), _claims(block.ffn))
    return replace(block, kernel=join)


def _claims(branch: AttentionPlan | FeedForwardPlan) -> NormClaims:
    """Raises StepsAside.  The other stages of `on_norm` stay as they are.

    So does a factor that is learned: the kernel has no gradient for it.
    """
    region = Region(branch, outside=())
    norm = region.need("norm", UnitRows)
    factor = region.take("on_norm", Factor)
    learned = factor and any(params(branch.on_norm[factor.name]))
    return NormClaims(norm, None if learned else factor)


def joined(x: Any, carry: Carry) -> Any:
    """x [B,T,W] with the branch that waits: in decoding, and before the first block, there is none."""
    return x + carry[BRANCH] if BRANCH in carry else x


class JoinedBranches:
    """x [B,T,W], carry -> x with the block's attention but not yet its feed-forward, carry with that.

    block: the module that was built from a claimed plan.
    """

    def __init__(self, attention: NormClaims, ffn: NormClaims, block: Any):
        self.attention = block.attention
        self.ffn = block.ffn
        self.enter = Staged(block) if block.on_block.values() else Entered(attention, block)
        self.to_ffn = JoinedNorm(ffn, block.ffn)

    def __call__(self, x: Any, carry: Carry) -> tuple[Any, Carry]:
        x, normed, carry = self.enter(x, carry)
        y, carry = self.attention.branch(normed, carry)
        x, normed = self.to_ffn(x, y)
        return x, {**carry, BRANCH: self.ffn.branch(normed)}


class Entered:
    """x, carry -> x with the branch that waits, what the attention reads of it, carry."""

    def __init__(self, claims: NormClaims, block: Any):
        self.attention = block.attention
        self.to_attention = JoinedNorm(claims, block.attention)

    def __call__(self, x: Any, carry: Carry) -> tuple[Any, Any, Carry]:
        if BRANCH in carry:
            return *self.to_attention(x, carry[BRANCH]), carry
        return x, self.attention.normed(x), carry  # before the first block none waits


class Staged:
    """The same where stages stand before the block: they are given the whole stream."""

    def __init__(self, block: Any):
        self.stages = list(block.on_block.values())
        self.attention = block.attention

    def __call__(self, x: Any, carry: Carry) -> tuple[Any, Any, Carry]:
        x = joined(x, carry)
        for stage in self.stages:
            x, carry = stage(x, carry)
        return x, self.attention.normed(x), carry


class JoinedNorm:
    """x and a branch [B,T,W] -> their sum, and what the next branch, a module with norms, reads of it."""

    def __init__(self, claims: NormClaims, branch: Any):
        self.norm = claims.norm.of(branch)
        self.factor = OneFactor(claims.factor.of(branch)) if claims.factor else no_factor
        stages = list(branch.on_norm.values())
        self.others: Iterable[Callable[[Any], Any]] = stages[claims.factor is not None :]

    def __call__(self, x: Any, y: Any) -> tuple[Any, Any]:
        from ablab.kernels.residual_norm import residual_norm

        bound = self.norm.bound()
        gain = self.norm.offer.gain(**bound)
        eps = self.norm.offer.eps(**bound)
        x, normed = residual_norm(x, y, gain, eps, self.factor(x))
        for stage in self.others:
            normed = stage(normed)
        return x, normed


class OneFactor:
    """x -> the claimed factor as it is now, fp32 [1]: tables move with the model."""

    def __init__(self, stage: Built[Factor]):
        self.stage = stage

    def __call__(self, x: Any) -> Any:
        import torch

        factor = self.stage.offer.factor(**self.stage.bound())
        if isinstance(factor, torch.Tensor):
            return factor
        return torch.full((1,), factor, device=x.device)


def no_factor(x: Any) -> None:
    """The norm is read as it is."""
