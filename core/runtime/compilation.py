"""Which parts of a model are compiled, and into how many graphs."""

import math
import os
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from ablab.core.model.objective import Head, of_rows
from ablab.core.model.transformer import Transformer

How = bool | Literal["blocks"]  # as `Runtime.compile`
OfRows = Callable[[Tensor], Any]  # rows of tokens, int [B,T+1] -> numbers


def compiled(
    model: Transformer, heads: tuple[Head, Head], how: How, hooked: bool = False
) -> tuple[OfRows, OfRows]:
    """The heads of rows of tokens, int [B,T+1], compiled as asked.

    hooked: what hooks do around a block stays outside its graph, as gathering its weights does.
    What only evaluates keeps the trunk of a whole model as it is: its graph would take longer to compile than it saves.
    """
    descend, measure = heads
    if not how:
        return of_rows(model, descend), of_rows(model, measure)
    # kinds of blocks, each with and without gradients; beyond it they would run eagerly
    torch._dynamo.config.recompile_limit = 64
    # A number that differs from block to block would reach a GPU by way of a compiled CPU kernel.
    torch._dynamo.config.specialize_float = True
    if how != "blocks":
        return _static(of_rows(model, descend)), of_rows(model, _static(measure))
    for block in model.blocks:
        if hooked:
            block.forward = _static(block.forward)
        else:
            block.compile(dynamic=False)
    # Not the lookup: its compiled gradient sums by atomics, in any order, or one row at a time.
    model.enter = _static(model.enter)  # type: ignore[method-assign]
    return of_rows(model, _static(descend)), of_rows(model, _static(measure))


def _static(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shapes are few and fixed, those of a batch shape included: a symbolic one would cost its kernels speed."""
    return torch.compile(function, dynamic=False)


def compile_kernels(
    model: Transformer,
    heads: tuple[Head, Head],
    move: Callable[[], Any],
    kernels: Collection[str],
    context: int,
    how: How,
) -> None:
    """Compile what kernels of ours a step and an evaluation launch, many at a time.

    move: one step of the optimizer.  Meanwhile PyTorch's compiler is imported, if `how` asks for it.
    Gradients and state hold anything afterwards, weights are as they were.
    """
    device = next(model.parameters()).device
    if not kernels or device.type != "cuda":
        return
    from ablab.kernels.ahead import compiling_only

    # So the tokens are a multiple of 16, as in most micro-batches: Triton compiles for that, and for 1, apart.
    count = max(2, 16 // math.gcd(16, context))
    rows = torch.zeros(count, context + 1, dtype=torch.int64, device=device)
    descend, measure = (of_rows(model, head) for head in heads)
    with compiling_only(os.cpu_count() or 1), torch.autograd.set_multithreading_enabled(False):
        loss, _ = descend(rows)
        loss.backward()
        with torch.no_grad():
            measure(rows)
            if "optimizer" in kernels:
                move()
        if how:
            import_module("torch._inductor.compile_fx")  # `compiled` needs it next
