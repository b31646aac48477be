"""The claim of the attention's projections: those that multiply in 8-bit floats (kernels/fp8_projection.py)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ablab.core.fusion.eight_bits import bits_of, need_sides
from ablab.core.language.declare import Linear
from ablab.core.language.offers import EightBits
from ablab.core.model.plan import AttentionPlan, Plan
from ablab.core.recipe.recipe import Recipe


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with a kernel that casts the projections' operands, where gradients are wanted.

    Raises StepsAside.
    """
    blocks = [replace(block, attention=_claimed(block.attention)) for block in plan.blocks]
    return replace(plan, blocks=tuple(blocks))


def in_8_bits(plan: Plan) -> bool:
    """Whether a projection of some block takes all three of its products in 8-bit floats."""
    return any(_turned(one) for block in plan.blocks for one in _maps(block.attention))


def _maps(attention: AttentionPlan) -> Iterator[Linear]:
    yield attention.qkv
    yield attention.out


def _claimed(attention: AttentionPlan) -> AttentionPlan:
    return replace(attention, qkv=_cast(attention.qkv), out=_cast(attention.out))


def _cast(declared: Linear) -> Linear:
    bits = _turned(declared)
    if bits is None:
        return declared
    need_sides(declared.weight.shape, "a projection of the attention")
    return replace(declared, product=CastOnce(bits))


def _turned(declared: Linear) -> EightBits | None:
    """How a map multiplies whose operands are turned round, dW being a product of 8-bit numbers too.

    With a wide dW there is nothing to gain.
    """
    bits = bits_of(declared)
    return bits if bits and bits.weight_gradient == "fp8" else None


class CastOnce:
    """x: [..., fan_in], weight: [fan_out, fan_in] -> [..., fan_out], plainly where no gradient is wanted."""

    def __init__(self, offer: EightBits):
        self.offer = offer

    def __call__(self, x: Any, weight: Any) -> Any:
        import torch

        from ablab.core.model.layers import plain_product
        from ablab.kernels.fp8_projection import fp8_projection

        if not torch.is_grad_enabled():
            return plain_product(x, weight)
        return fp8_projection(x, weight, self.offer.gradient)
