"""Which kernel serves which place of a model, and putting it there after the build.

The plan of a model names its stages; a sequence of them that one kernel of kernels/ computes is replaced by that
kernel.  The model is the same function of the same parameters: no flag enters it, and nothing is renamed.

    attention      rope, with or without qk_norm, a value residual and a gate per head    kernels/attention.py
    ffn            silu(gate) * up                                                        kernels/swiglu.py
    loss           readout, multiplier, soft cap, cross-entropy and z-loss                kernels/linear_cross_entropy.py
    newton_schulz  symmetric products of Muon                                             kernels/newton_schulz.py
    optimizer      every chain, by core/fusion/optimizer.py                                      kernels/optimizer_step.py
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ablab.core.errors import UserError
from ablab.core.fusion.optimizer import optimizer_flaw
from ablab.core.language.declare import Stage
from ablab.core.model.plan import AttentionPlan, Plan, Stages, plan_of
from ablab.core.recipe.recipe import Recipe

KERNELS = {  # place -> module of kernels/
    "attention": "attention",
    "ffn": "swiglu",
    "loss": "linear_cross_entropy",
    "newton_schulz": "newton_schulz",
    "optimizer": "optimizer_step",
}
# GPU -> place -> the shapes at which `ablab bench kernels` found the kernel faster.
FASTER: dict[str, dict[str, Callable[[Recipe], bool]]] = {
    "NVIDIA H100 80GB HBM3": {
        "attention": lambda recipe: (
            recipe.model.attention.head_dim == 64 and recipe.data.context <= 2048
        ),
        "ffn": lambda recipe: recipe.model.width >= 768,
        "loss": lambda recipe: recipe.data.vocab >= 32_000,
        "newton_schulz": lambda recipe: recipe.model.width >= 768,
        "optimizer": lambda recipe: recipe.model.width >= 768,
    }
}


@dataclass(frozen=True)
class Place:
    """`kernel`: whether ours serves it; `why`: in a few words, for people.  `flaw`: a shape or stage that it cannot serve."""

    kernel: bool
    why: str
    flaw: bool = False


def places(recipe: Recipe, runtime: Mapping[str, Any]) -> dict[str, Place]:
    """Place -> what serves it.  runtime: settled.  Raises UserError where `triton` is asked for and cannot be had."""
    plan, asked = plan_of(recipe), runtime["kernels"]
    flaws: dict[str, Callable[[], str]] = {
        "attention": lambda: _attention_flaw(plan, recipe, runtime["dtype"]),
        "ffn": lambda: _ffn_flaw(plan, recipe),
        "loss": lambda: _loss_flaw(plan, recipe),
        "newton_schulz": lambda: "",
        "optimizer": lambda: optimizer_flaw(recipe),
    }
    if not _orthogonalizes(recipe):
        del flaws["newton_schulz"]
    if asked == "torch":
        return dict.fromkeys(flaws, Place(False, "torch: runtime.kernels=torch"))
    if runtime["device"] != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        if asked == "triton":
            raise UserError(
                "runtime.kernels=triton needs a CUDA GPU, and there is none; use runtime.kernels=auto"
            )
        return dict.fromkeys(flaws, Place(False, "torch: no GPU"))
    if asked == "auto" and runtime["dtype"] != "bf16":
        return dict.fromkeys(
            flaws,
            Place(False, f"torch: the kernels are written for bf16, not {runtime['dtype']}"),
        )
    return {place: _place(place, recipe, flaw, asked) for place, flaw in flaws.items()}


def _place(place: str, recipe: Recipe, flaw: Callable[[], str], asked: str) -> Place:
    if asked == "auto" and place not in (faster := FASTER.get(gpu := _gpu(), {})):
        return Place(False, f"torch: the kernel is not known to be faster on {gpu}")
    if asked == "auto" and not faster[place](recipe):
        return Place(
            False, f"torch: the kernel is not known to be faster at this shape on {gpu}"
        )
    if not (said := _missing(KERNELS[place]) or flaw()):
        return Place(True, "triton")
    if asked == "triton":
        raise UserError(
            f"runtime.kernels=triton cannot serve the {place}: {said}; use runtime.kernels=auto"
        )
    return Place(False, f"torch: {said}", flaw=True)


def _missing(kernel: str) -> str:
    try:
        import_module(f"ablab.kernels.{kernel}")
    except ImportError as lacking:
        return f"{lacking.name} is not installed"
    return ""


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


# -- what a kernel can serve -------------------------------------------------------------------------------------------
KNOWN = {
    "on_qk": ("qk_norm",),
    "on_values": ("remember", "mix", "mix_normalised"),
    "on_heads": ("gate",),
}  # one of them, or nothing


def _attention_flaw(plan: Plan, recipe: Recipe, dtype: str) -> str:
    import torch

    from ablab.kernels.attention import serves

    for block in plan.blocks:
        if name_of(block.attention.position) != "rope":
            return f"positions by {block.attention.position.function.__name__}, which the kernel does not know"
        if name_of(block.attention.mix) != "causal":
            return f"values mixed by {block.attention.mix.function.__name__}, which the kernel does not know"
        for slot, known in KNOWN.items():
            if unknown := _unknown(getattr(block.attention, slot), known):
                return f"{slot} holds {unknown}, which the kernel does not know"
        if flaw := _gate_flaw(block.attention, recipe):
            return flaw
    model = recipe.model
    return serves(
        model.attention.head_dim,
        {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        model.heads,
        model.kv_heads,
    )


def _gate_flaw(plan: AttentionPlan, recipe: Recipe) -> str:
    gates = next(
        (stage.bound["project"].weight.shape[0] for stage in plan.on_heads.values()),
        recipe.model.heads,
    )
    return (
        ""
        if gates == recipe.model.heads
        else f"{gates} gates for {recipe.model.heads} heads; the kernel knows one a head"
    )


def _unknown(stages: Stages, known: tuple[str, ...]) -> str:
    names = [name_of(stage) for stage in stages.values()]
    strange = next(
        (kind for kind, name in zip(stages, names, strict=True) if name not in known), ""
    )
    return strange or (" and ".join(stages) if len(stages) > 1 else "")


def _ffn_flaw(plan: Plan, recipe: Recipe) -> str:
    known = all(name_of(block.ffn.inner) == "swiglu" for block in plan.blocks)
    return (
        ""
        if known
        else f"the feed-forward is {recipe.model.ffn.kind}, which the kernel does not know"
    )


def _loss_flaw(plan: Plan, recipe: Recipe) -> str:
    names = [name_of(stage) for stage in plan.on_logits.values()]
    factors = [name for name in names if name == "multiply"]
    if names not in (factors, [*factors, "tanh"], [*factors, "rational"]):
        return f"on_logits holds {', '.join(plan.on_logits)}, which the kernel does not know"
    if plan.readout and plan.readout.product:
        kind = next(
            part.kind for part in recipe.model.products if part.product("readout", plan.readout)
        )
        return f"the readout multiplies by {kind}, which the kernel does not know"
    strange = [part.kind for part in recipe.objective if not hasattr(part, "of_squares")]
    return (
        f"the objective holds {', '.join(strange)}, which the kernel does not know"
        if strange
        else ""
    )


def _orthogonalizes(recipe: Recipe) -> bool:
    steps = [step for chain in recipe.optim.chains.values() for step in chain.steps]
    return any(getattr(step, "coefficients", "exact") != "exact" for step in steps)


def name_of(stage: Stage) -> str:
    """What a kernel knows the stage by; "" for one that only torch can run."""
    return getattr(stage.function, "fusable", "")


# -- putting it there --------------------------------------------------------------------------------------------------
def fuse_blocks(model: Any, kernels: set[str]) -> None:
    for place, fuse in (("attention", fuse_attention), ("ffn", fuse_ffn)):
        if place in kernels:
            fuse(model)


def fuse_attention(model: Any) -> None:
    """One kernel for what lies between the packed projection and the heads' outputs, in every block."""
    for block in model.blocks:
        block.attention.attend = _attend(block.attention)


def _attend(attention: Any) -> Callable:
    import torch

    from ablab.kernels.attention import attention as kernel

    queries, keys, _ = attention.heads
    cos, sin = attention.position.cos, attention.position.sin
    ones = torch.ones(2 * cos.shape[-1], device=cos.device)
    gains, values, strengths = (
        _gains(attention.on_qk, ones),
        _values(attention.on_values, queries + keys, ones),
        _strengths(attention.on_heads),
    )

    def attend(x, carry):
        qkv = attention.qkv(x)
        first, weights, carry = values(qkv.unflatten(-1, (queries + 2 * keys, -1)), carry)
        y = kernel(
            qkv,
            queries,
            keys,
            cos,
            sin,
            **gains(),
            first=first,
            weights=weights,
            gate=strengths(x),
        )
        return y.unflatten(-1, (queries, -1)), carry

    return attend


def fuse_ffn(model: Any) -> None:
    """One kernel for what lies between the two projections of a feed-forward, in every block."""
    from ablab.kernels.swiglu import swiglu

    for block in model.blocks:
        block.ffn.inner.function = lambda x, *, gate_up, down: down(swiglu(gate_up(x)))


def _gains(stages: Mapping[str, Any], ones: Any) -> Callable:
    """() -> q_gain and k_gain [D] in fp32, and eps; nothing without QK-norm."""
    if not (bound := _sole(stages)):
        return dict
    return lambda: {
        "q_gain": ones * (bound["q_gain"] * bound["scale"]),
        "k_gain": ones * bound["k_gain"],
        "eps": bound["eps"],
    }


def _values(stages: Mapping[str, Any], skip: int, ones: Any) -> Callable:
    """(heads of qkv [B,T,H+2KV,D], carry) -> the first layer's values or None, (own, first) weights [2] or None, carry."""
    bound, name = _sole(stages), next((stage.function.fusable for stage in stages.values()), "")
    if not name:
        return lambda heads, carry: (None, None, carry)
    if name == "remember":
        return lambda heads, carry: (None, None, {**carry, "first_values": heads[:, :, skip:]})
    weights = {
        "mix": lambda pair: pair,
        "mix_normalised": lambda pair: pair * (bound["scale"] * pair.square().sum().rsqrt()),
    }[name]
    return lambda heads, carry: (carry["first_values"], weights(_pair(bound, ones)), carry)


def _pair(bound: Mapping[str, Any], ones: Any) -> Any:
    import torch

    return torch.cat((ones[:1] * bound["own"], ones[:1] * bound["first"]))


def _strengths(stages: Mapping[str, Any]) -> Callable:
    """normed x [B,T,W] -> what each head's output is multiplied by [B,T,H], or None."""
    if not (bound := _sole(stages)):
        return lambda x: None
    import torch

    project, channels = bound["project"], bound["channels"]
    gates = project.weight.shape[0]

    def strengths(x):
        # Rows to a multiple of 8: cuBLAS multiplies by 12 rows at half the speed, its loads being narrow.
        padded = torch.nn.functional.pad(project.weight, (0, 0, 0, -gates % 8))
        return (project.product(x[..., :channels], padded).sigmoid() * bound["factor"])[
            ..., :gates
        ]

    return strengths


def _sole(stages: Mapping[str, Any]) -> dict[str, Any]:
    """What the one stage of a slot has bound; empty where there is none."""
    return next((values_of(stage) for stage in stages.values()), {})


def fused_heads(model: Any, penalties: tuple[Any, ...]) -> tuple[Callable, Callable]:
    """As `heads_of` of core/model/objective.py; most of the logits never exist."""
    from ablab.kernels.linear_cross_entropy import linear_cross_entropy, token_losses

    bound = [(stage.function.fusable, values_of(stage)) for stage in model.on_logits.values()]
    how: dict[str, Any] = {"multiplier": 1.0}
    for name, values in bound:
        how |= (
            {"multiplier": how["multiplier"] * values["factor"]}
            if name == "multiply"
            else {"cap": values["cap"], "cap_form": name}
        )
    table, of_squares = (
        model.readout.weight if hasattr(model, "readout") else model.embedding.table,
        sum(part.of_squares for part in penalties),
    )

    def read(x, targets):
        x = model.norm(x).flatten(0, 1)
        return x, table.to(x.dtype), targets.flatten()

    return (
        lambda x, targets: linear_cross_entropy(*read(x, targets), **how, z_weight=of_squares),
        lambda x, targets: token_losses(*read(x, targets), **how).view(targets.shape),
    )


def values_of(stage: Any) -> dict[str, Any]:
    """Bound name -> parameter, map, table or number of a built stage."""
    return {**stage._parameters, **stage._modules, **stage._buffers, **stage.numbers}
