"""The optimizer's claim: chains that the kernels of kernels/optimizer_step.py compute, and the step made of them.

    an Adam direction                                one pass over all
    a running mean, its polar factor[, row scales]   a pass, Newton-Schulz, [a pass over the polar factors,] a pass
each with one decay, or none, at its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ablab.core.fusion.rewrite import StepsAside
from ablab.core.language.offers import (
    AdamDirection,
    Decays,
    Offer,
    PolarFactor,
    RowScale,
    RunningMean,
    offer_of,
)
from ablab.core.language.part import Asked
from ablab.core.model.rates import uneven_roles
from ablab.core.parts.transforms import COEFFICIENTS, SCALES, Now, split_blocks
from ablab.core.recipe.recipe import Chain, Recipe

Offered = TypeVar("Offered", bound=Offer)


def claim(recipe: Recipe) -> None:
    """Raises StepsAside at the first chain that the kernels do not know, and where a bank's members move apart."""
    for role, chain in recipe.optim.chains.items():
        claimed_chain(role, chain)
    if uneven := uneven_roles(recipe):
        raise StepsAside(
            f"{uneven[0]} parameters of one shape differ in learning rate or decay, "
            "and the kernel takes one for all"
        )


@dataclass(frozen=True)
class Claimed:
    """An optimizer step that a kernel computes: its state's kind, and what it offers."""

    kind: str
    offer: Any


@dataclass(frozen=True)
class AdamChain:
    adam: Claimed
    decay: Claimed | None


@dataclass(frozen=True)
class PolarChain:
    mean: Claimed
    polar: Claimed
    rows: Claimed | None
    decay: Claimed | None


class Steps:
    """The steps of a chain that are not yet claimed, in their order."""

    def __init__(self, steps: tuple[Asked, ...]):
        self.left = list(steps)

    def take(self, offer: type[Offer]) -> Claimed | None:
        """The next step, if it offers that."""
        if self.left and isinstance(found := offer_of(self.left[0]), offer):
            return Claimed(self.left.pop(0).kind, found)
        return None


def claimed_chain(role: str, chain: Chain) -> AdamChain | PolarChain:
    """The kernels that compute a whole chain.  Raises StepsAside."""
    kinds = ", ".join(part.kind for part in chain.steps) or "empty"
    unknown = StepsAside(f"the chain of {role} is {kinds}, which the kernel does not know")
    steps = Steps(chain.steps)
    claimed = _adam(steps) or _polar(steps)
    if claimed is None or steps.left:
        raise unknown
    if isinstance(claimed, PolarChain):
        _check_polar(role, claimed)
    return claimed


def _adam(steps: Steps) -> AdamChain | None:
    adam = steps.take(AdamDirection)
    return AdamChain(adam, steps.take(Decays)) if adam else None


def _polar(steps: Steps) -> PolarChain | None:
    mean = steps.take(RunningMean)
    polar = steps.take(PolarFactor)
    if not (mean and polar):
        return None
    return PolarChain(mean, polar, steps.take(RowScale), steps.take(Decays))


def _check_polar(role: str, chain: PolarChain) -> None:
    if role == "vector":
        raise StepsAside("the chain of vector orthogonalizes, and the kernel matrices alone")
    if chain.polar.offer.coefficients not in COEFFICIENTS:
        raise StepsAside(
            f"the chain of {role} takes exact polar factors, which the kernel does not"
        )
    if chain.rows and chain.rows.offer.axis != "row":
        kind, axis = chain.rows.kind, chain.rows.offer.axis
        raise StepsAside(f"{kind} normalises by {axis}, and the kernel rows alone")


class FusedMove:
    """Moves every bank by kernels, as `ChainMove` of core/train/banks.py does by its chain.

    scaling: (norm of the mean gradient, now) -> the factor on every gradient.
    """

    def __init__(self, banks: Sequence[Any], scaling: Callable[[Any, Now], Any]):
        self.banks = banks
        self.scaling = scaling
        self.moves = [_move(bank) for bank in banks]

    def norm(self) -> Any:
        """Of the gradients as they stand in the banks, 0-D."""
        import torch

        norms = [torch.linalg.vector_norm(bank.grad) for bank in self.banks]
        return torch.stack(norms).norm()

    def __call__(self, lr: Any, fraction: Any, now: Now) -> Any:
        norm = self.norm() / fraction
        scale = self.scaling(norm, now) / fraction
        for bank, move in zip(self.banks, self.moves, strict=True):
            move(scale, lr * bank.lr, now)
        return norm


def _move(bank: Any) -> "AdamMove | PolarMove":
    chain = claimed_chain(bank.declared.role, bank.chain)
    if isinstance(chain, AdamChain):
        return AdamMove(bank, chain)
    return PolarMove(bank, chain)


class AdamMove:
    """One pass over a bank."""

    def __init__(self, bank: Any, chain: AdamChain):
        self.bank = bank
        self.adam: AdamDirection = chain.adam.offer
        self.state = bank.state[chain.adam.kind]
        self.decay = Decay(bank, chain.decay)

    def __call__(self, clip: Any, lr: Any, now: Now) -> None:
        from ablab.kernels.optimizer_step import adam_step

        adam_step(
            self.bank.weight,
            self.bank.grad,
            self.state["mean"],
            self.state["square"],
            clip,
            lr,
            now.step,
            self.adam.beta1,
            self.adam.beta2,
            self.adam.eps,
            self.decay.mask,
            self.decay.strength(now),
        )


class PolarMove:
    """A bank of matrices along the polar factors of their means, fused matrices apart."""

    def __init__(self, bank: Any, chain: PolarChain):
        self.matmul = bank.matmul
        self.mean: RunningMean = chain.mean.offer
        self.polar: PolarFactor = chain.polar.offer
        self.divisor, self.triples = COEFFICIENTS[self.polar.coefficients]
        self.decay = Decay(bank, chain.decay)
        self.pieces = _pieces(bank, bank.state[chain.mean.kind]["mean"], self.polar.scale)
        self.scales = Scales(bank, chain.rows) if chain.rows else unscaled

    def __call__(self, clip: Any, lr: Any, now: Now) -> None:
        from ablab.kernels.newton_schulz import iterate
        from ablab.kernels.optimizer_step import apply_rows, momentum_step

        keep = self.mean.keep(now)
        strength = self.decay.strength(now)
        for piece in self.pieces:
            update, inverse_norm = momentum_step(
                piece.grad,
                piece.mean,
                clip,
                keep,
                self.mean.nesterov,
                self.divisor,
                self.matmul,
            )
            polar = iterate(update, self.triples, inverse_norm)
            scales = self.scales(piece, polar)
            apply_rows(piece.weight, polar, scales, piece.factor, lr, self.decay.mask, strength)


@dataclass(frozen=True)
class Piece:
    """Views of a bank's tensors, [N,r,c]: its matrices of one shape that move apart from the others."""

    index: int
    weight: Any
    grad: Any
    mean: Any
    factor: float  # of the matrices' shape


def _pieces(bank: Any, mean: Any, scale: str) -> list[Piece]:
    """The bank's fused matrices taken apart as its blocks say."""
    factor = SCALES[scale]
    parts = (split_blocks(tensor, bank.blocks) for tensor in (bank.weight, bank.grad, mean))
    return [
        Piece(index, weight, grad, mean, factor(*weight.shape[-2:]))
        for index, (weight, grad, mean) in enumerate(zip(*parts, strict=True))
    ]


def unscaled(piece: Piece, polar: Any) -> None:
    return None


class Scales:
    """A piece and its polar factors [N,r,c] -> what their rows are multiplied by [N,r]; the running mean moves on."""

    def __init__(self, bank: Any, rows: Claimed):
        self.rows: RowScale = rows.offer
        self.state = bank.state[rows.kind]

    def __call__(self, piece: Piece, polar: Any) -> Any:
        from ablab.kernels.optimizer_step import row_scales

        square = self.state[f"square{piece.index}"]
        return row_scales(polar, square, piece.factor, self.rows.beta2, self.rows.eps)


class Decay:
    """The mask of a bank's decay, and now -> its strength, 0-D; none where the chain has no decay."""

    def __init__(self, bank: Any, decay: Claimed | None):
        self.mask = decay.offer.mask if decay else "none"
        self.strength = Strength(bank, decay.offer) if decay else no_decay


class Strength:
    def __init__(self, bank: Any, decays: Decays):
        self.bank = bank
        self.decays = decays

    def __call__(self, now: Now) -> Any:
        return self.decays.strength(self.bank, now)


def no_decay(now: Now) -> None:
    return None
