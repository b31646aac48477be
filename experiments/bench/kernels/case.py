"""A kernel's case: inputs of one shape, the forms that compute the same thing from them, and the work that it is.

The cases stand beside this file, one file a kernel; comparison.py lists them, measure.py times them.  Work is
counted once: products that a form recomputes do not count for it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "ablab"  # forms whose name begins so are no peers


class Unavailable(Exception):
    """A form cannot run here; one line says why."""


@dataclass(frozen=True)
class Form:
    """call(*inputs) -> the output, or (output, gradient of the first input) where one pass makes both.

    before: makes the inputs of a call; None: copies of the case's.  same: False is other work, shown for scale, and
    no peer.
    """

    call: Callable[..., Any]
    before: Callable[[], tuple] | None = None
    same: bool = True


@dataclass(frozen=True)
class Case:
    """One shape.  forms: name -> builder, which may raise; reference: the formula, called on the inputs in fp32."""

    kernel: str
    name: str
    inputs: tuple[Any, ...]
    forms: Mapping[str, Callable[[], Form]]
    reference: Callable[..., Tensor] | None = None
    flops: float = 0.0  # forward and backward
    bytes: float = 0.0  # the least that must be read and written
    # Of the seconds of flops and bytes: max where they overlap, else `one_after_the_other`.
    floor: Callable[[float, float], float] = field(default=max)


Cases = Callable[
    [torch.device, Path], Iterable[Case]
]  # the folder is for what a case must write


def one_after_the_other(flops: float, bytes: float) -> float:
    """The floor, in seconds, of a case whose products and copies do not overlap."""
    return flops + bytes


def ours(device: torch.device, module: str, function: str) -> Callable:
    """A kernel's function.  Raises Unavailable on a CPU: Triton's interpreter is no measure of anything."""
    needs_gpu(device)
    return getattr(import_module(f"ablab.kernels.{module}"), function)


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


def served(refusal: str) -> None:
    if refusal:
        raise Unavailable(refusal)


def compiled(function: Callable, device: torch.device) -> Callable:
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def activations(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
