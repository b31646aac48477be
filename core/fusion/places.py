"""Which kernel serves which place of a recipe, and why; the plan with those kernels in it.

    attention      rope, with or without qk_norm, a value residual and a gate per head    core/fusion/attention.py
    attention_fp8  its projections in 8 bits, in training                                 core/fusion/projections.py
    ffn            silu(gate) * up                                                        core/fusion/feedforward.py
    ffn_fp8        the whole of it in 8 bits, in training                                 core/fusion/feedforward.py
    ffn_epilogue   silu(gate) * up where products end, in training, by quack-kernels      core/fusion/feedforward.py
    residual       a branch joins the stream, whose norm the next one reads               core/fusion/residual.py
    loss           readout, also in 8 bits, multiplier, soft cap, cross-entropy, z-loss   core/fusion/head.py
    newton_schulz  symmetric products of Muon                                             kernels/newton_schulz.py
    optimizer      every chain                                                            core/fusion/optimizer.py

The model is the same function of the same parameters: no flag enters it, and nothing is renamed.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from ablab.core.errors import UserError
from ablab.core.fusion import attention, feedforward, head, optimizer, projections, residual
from ablab.core.fusion.rewrite import StepsAside
from ablab.core.model.plan import Plan, plan_of
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import KernelPlace, Settled

KERNELS: dict[KernelPlace, str] = {  # place -> module of kernels/
    "attention": "attention",
    "attention_fp8": "fp8_projection",
    "ffn": "swiglu",
    "ffn_fp8": "fp8_swiglu",
    "ffn_epilogue": "swiglu_epilogue",
    "residual": "residual_norm",
    "loss": "linear_cross_entropy",
    "newton_schulz": "newton_schulz",
    "optimizer": "optimizer_step",
}
REWRITES: dict[KernelPlace, Callable[[Plan, Recipe], Plan]] = {  # those of the model's plan
    "attention": attention.claim,
    "attention_fp8": projections.claim,
    "ffn": feedforward.claim,
    "ffn_fp8": feedforward.claim_in_8_bits,
    "ffn_epilogue": feedforward.claim_in_epilogues,
    "residual": residual.claim,
    "loss": head.claim,
}

# By a library that need not be there: its module, which is also the extra that brings it.
OPTIONAL: dict[KernelPlace, str] = {"ffn_epilogue": "quack"}
Asked = str | tuple[KernelPlace, ...]  # Runtime.kernels
CHOSEN = ("auto", "same")  # ours where they measured faster, and no refusal elsewhere
Shapes = Callable[[Recipe], bool]
Capability = tuple[int, int]
# Compute capability -> place -> the shapes at which `ablab bench kernels` found the kernel faster.
# `ffn_epilogue` has no row: a layer alone was timed, 3.4 ms for 4.0 of 73,728 tokens, 768 channels, and no whole step.
# `attention_fp8` has no row: no GPU has timed it beside torch's casts.  Nor has `residual`, of which none has timed a
# whole step.
FASTER: dict[Capability, dict[KernelPlace, Shapes]] = {
    (9, 0): {  # measured on an H100; an H200 is the same chip beside more memory
        "attention": lambda recipe: (
            recipe.model.attention.head_dim == 64 and recipe.data.context <= 2048
        ),
        "ffn": lambda recipe: recipe.model.width >= 768,
        # 73,728 tokens of a layer: 3.1 ms for 4.0 in bf16; its maps, each with its own casts, 4.0 (an H200, bf16 3.8)
        "ffn_fp8": lambda recipe: recipe.model.width >= 768,
        # in 8 bits too: 15.8 ms for 20.1 in bf16, 73,728 rows
        "loss": lambda recipe: recipe.data.vocab >= 32_000,
        "newton_schulz": lambda recipe: recipe.model.width >= 768,
        "optimizer": lambda recipe: recipe.model.width >= 768,
    }
}


@dataclass(frozen=True)
class Place:
    """kernel: whether ours serves it.  why: in a few words, for people.  flaw: it cannot, for a shape or a stage."""

    kernel: bool
    why: str
    flaw: bool = False


class Card(NamedTuple):
    """What computes: its name, and its compute capability, of a GPU."""

    name: str
    capability: Capability | None


def places(recipe: Recipe, settled: Settled) -> dict[KernelPlace, Place]:
    """Place -> what serves it.  Raises UserError where a kernel is asked for by name and cannot be had."""
    asked = settled.kernels
    names = [place for place in KERNELS if _comes_up(place, asked) and concerns(place, recipe)]
    if asked == "torch":
        return dict.fromkeys(names, Place(False, "torch: runtime.kernels=torch"))
    if settled.shard == "weights":
        if asked not in CHOSEN and asked:
            raise UserError(
                f"runtime.kernels={shown(asked)} needs whole weights, and runtime.shard=weights leaves a part of "
                "them on each GPU; use runtime.kernels=auto"
            )
        return dict.fromkeys(names, Place(False, "torch: runtime.shard=weights"))
    if settled.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        if asked not in CHOSEN and asked:
            raise UserError(
                f"runtime.kernels={shown(asked)} needs a CUDA GPU, and there is none; "
                "use runtime.kernels=auto"
            )
        return dict.fromkeys(names, Place(False, "torch: no GPU"))
    if asked in CHOSEN and settled.dtype != "bf16":
        said = f"torch: the kernels are written for bf16, not {settled.dtype}"
        return dict.fromkeys(names, Place(False, said))
    return {place: _place(place, recipe, settled.dtype, asked) for place in names}


def shown(asked: Asked) -> str:
    """As one writes it: a word, or a list of places."""
    return asked if isinstance(asked, str) else f"[{', '.join(asked)}]"


def _comes_up(place: KernelPlace, asked: Asked) -> bool:
    """Whether there is a word to say of it: one of a library that is not there is not missed unless it is named."""
    if place not in OPTIONAL or not isinstance(asked, str):
        return place not in OPTIONAL or place in asked
    return asked != "triton" and not _lacking(place)


def _lacking(place: KernelPlace) -> str:
    """What the place needs and is not installed; "" where all is there."""
    library = OPTIONAL.get(place)
    return library if library and find_spec(library) is None else ""


def _place(place: KernelPlace, recipe: Recipe, dtype: str, asked: Asked) -> Place:
    if not isinstance(asked, str) and place not in asked:
        return Place(False, f"torch: runtime.kernels={shown(asked)}")
    if asked in CHOSEN and (slower := _slower(place, recipe)):
        return Place(False, f"torch: the kernel is not known to be faster {slower}")
    said = flaw(place, recipe, dtype)
    if not said:
        return Place(True, OPTIONAL.get(place, "triton"))
    if asked not in CHOSEN:
        raise UserError(
            f"runtime.kernels={shown(asked)} cannot serve the {place}: {said}; "
            "use runtime.kernels=auto"
        )
    return Place(False, f"torch: {said}", flaw=True)


def _slower(place: KernelPlace, recipe: Recipe) -> str:
    """Where the kernel was not measured to be faster; "" where it was."""
    card = _card()
    shapes = FASTER.get(card.capability, {}) if card.capability else {}
    if place not in shapes:
        return f"on {card.name}"
    return "" if shapes[place](recipe) else f"at this shape on {card.name}"


def _card() -> Card:
    import torch

    if not torch.cuda.is_available():
        return Card("a CPU", None)
    return Card(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def flaw(place: KernelPlace, recipe: Recipe, dtype: str) -> str:
    """Why the kernel of a place cannot compute what the recipe wants there; "" where it can."""
    if library := _lacking(place):
        return f"{library} is not installed; pip install 'ablab[{library}]'"
    try:
        import_module(f"ablab.kernels.{KERNELS[place]}")
        if place in REWRITES:
            REWRITES[place](plan_of(recipe), recipe)
        if place == "attention":
            return attention.shape_flaw(recipe, dtype)
        if place == "residual":
            return residual.shape_flaw(recipe)
        if place == "loss":
            return head.shape_flaw(recipe)
        if place == "ffn_epilogue":
            return feedforward.epilogue_refusal(plan_of(recipe), dtype, _card().capability)
        if place == "optimizer":
            optimizer.claim(recipe)
    except ImportError as lacking:
        return f"{lacking.name} is not installed"
    except StepsAside as said:
        return str(said)
    return ""


def served(recipe: Recipe, settled: Settled) -> frozenset[KernelPlace]:
    """The places that kernels serve.  Raises UserError as `places` does."""
    return frozenset(name for name, place in places(recipe, settled).items() if place.kernel)


def plan_with(kernels: Collection[KernelPlace], recipe: Recipe) -> Plan:
    """The recipe's plan, rewritten by the kernels of these places.  Raises StepsAside where one cannot be had."""
    plan = plan_of(recipe)
    for place, rewrite in REWRITES.items():
        if place in kernels:
            plan = rewrite(plan, recipe)
    return plan


def concerns(place: KernelPlace, recipe: Recipe) -> bool:
    """Whether there is anything to serve."""
    if place == "newton_schulz":
        return _orthogonalizes(recipe)
    if place == "attention_fp8":
        return projections.in_8_bits(plan_of(recipe))
    if place == "ffn_fp8":
        return feedforward.in_8_bits(plan_of(recipe))
    if place == "ffn_epilogue":
        return feedforward.gated_plainly(plan_of(recipe))
    return True


def _orthogonalizes(recipe: Recipe) -> bool:
    steps = [step for chain in recipe.optim.chains.values() for step in chain.steps]
    return any(getattr(step, "coefficients", "exact") != "exact" for step in steps)
