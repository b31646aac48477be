"""Which parts of a model are compiled, and into how many graphs."""

import math
import os
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ablab.core.model.objective import Head, of_rows
from ablab.core.model.transformer import Transformer
from ablab.core.train.banks import Optimizer


def compiled(
    model: Transformer, heads: tuple[Head, Head], how: bool | str
) -> list[Callable[[Tensor], Any]]:
    """The heads of rows of tokens, int [B,T+1], compiled as `Runtime.compile` says.

    What only evaluates keeps the trunk of a whole model as it is: its graph would take longer to compile than it saves.
    """
    if not how:
        return [of_rows(model, head) for head in heads]
    torch._dynamo.config.recompile_limit = (
        64  # kinds of blocks, each with and without gradients; beyond it they would run eagerly
    )
    torch._dynamo.config.specialize_float = True  # a number that differs from block to block would reach a GPU by way of a compiled CPU kernel
    descend, measure = heads
    if how != "blocks":
        return [torch.compile(of_rows(model, descend)), of_rows(model, torch.compile(measure))]
    for block in model.blocks:
        block.compile()
    model.enter = torch.compile(
        model.enter
    )  # not the lookup: its compiled gradient sums by atomics, in any order, or one row at a time
    return [of_rows(model, torch.compile(head)) for head in heads]


def compile_kernels(
    model: Transformer,
    heads: tuple[Head, Head],
    optimizer: Optimizer,
    kernels: Collection[str],
    context: int,
    how: bool | str,
) -> None:
    """Compile what kernels of ours a step and an evaluation launch, many at a time, while PyTorch's compiler is imported if `how` asks for it.

    Gradients hold anything afterwards, weights and the optimizer's state are as they were.
    """
    if not kernels or optimizer.device.type != "cuda":
        return
    from ablab.kernels.ahead import compiling_only

    count = max(
        2, 16 // math.gcd(16, context)
    )  # so the tokens are a multiple of 16, as in most micro-batches: Triton compiles for that, and for 1, apart
    rows = torch.zeros(count, context + 1, dtype=torch.int64, device=optimizer.device)
    descend, measure = (of_rows(model, head) for head in heads)
    with compiling_only(os.cpu_count() or 1), torch.autograd.set_multithreading_enabled(False):
        descend(rows)[0].backward()
        torch.no_grad()(measure)(rows)
        if "optimizer" in kernels:
            optimizer.move.function(torch.zeros(4, device=optimizer.device))
        if how:
            import_module("torch._inductor.compile_fx")  # `compiled` needs it next
