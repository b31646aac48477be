"""What a stage or an optimizer step offers to kernels and to exports: the arithmetic that one may do in its place.

An offer is given where the stage is built, beside its formula, and its function is the one that the formula computes
with: a dose is read once, for both.  It is called with all that the stage has bound, by name, so a bound value that the
function does not know is a TypeError, never ignored.  What offers nothing is computed as it is written.

Which kernel takes which offer: core/fusion.  What an exported model needs of positions and masks: core/interop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


class Offer:
    """Base of what stages and optimizer steps may offer."""


class Fixed(Offer):
    """Base of what has no function: it is taken of a stage that has bound nothing (core/fusion/rewrite.py)."""


@cache  # equal blocks hold the same function, and share a compiled graph
def only(*names: str) -> Callable[..., Any]:
    """The bound value of this name (of several, in a tuple) of a stage that has bound nothing else."""

    def values(**bound: Any) -> Any:
        if bound.keys() != set(names):
            raise TypeError(f"bound are {', '.join(bound)}, offered {', '.join(names)}")
        chosen = tuple(bound[name] for name in names)
        return chosen if len(chosen) > 1 else chosen[0]

    return values


# -- where a branch begins ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class UnitRows(Offer):
    """x <- gain x / rms(x) over the last axis: no row is longer than sqrt(W) max|gain|.

    gain: **bound -> [W].  eps: **bound -> what the mean square gets in addition.
    """

    gain: Callable[..., Tensor]
    eps: Callable[..., float]


@dataclass(frozen=True)
class Factor(Offer):
    """x <- factor x.  factor: **bound -> [1] or a number."""

    factor: Callable[..., Tensor | float]


# -- in the attention --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class QKGains(Offer):
    """q <- q r(q) q_gain, k <- k r(k) k_gain,  r(x) = (mean(x^2) + eps)^-1/2 over a head's D channels, in fp32.

    gains: **bound -> q_gain, k_gain ([D], [1] or numbers), eps.
    """

    gains: Callable[..., tuple[Tensor | float, Tensor | float, float]]


@dataclass(frozen=True)
class Turn(Offer):
    """Channel i of q and of k turns with channel i + D/2.  tables: **bound -> cos, sin, fp32 [context, D/2]."""

    tables: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TurnLeading(Offer):
    """The same among the first R channels of a head; the others go on unchanged.  tables: fp32 [context, R/2]."""

    tables: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Remembered(Fixed):
    """The projected values [B,T,KV,D] go into the carry, and on unchanged."""

    carried: str


@dataclass(frozen=True)
class Mixed(Offer):
    """v <- own v + first carry[carried].  weights: **bound -> own, first ([1] or numbers)."""

    carried: str
    weights: Callable[..., tuple[Tensor | float, Tensor | float]]


@dataclass(frozen=True)
class CausalMix(Fixed):
    """y = softmax(q k^T / sqrt(D)) v, each query over the keys up to its own position; H / KV queries share a key."""


@dataclass(frozen=True)
class WindowMix(Offer):
    """The same, each query over its own key and the window - 1 before it.  window: **bound -> tokens."""

    window: Callable[..., int]


@dataclass(frozen=True)
class HeadFactors(Offer):
    """y [B,T,H,D] <- y * strengths(normed x [B,T,W], **bound) [B,T,count], whole heads where count is H."""

    strengths: Callable[..., Tensor]
    count: int


# -- around the branches of a block ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlainResidual(Fixed):
    """x <- x + attention(x);  x <- x + ffn(x)."""


# -- in the feed-forward -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GatedSilu(Offer):
    """down(silu(gate) * up), gate and up the halves of gate_up(x).  maps: **bound -> gate_up, down."""

    maps: Callable[..., tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]


# -- of a linear map ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EightBits(Offer):
    """Where gradients are wanted, y = x W^T and its gradients are products of 8-bit floats, x and W in e4m3.

    gradient: the format of y's gradient.  weight_gradient: of these numbers too, or of those before they were cast.
    """

    gradient: Literal["e5m2", "e4m3"]
    weight_gradient: Literal["fp8", "wide"]


def offer_of_product(product: Any) -> Offer | None:
    """What the product of a linear map offers: its `offer`, if it has one."""
    return getattr(product, "offer", None)


# -- between the readout and the nats ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class LogitFactor(Offer):
    """logits <- factor logits.  factor: **bound -> a number."""

    factor: Callable[..., float]


@dataclass(frozen=True)
class LogitCap(Offer):
    """logits <- cap tanh(logits / cap), or cap logits / sqrt(logits^2 + cap^2).  cap: **bound -> a number."""

    form: Literal["tanh", "rational"]
    cap: Callable[..., float]


@dataclass(frozen=True)
class SquaredNormaliser(Offer):
    """loss <- loss + weight * sum(logsumexp(logits)^2).  weight: **bound -> a number."""

    weight: Callable[..., float]


# -- in a chain of the optimizer ---------------------------------------------------------------------------------------
def offers(offer: Callable[[Any], Offer]) -> Callable[[Callable], Callable]:
    """Marks the `update` of an optimizer step that kernels may compute.  offer: the step -> what, with its doses."""

    def mark(update: Callable) -> Callable:
        update.offer = offer  # type: ignore[attr-defined]
        return update

    return mark


def offer_of(step: Any) -> Offer | None:
    """What a step offers; nothing where its class inherits the `update`, for it may have changed what that calls."""
    offer = getattr(vars(type(step)).get("update"), "offer", None)
    return offer(step) if offer else None


@dataclass(frozen=True)
class AdamDirection(Offer):
    """(m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), m and v the state's `mean` and `square`."""

    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class RunningMean(Offer):
    """m <- b m + (1-b) g, the state's `mean`; on goes (1-b) g + b m with Nesterov, else m.  keep: now -> b, 0-D."""

    keep: Callable[[Any], Tensor]
    nesterov: bool


@dataclass(frozen=True)
class PolarFactor(Offer):
    """Each matrix's polar factor, by Newton-Schulz with these coefficients, times transforms.SCALES of its shape."""

    coefficients: str
    scale: str


@dataclass(frozen=True)
class RowScale(Offer):
    """Rows divided by the root of their running mean square (+ eps), and each matrix brought back to its norm.

    State: `square0`, `square1`, ..., a tensor for each of transforms.split_blocks.
    """

    axis: str
    beta2: float
    eps: float


@dataclass(frozen=True)
class Decays(Offer):
    """u <- u + strength w where the mask is on.  strength: bank, now -> 0-D; mask: kernels/optimizer_step.py's word."""

    mask: Literal["plain", "cautious", "strictly cautious"]
    strength: Callable[[Any, Any], Tensor]
