"""Which parts of a model are compiled, and into how many graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ablab.core.loss import Head, of_rows
from ablab.core.model import Transformer


def compiled(model: Transformer, heads: tuple[Head, Head], how: bool | str) -> list[Callable[[Tensor], Any]]:
    """The heads of rows of tokens, int [B,T+1], compiled as `Runtime.compile` says.

    What only evaluates keeps the trunk of a whole model as it is: its graph would take longer to compile than it saves.
    """
    if not how:
        return [of_rows(model, head) for head in heads]
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, each with and without gradients; beyond it they would run eagerly
    torch._dynamo.config.specialize_float = True  # a number that differs from block to block would reach a GPU by way of a compiled CPU kernel
    descend, measure = heads
    if how != "blocks":
        return [torch.compile(of_rows(model, descend)), of_rows(model, torch.compile(measure))]
    for block in model.blocks:
        block.compile()
    model.embed = torch.compile(model.embed)
    return [of_rows(model, torch.compile(head)) for head in heads]
