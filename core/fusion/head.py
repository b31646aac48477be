"""The head's claim: all from the final norm to the nats (kernels/linear_cross_entropy.py).

Most of the logits never exist.

readout, multipliers, one soft cap, cross-entropy, z-loss
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ablab.core.fusion.rewrite import Claimed, Region, StepsAside
from ablab.core.language.offers import LogitCap, LogitFactor, SquaredNormaliser
from ablab.core.model.plan import Plan
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
    """What the kernel computes besides the readout and the cross-entropy, in this order."""

    factors: list[Claimed[LogitFactor]]
    cap: Claimed[LogitCap] | None
    squares: list[Claimed[SquaredNormaliser]]


def claim(plan: Plan, recipe: Recipe) -> Plan:
    """The same plan with one kernel after the final norm.  Raises StepsAside."""
    region = Region(plan, OUTSIDE)
    claims = Claims(
        factors=region.take_all("on_logits", LogitFactor),
        cap=region.take("on_logits", LogitCap),
        squares=region.take_all("objective", SquaredNormaliser),
    )
    region.close()
    if plan.readout and plan.readout.product:
        kind = next(
            part.kind for part in recipe.model.products if part.product("readout", plan.readout)
        )
        raise StepsAside(f"the readout multiplies by {kind}, which the kernel does not know")
    return replace(plan, kernel=partial(fused_heads, claims))


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
    return Descend(model, how, z_weight), Measure(model, how)


class Rows:
    """What the trunk leaves [B,T,W], targets int [B,T] -> as the kernel takes them: [BT,W], the readout [V,W], [BT]."""

    def __init__(self, model: Any):
        self.norm = model.norm
        tied = not hasattr(model, "readout")
        self.table = model.embedding.table if tied else model.readout.weight

    def __call__(self, x: Any, targets: Any) -> tuple[Any, Any, Any]:
        rows = self.norm(x).flatten(0, 1)
        return rows, self.table.to(rows.dtype), targets.flatten()


class Descend:
    """What the trunk leaves [B,T,W], targets int [B,T] -> the loss to descend and the cross-entropy, sums in nats."""

    def __init__(self, model: Any, how: dict[str, Any], z_weight: float):
        self.rows = Rows(model)
        self.how = how
        self.z_weight = z_weight

    def __call__(self, x: Any, targets: Any) -> tuple[Any, Any]:
        from ablab.kernels.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(*self.rows(x, targets), **self.how, z_weight=self.z_weight)


class Measure:
    """What the trunk leaves [B,T,W], targets int [B,T] -> the cross-entropy of each token, nats [B,T]."""

    def __init__(self, model: Any, how: dict[str, Any]):
        self.rows = Rows(model)
        self.how = how

    def __call__(self, x: Any, targets: Any) -> Any:
        from ablab.kernels.linear_cross_entropy import token_losses

        return token_losses(*self.rows(x, targets), **self.how).view(targets.shape)
