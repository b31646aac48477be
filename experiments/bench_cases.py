"""What `ablab bench kernels` compares: for each kernel its cases, and for each case the forms that compute the same thing.

A new kernel adds one function under @kernel.  Shapes: B rows, T tokens, H heads, KV key-value heads, D channels a head;
N tokens, V vocabulary, W channels.  Work is counted once: products that a form recomputes do not count for it.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablab.ablations.interventions.qk_norm import normalise
from ablab.ablations.registry import discover
from ablab.core.blocks import rotate
from ablab.core.part import fields_of
from ablab.core.runtime import Runtime
from ablab.core.trainer import Trainer
from ablab.core.transforms import COEFFICIENTS, newton_schulz, split_blocks
from ablab.experiments.bench_random import NAME, experiment_on_random_tokens

OURS = "ablab"  # forms whose name begins so are no peers
Z = 1e-4  # weight of the z-loss


class Unavailable(Exception):
    """A form cannot run here; one line says why."""


@dataclass(frozen=True)
class Form:
    """call(*inputs) -> the output, or (output, gradient of the first input) where one pass makes both."""

    call: Callable[..., Any]
    before: Callable[[], tuple] | None = None  # makes the inputs of a call; None: copies of the case's
    same: bool = True  # False: other work, shown for scale, and no peer


@dataclass(frozen=True)
class Case:
    """One shape.  forms: name -> builder, which may raise; reference: the formula, called on the inputs in fp32."""

    kernel: str
    name: str
    inputs: tuple[Any, ...]
    forms: dict[str, Callable[[], Form]]
    reference: Callable[..., Tensor] | None = None
    flops: float = 0.0  # forward and backward
    bytes: float = 0.0  # the least that must be read and written
    floor: Callable[[float, float], float] = field(default=max)  # of the seconds of flops and bytes: max where they overlap, else sum


Cases = Callable[[torch.device, Path], Iterable[Case]]  # the folder is for what a case must write
KERNELS: dict[str, Cases] = {}


def kernel(name: str) -> Callable[[Cases], Cases]:
    def decorate(cases: Cases) -> Cases:
        KERNELS[name] = cases
        return cases

    return decorate


def ours(device: torch.device, module: str, function: str) -> Callable:
    """A kernel's function.  Raises Unavailable on a CPU: Triton's interpreter is no measure of anything."""
    needs_gpu(device)
    return getattr(import_module(f"ablab.kernels.{module}"), function)


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


def compiled(function: Callable, device: torch.device) -> Callable:
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def activations(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def served(refusal: str) -> None:
    if refusal:
        raise Unavailable(refusal)


# -- attention ---------------------------------------------------------------------------------------------------------
@kernel("attention")
def attention(device: torch.device, folder: Path) -> Iterable[Case]:
    """Packed qkv -> QK-norm, rotary positions, causal attention, gate for each head.  Useful work: 2 products of the scores forward, 4 backward."""
    shapes = [(96, 12, 12, 384, 64), (48, 18, 6, 768, 64), (16, 12, 12, 2048, 64)] if device.type == "cuda" else [(2, 4, 2, 32, 16)]
    dtype = activations(device)
    for shape in shapes:
        b, h, kv, t, d = shape
        random = partial(torch.randn, device=device)
        qkv, gate = random(b, t, (h + 2 * kv) * d, dtype=dtype), 2 * random(b, t, h, dtype=dtype).sigmoid()
        angles = torch.arange(t, device=device)[:, None] * 10_000.0 ** (-torch.arange(d // 2, device=device) / (d / 2))
        learned = [x.requires_grad_() for x in (qkv, 1 + 0.1 * random(d), 1 + 0.1 * random(d), gate)]
        size = (4 * qkv.numel() + 3 * b * t * h * d) * qkv.element_size()  # qkv read twice, d qkv written; y written and read, dy read
        forms = {
            "torch, cuDNN SDPA": partial(_sdpa_form, shape, SDPBackend.CUDNN_ATTENTION, device),
            "torch, flash SDPA": partial(_sdpa_form, shape, SDPBackend.FLASH_ATTENTION, device),
            "torch, SDPA as it chooses": partial(_sdpa_form, shape, None, device),
            "torch, FlexAttention": partial(_flex_form, shape, device),
            "ablab": partial(_own_attention, shape, dtype, device),
        }
        reference = _attention(shape, partial(_with, [SDPBackend.MATH], _sdpa(shape)))
        name = f"B {b}, H {h}, KV {kv}, T {t}, D {d}"
        yield Case("attention", name, (*learned, angles.cos(), angles.sin()), forms, reference, 6 * b * h * t * t * d, size)


def _attention(shape: tuple[int, ...], mix: Callable) -> Callable[..., Tensor]:
    _, heads, kv_heads, _, dim = shape

    def form(qkv, q_gain, k_gain, gate, cos, sin):
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, dim)).split((heads, kv_heads, kv_heads), dim=2)
        q, k = rotate(*normalise(q, k, q_gain=q_gain, k_gain=k_gain, scale=1.0, eps=1e-6), 0, cos=cos, sin=sin)
        y = mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return (y * gate[..., None]).flatten(2)

    return form


def _sdpa(shape: tuple[int, ...]) -> Callable[..., Tensor]:
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=shape[1] != shape[2])


def _with(backends: list[SDPBackend] | None, call: Callable, *given: Any) -> Any:
    with sdpa_kernel(backends) if backends else nullcontext():
        return call(*given)


def _sdpa_form(shape: tuple[int, ...], backend: SDPBackend | None, device: torch.device) -> Form:
    if backend:
        needs_gpu(device)
    return Form(partial(_with, [backend] if backend else None, compiled(_attention(shape, _sdpa(shape)), device)))


def _flex_form(shape: tuple[int, ...], device: torch.device) -> Form:
    needs_gpu(device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, heads, kv_heads, length, _ = shape
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
    return Form(compiled(_attention(shape, partial(flex_attention, block_mask=mask, enable_gqa=heads != kv_heads)), device))


def _own_attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Form:
    fused = ours(device, "attention", "attention")
    _, heads, kv_heads, _, dim = shape
    served(ours(device, "attention", "serves")(dim, dtype, heads, kv_heads))
    return Form(lambda qkv, q_gain, k_gain, gate, cos, sin: fused(qkv, heads, kv_heads, cos, sin, q_gain, k_gain, gate=gate))


# -- cross-entropy -----------------------------------------------------------------------------------------------------
def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy + z-loss, summed over tokens, in nats."""
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="sum") + Z * logits.logsumexp(-1).square().sum()


def _tokens(device: torch.device) -> tuple[int, int, int]:
    return (36_864, 32_000, 768) if device.type == "cuda" else (64, 256, 32)


@kernel("cross_entropy")
def cross_entropy(device: torch.device, folder: Path) -> Iterable[Case]:
    """Logits [N,V] -> loss and its gradient.  Floor: the logits read once, their gradient written once."""
    n, v, _ = _tokens(device)
    logits = torch.randn(n, v, device=device, dtype=activations(device), requires_grad=True)
    targets = torch.randint(v, (n,), device=device)

    def liger() -> Form:
        needs_gpu(device)
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return Form(LigerCrossEntropyLoss(lse_square_scale=Z, reduction="sum"))

    def own() -> Form:
        in_place = ours(device, "cross_entropy", "cross_entropy_")

        def call(logits, targets):
            nats, lse = in_place(gradient := logits.detach(), targets, z_weight=Z)
            return (nats + Z * lse.square()).sum(), gradient

        return Form(call)

    forms = {"torch": lambda: Form(compiled(_entropy, device)), "liger-kernel": liger, "ablab": own}
    yield Case("cross_entropy", f"N {n}, V {v}", (logits, targets), forms, _entropy, bytes=2 * logits.numel() * logits.element_size())


@kernel("linear_cross_entropy")
def linear_cross_entropy(device: torch.device, folder: Path) -> Iterable[Case]:
    """Activations [N,W], readout [V,W] -> loss and both gradients.  Floor: three products, then the logits as above."""
    n, v, w = _tokens(device)
    x = torch.randn(n, w, device=device, dtype=activations(device), requires_grad=True)
    weight = (torch.randn(v, w, device=device) * w**-0.5).to(x.dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device)
    plain = lambda x, weight, targets: _entropy(x @ weight.T, targets)  # noqa: E731

    def liger() -> Form:
        needs_gpu(device)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(lse_square_scale=Z, reduction="sum")
        return Form(lambda x, weight, targets: loss(weight, x, targets))

    def own(chunk: int) -> Form:
        fused = ours(device, "linear_cross_entropy", "linear_cross_entropy")
        served(ours(device, "linear_cross_entropy", "serves")(x.dtype, device))
        return Form(lambda x, weight, targets: fused(x, weight, targets, z_weight=Z, chunk=chunk)[0])

    forms = {"torch": lambda: Form(compiled(plain, device)), "liger-kernel": liger, "ablab": partial(own, 0), "ablab, chunks of 4096": partial(own, 4096)}
    least = 2 * n * v * x.element_size()
    yield Case("linear_cross_entropy", f"N {n}, V {v}, W {w}", (x, weight, targets), forms, plain, 6 * n * v * w, least, lambda a, b: a + b)


# -- optimizer ---------------------------------------------------------------------------------------------------------
def schulz_flops(shape: Iterable[int], coefficients: str) -> float:
    """Of Newton-Schulz on [N,r,c], products counted in full: X X^T, its square, and their sum times X, for each triple."""
    count, rows, columns = shape
    short, long = sorted((rows, columns))
    return count * len(COEFFICIENTS[coefficients][1]) * (4 * short**2 * long + 2 * short**3)


@kernel("newton_schulz")
def orthogonal(device: torch.device, folder: Path) -> Iterable[Case]:
    """Batches of matrices -> approximate polar factors, the batches of the 70M model; products in bf16."""
    shapes = [(24, 768, 768), (16, 2048, 768), (8, 768, 2048), (8, 768, 768)] if device.type == "cuda" else [(2, 32, 48)]
    for shape in shapes:
        yield _schulz_case(shape, "polar7", device)


def _schulz_case(shape: tuple[int, ...], coefficients: str, device: torch.device) -> Case:
    dtype, plain = activations(device), partial(newton_schulz, coefficients=coefficients)

    def own() -> Form:
        fused = ours(device, "newton_schulz", "orthogonalise")
        return Form(lambda matrices: fused(matrices, *COEFFICIENTS[coefficients], dtype))

    forms = {"torch": lambda: Form(compiled(partial(plain, dtype=dtype), device)), "ablab": own}
    matrices = torch.randn(shape, device=device)
    return Case("newton_schulz", "x".join(map(str, shape)), (matrices,), forms, partial(plain, dtype=torch.float32), schulz_flops(shape, coefficients))


@kernel("optimizer")
def optimizer(device: torch.device, folder: Path) -> Iterable[Case]:
    """The whole optimizer step of the full stack: clip, move every bank, clear the gradients.  Floor: products, then every tensor read and written."""
    discover()
    name = "loo_70m" if device.type == "cuda" else "quickstart"
    experiment = experiment_on_random_tokens(name, {}, folder)
    asked = {"torch": {"kernels": "torch"}, OURS: {}} if "kernels" in fields_of(Runtime) else {OURS: {}}

    data, trainer = folder / "data" / NAME, partial(Trainer, experiment.recipes["full"])
    banks = trainer(Runtime(device="cpu"), data).optimizer.banks
    shapes = [bank.weight.shape for bank in banks]

    def full(more: dict[str, Any]) -> Form:
        made, steps = trainer(Runtime(device=device.type, **more), data).optimizer, iter(range(1, 1 << 30))
        return _stepping(lambda: made.step(next(steps)), [bank.grad for bank in made.banks])

    def adamw() -> Form:
        weights = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        return replace(_stepping(torch.optim.AdamW(weights, fused=True).step, [weight.grad for weight in weights]), same=False)

    forms = {form: partial(full, more) for form, more in asked.items()} | {"torch, fused AdamW, for scale": adamw}
    size = sum(4 * (4 * bank.weight.numel() + 2 * sum(x.numel() for state in bank.state.values() for x in state.values())) for bank in banks)
    yield Case("optimizer", f"{name}, full", (), forms, None, sum(map(_bank_flops, banks)), size, lambda a, b: a + b)


def _stepping(step: Callable[[], Any], gradients: list[Tensor]) -> Form:
    """A step clears the gradients, so each call finds the same random ones again."""
    random = [torch.randn_like(gradient) for gradient in gradients]

    def before() -> tuple:
        for gradient, value in zip(gradients, random, strict=True):
            gradient.copy_(value)
        return ()

    return Form(step, before)


def _bank_flops(bank: Any) -> float:
    chosen = [part.coefficients for part in bank.chain.steps if getattr(part, "coefficients", None) in COEFFICIENTS]
    return sum(schulz_flops(piece.shape, one) for one in chosen for piece in split_blocks(bank.weight, bank.blocks))
