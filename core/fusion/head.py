"""The head's claim: all from the final norm to the nats (kernels/linear_cross_entropy.py).

Most of the logits never exist.

readout, multipliers, one soft cap, cross-entropy, z-loss

Where the readout multiplies in 8-bit floats, so does the kernel in training (kernels/fp8_linear_cross_entropy.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ablab.core.fusion.rewrite import Claimed, Region, StepsAside
from ablab.core.language.offers import (
    EightBits,
    LogitCap,
    LogitFactor,
    SquaredNormaliser,
    offer_of_product,
)
from ablab.core.model.plan import Plan, plan_of
from ablab.core.recipe.recipe import Recipe

OUTSIDE = (
    "embedding",
    "on_table",
    "on_embedding",
    "blocks",
    "on_features",
    "norm",
    "readout",
    "kernel",
)


@dataclass(frozen=True)
class Claims:
    """What the kernel computes besides the cross-entropy.

    bits: how the readout multiplies; None: plainly.  Then, in this order, what makes the nats of its logits.
    """

    bits: EightBits | None
    factors: list[Claimed[LogitFactor]]
    cap: Claimed[LogitCap] | None
    squares: list[Claimed[SquaredNormaliser]]


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel after the final norm.  Raises StepsAside."""
    region = Region(plan, OUTSIDE)
    factors = region.take_all("on_logits", LogitFactor)
    cap = region.take("on_logits", LogitCap)
    squares = region.take_all("objective", SquaredNormaliser)
    region.close()
    claims = Claims(_bits(plan, recipe), factors, cap, squares)
    return replace(plan, kernel=partial(fused_heads, claims))


def shape_flaw(recipe: Recipe) -> str:
    """What the kernel does not take of the shapes or of this machine's card, in words; "" where it takes all."""
    if not _bits(plan_of(recipe), recipe):
        return ""
    from ablab.kernels.fp8_linear_cross_entropy import flaw

    return flaw(recipe.data.vocab, recipe.model.width)


def _bits(plan: Plan, recipe: Recipe) -> EightBits | None:
    """Raises StepsAside where the readout multiplies in another way."""
    if plan.readout is None or plan.readout.product is None:
        return None
    offer = offer_of_product(plan.readout.product)
    if isinstance(offer, EightBits):
        return offer
    parts = recipe.model.products
    kind = next(part.kind for part in parts if part.product("readout", plan.readout))
    raise StepsAside(f"the readout multiplies by {kind}, which the kernel does not know")


def fused_heads(claims: Claims, model: Any) -> tuple[Callable, Callable]:
    """As `heads_of` of core/model/objective.py, of the built model."""
    how: dict[str, Any] = {"multiplier": 1.0}
    for factor in (claimed.of(model) for claimed in claims.factors):
        how["multiplier"] *= factor.offer.factor(**factor.bound())
    if claims.cap:
        cap = claims.cap.of(model)
        how["cap"] = cap.offer.cap(**cap.bound())
        how["cap_form"] = cap.offer.form
    z_weight = 0.0
    for square in (claimed.of(model) for claimed in claims.squares):
        z_weight += square.offer.weight(**square.bound())
    objective = {**how, "z_weight": z_weight}
    descend = (
        EightBitDescend(model, {**objective, **asdict(claims.bits)})
        if claims.bits
        else Descend(model, objective)
    )
    return descend, Measure(model, how)


class Rows:
    """What the trunk leaves [B,T,W], targets int [B,T] -> as the kernel takes them: [BT,W], the readout [V,W], [BT]."""

    def __init__(self, model: Any):
        self.norm = model.norm
        tied = not hasattr(model, "readout")
        self.table = model.embedding.table if tied else model.readout.weight

    def __call__(self, x: Any, targets: Any) -> tuple[Any, Any, Any]:
        rows, targets = self.flat(x, targets)
        return rows, self.table.to(rows.dtype), targets

    def flat(self, x: Any, targets: Any) -> tuple[Any, Any]:
        """Without the readout."""
        return self.norm(x).flatten(0, 1), targets.flatten()


class Descend:
    """What the trunk leaves [B,T,W], targets int [B,T] -> the loss to descend and the cross-entropy, sums in nats."""

    def __init__(self, model: Any, how: dict[str, Any]):
        self.rows = Rows(model)
        self.how = how

    def __call__(self, x: Any, targets: Any) -> tuple[Any, Any]:
        from ablab.kernels.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(*self.rows(x, targets), **self.how)


class EightBitDescend:
    """The same by 8-bit products, of the readout as it is: unrounded before its 8 bits, as its gradient is after."""

    def __init__(self, model: Any, how: dict[str, Any]):
        self.rows = Rows(model)
        self.how = how

    def __call__(self, x: Any, targets: Any) -> tuple[Any, Any]:
        from ablab.kernels.fp8_linear_cross_entropy import fp8_linear_cross_entropy

        rows, targets = self.rows.flat(x, targets)
        return fp8_linear_cross_entropy(rows, self.rows.table, targets, **self.how)


class Measure:
    """What the trunk leaves [B,T,W], targets int [B,T] -> the cross-entropy of each token, nats [B,T]."""

    def __init__(self, model: Any, how: dict[str, Any]):
        self.rows = Rows(model)
        self.how = how

    def __call__(self, x: Any, targets: Any) -> Any:
        from ablab.kernels.linear_cross_entropy import token_losses

        return token_losses(*self.rows(x, targets), **self.how).view(targets.shape)
