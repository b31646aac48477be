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
        self.projected = _projected(claims, attention)
        self.queries, self.keys, _ = attention.heads
        self.turn = claims.turn.of(attention)
        self.gains = Gains(claims.gains.of(attention)) if claims.gains else no_gains
        self.values = _values(claims, attention)

    def __call__(self, x: Any, carry: Carry) -> tuple[Any, Carry]:
        from ablab.kernels.attention import attention

        qkv, gate = self.projected(x)
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
            gate=gate,
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


def _projected(claims: Claims, attention: Any) -> Callable[[Any], tuple[Any, Any]]:
    """normed x [B,T,W] -> packed q, k, v, and what each head's output is multiplied by [B,T,H], or None."""
    if claims.factors is None:
        return Ungated(attention.qkv)
    strengths = Strengths(claims.factors.of(attention))
    how = Together if strengths.joins(attention.qkv) else Apart
    return how(attention.qkv, strengths)


class Ungated:
    """Heads' outputs leave as they are."""

    def __init__(self, qkv: Any):
        self.qkv = qkv

    def __call__(self, x: Any) -> tuple[Any, None]:
        return self.qkv(x), None


class Apart:
    """Each reads x by a product of its own."""

    def __init__(self, qkv: Any, strengths: "Strengths"):
        self.qkv = qkv
        self.strengths = strengths

    def __call__(self, x: Any) -> tuple[Any, Any]:
        return self.qkv(x), self.strengths(x)


class Together:
    """Both read x by one pair of products (kernels/two_products.py)."""

    def __init__(self, qkv: Any, strengths: "Strengths"):
        self.qkv = qkv
        self.strengths = strengths

    def __call__(self, x: Any) -> tuple[Any, Any]:
        from ablab.kernels.two_products import two_products

        weight = self.qkv.weight.to(x.dtype)
        qkv, read = two_products(x, weight, self.strengths.rows().to(x.dtype))
        return qkv, self.strengths.of(x, read)


class Strengths:
    """normed x [B,T,W] -> what each head's output is multiplied by [B,T,H]."""

    def __init__(self, stage: Built[HeadFactors]):
        self.stage = stage
        self.reads = stage.offer.reads

    def joins(self, qkv: Any) -> bool:
        """Whether x is read by a plain product of all of it, as packed q, k and v are made."""
        if not self.reads:
            return False
        own = self.stage.bound()[self.reads].product
        return own is qkv.product and own is plain_product()

    def __call__(self, x: Any) -> Any:
        bound = self.stage.bound()
        maps = {name: Padded(one) for name, one in bound.items() if hasattr(one, "product")}
        return self.stage.offer.strengths(x, **bound | maps)

    def rows(self) -> Any:
        """Of the map by which x is read, padded."""
        return padded(self.stage.bound()[self.reads].weight)

    def of(self, x: Any, read: Any) -> Any:
        """The same, of x times `rows`."""
        bound = self.stage.bound()
        known = Known(read[..., : bound[self.reads].weight.shape[0]])
        return self.stage.offer.strengths(x, **bound | {self.reads: known})


class Known:
    """A linear map's product, which was taken."""

    def __init__(self, product: Any):
        self.product = product

    def __call__(self, x: Any) -> Any:
        return self.product


class Padded:
    """A linear map whose rows are padded."""

    def __init__(self, linear: Any):
        self.product = linear.product
        self.weight = linear.weight

    def __call__(self, x: Any) -> Any:
        return self.product(x, padded(self.weight))[..., : self.weight.shape[0]]


def padded(weight: Any) -> Any:
    """Its rows to a multiple of 8: cuBLAS multiplies by 12 at half the speed, its loads being narrow."""
    from torch.nn.functional import pad

    return pad(weight, (0, 0, 0, -weight.shape[0] % 8))


def plain_product() -> Any:
    """Of a linear map that no part multiplies in a way of its own."""
    from ablab.core.model.layers import plain_product

    return plain_product
