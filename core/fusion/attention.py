"""The attention's claim: all that lies between the packed projection and the heads' outputs (kernels/attention.py).

    QK-norm, rotary positions, value residual, causal softmax, a gate a head

Decoding, and whoever asks for a built stage, still finds the stages as they stood: same parameters, same names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ablab.core.fusion.rewrite import Built, Claimed, Region, StepsAside
from ablab.core.language.offers import (
    CausalMix,
    HeadFactors,
    Mixed,
    QKGains,
    Remembered,
    Turn,
)
from ablab.core.model.plan import AttentionPlan, BlockPlan, Plan
from ablab.core.recipe.recipe import Recipe

OUTSIDE = ("norm", "on_norm", "qkv", "out", "on_branch", "kernel")
Carry = dict[str, Any]


@dataclass(frozen=True)
class Claims:
    """What the kernel computes."""

    mix: Claimed[CausalMix]
    turn: Claimed[Turn]
    gains: Claimed[QKGains] | None
    remembered: Claimed[Remembered] | None
    mixed: Claimed[Mixed] | None
    factors: Claimed[HeadFactors] | None


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel in the attention of every block.  Raises StepsAside."""
    blocks = tuple(_block(block, recipe.model.heads) for block in plan.blocks)
    return replace(plan, blocks=blocks)


def shape_flaw(recipe: Recipe, dtype: str) -> str:
    """Which shape the kernel does not take, in words; "" where it takes all."""
    import torch

    from ablab.kernels.attention import serves

    model = recipe.model
    of_torch = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return serves(model.attention.head_dim, of_torch, model.heads, model.kv_heads)


def _block(block: BlockPlan, heads: int) -> BlockPlan:
    claims = _claims(block.attention, heads)
    return replace(
        block, attention=replace(block.attention, kernel=partial(PackedAttention, claims))
    )


def _claims(plan: AttentionPlan, heads: int) -> Claims:
    region = Region(plan, OUTSIDE)
    claims = Claims(
        mix=region.need("mix", CausalMix),
        turn=region.need("position", Turn),
        gains=region.take("on_qk", QKGains),
        remembered=region.take("on_values", Remembered),
        mixed=region.take("on_values", Mixed),
        factors=region.take("on_heads", HeadFactors),
    )
    region.close()
    if claims.remembered and claims.mixed:
        raise StepsAside("on_values both remembers and mixes, and the kernel does one of them")
    if claims.factors and claims.factors.offer.count != heads:
        count = claims.factors.offer.count
        raise StepsAside(f"{count} gates for {heads} heads; the kernel knows one a head")
    return claims


class PackedAttention:
    """normed x [B,T,W], carry -> the heads' outputs [B,T,H,D], carry.

    attention: the module that was built from a claimed plan.
    """

    def __init__(self, claims: Claims, attention: Any):
        self.qkv = attention.qkv
        self.queries, self.keys, _ = attention.heads
        self.turn = claims.turn.of(attention)
        self.gains = Gains(claims.gains.of(attention)) if claims.gains else no_gains
        self.values = _values(claims, attention)
        self.strengths = Strengths(claims.factors.of(attention)) if claims.factors else no_gate

    def __call__(self, x: Any, carry: Carry) -> tuple[Any, Carry]:
        from ablab.kernels.attention import attention

        qkv = self.qkv(x)
        heads = qkv.unflatten(-1, (self.queries + 2 * self.keys, -1))
        values = heads[:, :, self.queries + self.keys :]
        cos, sin = self.turn.offer.tables(**self.turn.bound())
        first, weights, carry = self.values(values, carry)
        y = attention(
            qkv,
            self.queries,
            self.keys,
            cos,
            sin,
            **self.gains(2 * cos.shape[-1], cos.device),
            first=first,
            weights=weights,
            gate=self.strengths(x),
        )
        return y.unflatten(-1, (self.queries, -1)), carry


def no_gains(channels: int, device: Any) -> dict[str, Any]:
    """Queries and keys meet as projected."""
    return {}


class Gains:
    """A head's channels D and the device -> gains [D] in fp32 and eps, as the kernel takes them."""

    def __init__(self, stage: Built[QKGains]):
        self.stage = stage

    def __call__(self, channels: int, device: Any) -> dict[str, Any]:
        import torch

        q_gain, k_gain, eps = self.stage.offer.gains(**self.stage.bound())
        ones = torch.ones(channels, device=device)
        return {"q_gain": ones * q_gain, "k_gain": ones * k_gain, "eps": eps}


def _values(claims: Claims, attention: Any) -> Callable:
    """values [B,T,KV,D], carry -> the first layer's values or None, (own, first) weights [2] or None, carry."""
    if claims.mixed:
        return MixedValues(claims.mixed.of(attention))
    if claims.remembered:
        return RememberedValues(claims.remembered.offer)
    return own_values


def own_values(values: Any, carry: Carry) -> tuple[None, None, Carry]:
    return None, None, carry


class RememberedValues:
    """The layer's own values, which go into the carry too."""

    def __init__(self, offer: Remembered):
        self.carried = offer.carried

    def __call__(self, values: Any, carry: Carry) -> tuple[None, None, Carry]:
        return None, None, {**carry, self.carried: values}


class MixedValues:
    """Values out of the carry, and the weights of the layer's own and of these."""

    def __init__(self, stage: Built[Mixed]):
        self.stage = stage

    def __call__(self, values: Any, carry: Carry) -> tuple[Any, Any, Carry]:
        import torch

        offer = self.stage.offer
        own, first = offer.weights(**self.stage.bound())
        one = torch.ones(1, device=values.device)
        weights = torch.cat((one * own, one * first))
        return carry[offer.carried], weights, carry


def no_gate(x: Any) -> None:
    """Heads' outputs leave as they are."""


class Strengths:
    """normed x [B,T,W] -> what each head's output is multiplied by [B,T,H]."""

    def __init__(self, stage: Built[HeadFactors]):
        self.stage = stage

    def __call__(self, x: Any) -> Any:
        bound = self.stage.bound()
        maps = {name: Padded(one) for name, one in bound.items() if hasattr(one, "product")}
        return self.stage.offer.strengths(x, **bound | maps)


class Padded:
    """A linear map whose rows are padded to a multiple of 8.

    cuBLAS multiplies by 12 rows at half the speed, its loads being narrow.
    """

    def __init__(self, linear: Any):
        self.product = linear.product
        self.weight = linear.weight

    def __call__(self, x: Any) -> Any:
        from torch.nn.functional import pad

        rows = self.weight.shape[0]
        padded = pad(self.weight, (0, 0, 0, -rows % 8))
        return self.product(x, padded)[..., :rows]
