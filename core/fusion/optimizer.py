"""Chains of the optimizer that the kernels of kernels/optimizer_step.py compute, and the step made of them.

    adam                                   one pass over all
    momentum, orthogonalize[, normuon]     a pass, Newton-Schulz, [a pass over the polar factors,] a pass
each with no decay, `decay` or `cautious_decay` at its end.
"""

from collections.abc import Callable
from typing import Any

from ablab.core.parts.transforms import COEFFICIENTS, SCALES, Now, split_blocks
from ablab.core.recipe.recipe import Chain, Recipe

DIRECTIONS = (
    ("adam",),
    ("momentum", "orthogonalize"),
    ("momentum", "orthogonalize", "normuon"),
)
DECAYS = ("decay", "cautious_decay")


def optimizer_flaw(recipe: Recipe) -> str:
    """The first chain that the kernels do not know, in words; "" when there is none."""
    return next(
        (said for role, chain in recipe.optim.chains.items() if (said := _flaw(role, chain))),
        "",
    )


def _flaw(role: str, chain: Chain) -> str:
    kinds = tuple(part.kind for part in chain.steps)
    if (kinds[:-1] if kinds and kinds[-1] in DECAYS else kinds) not in DIRECTIONS:
        return f"the chain of {role} is {', '.join(kinds) or 'empty'}, which the kernel does not know"
    parts = _by_kind(chain)
    if "orthogonalize" in parts and role == "vector":
        return "the chain of vector orthogonalizes, and the kernel matrices alone"
    if "orthogonalize" in parts and parts["orthogonalize"].coefficients not in COEFFICIENTS:
        return f"the chain of {role} takes exact polar factors, which the kernel does not"
    if "normuon" in parts and parts["normuon"].axis != "row":
        return f"normuon normalises by {parts['normuon'].axis}, and the kernel rows alone"
    return ""


def fused_move(banks: list[Any], clip_to: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As the step that it replaces: [lr, step, step / steps, the schedule's value] -> the norm of the gradient before clipping."""
    import torch

    moves = [
        (bank, (_adam if "adam" in _by_kind(bank.chain) else _muon)(bank)) for bank in banks
    ]

    def move(numbers):
        lr, now = numbers[0], Now(*numbers[1:].unbind())
        norm = torch.stack([torch.linalg.vector_norm(bank.grad) for bank in banks]).norm()
        clip = clip_to(norm)
        for bank, one in moves:
            one(clip, lr * bank.lr, now)
        return norm

    return move


def _adam(bank: Any) -> Callable[[Any, Any, Now], None]:
    from ablab.kernels.optimizer_step import adam_step

    adam, state, decay = _by_kind(bank.chain)["adam"], bank.state["adam"], _decay(bank)

    def move(clip, lr, now):
        adam_step(
            bank.weight,
            bank.grad,
            state["mean"],
            state["square"],
            clip,
            lr,
            now.step,
            adam.beta1,
            adam.beta2,
            adam.eps,
            *decay(now),
        )

    return move


def _muon(bank: Any) -> Callable[[Any, Any, Now], None]:
    from ablab.kernels.newton_schulz import iterate
    from ablab.kernels.optimizer_step import apply_rows, momentum_step, row_scales

    parts, decay = _by_kind(bank.chain), _decay(bank)
    momentum, orthogonalize, normuon = (
        parts["momentum"],
        parts["orthogonalize"],
        parts.get("normuon"),
    )
    divisor, triples = COEFFICIENTS[orthogonalize.coefficients]
    tensors = (
        split_blocks(tensor, bank.blocks)
        for tensor in (bank.weight, bank.grad, bank.state["momentum"]["mean"])
    )
    pieces = list(zip(*tensors, strict=True))

    def move(clip, lr, now):
        keep, decays = momentum.keep(now), decay(now)
        for i, (weight, grad, mean) in enumerate(pieces):
            factor = SCALES[orthogonalize.scale](*weight.shape[-2:])
            u, scale = momentum_step(
                grad, mean, clip, keep, momentum.nesterov, divisor, bank.matmul
            )
            polar = iterate(u, triples, scale)
            scales = (
                row_scales(
                    polar,
                    bank.state["normuon"][f"square{i}"],
                    factor,
                    normuon.beta2,
                    normuon.eps,
                )
                if normuon
                else None
            )
            apply_rows(weight, polar, scales, factor, lr, *decays)

    return move


def _by_kind(chain: Chain) -> dict[str, Any]:
    return {part.kind: part for part in chain.steps}


def _decay(bank: Any) -> Callable[[Now], tuple[str, Any]]:
    """now -> mask and strength, as the kernels take them."""
    parts = _by_kind(bank.chain)
    if cautious := parts.get("cautious_decay"):
        return lambda now: (
            "cautious" if cautious.ties else "strictly cautious",
            cautious.strength(bank, now),
        )
    decay = parts.get("decay")
    return lambda now: ("plain", decay.strength(bank, now)) if decay else ("none", None)
