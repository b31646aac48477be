"""Chains of the optimizer that the kernels of kernels/optimizer_step.py compute, and the step made of them.

    adam                                   one pass over all
    momentum, orthogonalize[, normuon]     a pass, Newton-Schulz, [a pass over the polar factors,] a pass
each with no decay, `decay` or `cautious_decay` at its end.
"""

from collections.abc import Callable
from typing import Any

from ablab.core.recipe import Chain, Recipe
from ablab.core.transforms import COEFFICIENTS, SCALES, split_blocks

DIRECTIONS = (("adam",), ("momentum", "orthogonalize"), ("momentum", "orthogonalize", "normuon"))
DECAYS = ("decay", "cautious_decay")


def optimizer_flaw(recipe: Recipe) -> str:
    """The first chain that the kernels do not know, in words; "" when there is none."""
    return next((said for role, chain in recipe.optim.chains.items() if (said := _flaw(role, chain))), "")


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

    moves = [(_adam if "adam" in _by_kind(bank.chain) else _muon)(bank) for bank in banks]

    def move(numbers):
        norm = torch.stack([torch.linalg.vector_norm(bank.grad) for bank in banks]).norm()
        clip = clip_to(norm)
        for one in moves:
            one(clip, numbers)
        return norm

    return move


def _adam(bank: Any) -> Callable[[Any, Any], None]:
    from ablab.kernels.optimizer_step import adam_step

    adam, state, decay = _by_kind(bank.chain)["adam"], bank.state["adam"], _decay(bank.chain)

    def move(clip, numbers):
        where = bank.weight, bank.grad, state["mean"], state["square"], clip, numbers, bank.lr, bank.decay
        adam_step(*where, adam.beta1, adam.beta2, adam.eps, *decay)

    return move


def _muon(bank: Any) -> Callable[[Any, Any], None]:
    from ablab.kernels.newton_schulz import iterate
    from ablab.kernels.optimizer_step import apply_rows, momentum_step, row_scales

    parts, decay = _by_kind(bank.chain), _decay(bank.chain)
    momentum, orthogonalize, normuon = parts["momentum"], parts["orthogonalize"], parts.get("normuon")
    divisor, triples = COEFFICIENTS[orthogonalize.coefficients]
    how = momentum.warmup_from, momentum.momentum, momentum.warmup_steps, momentum.nesterov, divisor, bank.matmul
    tensors = (split_blocks(tensor, bank.blocks) for tensor in (bank.weight, bank.grad, bank.state["momentum"]["mean"]))
    pieces = list(zip(*tensors, strict=True))

    def move(clip, numbers):
        for i, (weight, grad, mean) in enumerate(pieces):
            factor = SCALES[orthogonalize.scale](*weight.shape[-2:])
            u, scale = momentum_step(grad, mean, clip, numbers, *how)
            polar = iterate(u, triples, scale)
            scales = row_scales(polar, bank.state["normuon"][f"square{i}"], factor, normuon.beta2, normuon.eps) if normuon else None
            apply_rows(weight, polar, scales, numbers, bank.lr, bank.decay, factor, *decay)

    return move


def _by_kind(chain: Chain) -> dict[str, Any]:
    return {part.kind: part for part in chain.steps}


def _decay(chain: Chain) -> tuple[str, str, float]:
    """Mask, schedule and rate, as the kernels take them."""
    parts = _by_kind(chain)
    if cautious := parts.get("cautious_decay"):
        return "cautious" if cautious.ties else "strictly cautious", cautious.schedule, cautious.rate
    decay = parts.get("decay")
    return ("plain", decay.schedule, decay.rate) if decay else ("plain", "constant", 0.0)
