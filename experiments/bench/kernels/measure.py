"""One case, measured: times of its forms, their errors, and how near they come to the floor and to each other.

forward, backward   medians on random inputs; the backward pass of a fresh forward pass each time
floor               useful FLOPs over the matmul rate and least bytes over the copy rate, both measured in this run
rate                useful work over forward + backward: TFLOP/s, or TB/s where a kernel multiplies nothing
vs best peer        forward + backward of the best form that is not ours, over this one's: above 1 is faster than it
error               |y - y_ref| / |y_ref| against the formula in fp32 on the same inputs; of the first input's
                    gradient likewise
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import typer
from torch import Tensor

from ablab.experiments.bench.clocks import median_seconds
from ablab.experiments.bench.kernels.case import OURS, Case, Form

REPEATS = {"cuda": 30, "cpu": 3}
NOTE = 160  # characters of a reason


class Ceilings(NamedTuple):
    """What the device does at most, measured."""

    matmul: float  # FLOP/s
    copy: float  # bytes/s, read and written


@dataclass
class Row:
    """Times in ms.  None: does not apply, or the form is not available, and the note says why."""

    kernel: str
    case: str
    form: str
    floor_ms: float
    forward_ms: float | None = None
    backward_ms: float | None = None
    rate: float | None = None
    unit: str = ""
    of_floor: float | None = None  # floor / time
    vs_best_peer: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    same_work: bool = True  # False: shown for scale, neither rated nor a peer
    note: str = ""

    @property
    def total_ms(self) -> float:
        """Of a form that was timed."""
        assert self.forward_ms is not None
        return self.forward_ms + (self.backward_ms or 0.0)


class Answer(NamedTuple):
    """An output, and the gradient of the first input where there is one."""

    output: Tensor
    gradient: Tensor | None


def measure(case: Case, ceilings: Ceilings, device: torch.device) -> list[Row]:
    """A row for each form.  A peer that is missing, out of memory, or refuses the shape is a line, not an end."""
    floor = case.floor(case.flops / ceilings.matmul, case.bytes / ceilings.copy)
    wanted = reference(case)
    rows = []
    for name, build in case.forms.items():
        row = Row(case.kernel, case.name, name, 1e3 * floor)
        _free(device)
        try:
            _fill(row, case, build(), wanted, device)
        except Exception as why:
            note = f"not available: {_reason(why)}"
            row = Row(case.kernel, case.name, name, 1e3 * floor, note=note)
        rows.append(row)
    compare(rows, case)
    return rows


def _reason(why: Exception) -> str:
    told = str(why).strip() or type(why).__name__
    return told.splitlines()[0][:NOTE]


def _fill(
    row: Row,
    case: Case,
    form: Form,
    wanted: Answer | None,
    device: torch.device,
) -> None:
    """Times and errors of one form."""
    before = form.before or (lambda: fresh(case.inputs))
    repeats = REPEATS[device.type]
    result = form.call(*before())
    upstream = None
    if isinstance(result, Tensor) and result.requires_grad:
        upstream = upstream_of(result)
    if wanted:
        row.error, row.gradient_error = errors(form, case, upstream, wanted)
    del result

    def forward(given: tuple) -> None:
        form.call(*given)

    def fresh_pass() -> tuple[Tensor, list[Tensor]]:
        given = before()
        return form.call(*given), learned(given)

    def backward(made: tuple[Tensor, list[Tensor]]) -> None:
        output, inputs = made
        torch.autograd.grad([output], inputs, [upstream])

    row.same_work = form.same
    row.forward_ms = 1e3 * median_seconds(forward, device, repeats, before)
    if upstream is not None:
        row.backward_ms = 1e3 * median_seconds(backward, device, repeats, fresh_pass)


def compare(rows: list[Row], case: Case) -> None:
    """Fill in what is read off the times: rates, the floor's share, the best peer's time over this one's."""
    timed = [row for row in rows if row.forward_ms is not None and row.same_work]
    peers = [row.total_ms for row in timed if not row.form.startswith(OURS)]
    best = min(peers, default=None)
    for row in timed:
        row.rate = (case.flops or case.bytes) / row.total_ms / 1e9
        row.unit = "TFLOP/s" if case.flops else "TB/s"
        row.of_floor = row.floor_ms / row.total_ms
        row.vs_best_peer = best / row.total_ms if best else None


# -- inputs and errors -----------------------------------------------------------------------------------
def as_it_is(x: Tensor) -> torch.dtype:
    return x.dtype


def in_fp32(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_floating_point() else x.dtype


def fresh(inputs: tuple, dtype: Callable[[Tensor], torch.dtype] = as_it_is) -> tuple:
    """Copies, because a form may write into what it is given."""
    copies = [x.detach().to(dtype(x), copy=True) for x in inputs]
    for copy, x in zip(copies, inputs, strict=True):
        copy.requires_grad_(x.requires_grad)
    return tuple(copies)


def learned(inputs: tuple) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def upstream_of(result: Tensor) -> Tensor:
    """The gradient of the output: the same random numbers for every form; 1 where the output is one number."""
    if not result.ndim:
        return torch.ones_like(result)
    draw = torch.Generator(result.device).manual_seed(1)
    random = torch.randn(result.shape, generator=draw, device=result.device)
    return random.to(result.dtype)


def reference(case: Case) -> Answer | None:
    """Output and first gradient of the formula in fp32; None where there is none, or no memory for it."""
    if case.reference is None:
        return None
    try:
        given = fresh(case.inputs, in_fp32)
        result = case.reference(*given)
        if not result.requires_grad:
            return Answer(result, None)
        dtype = case.inputs[0].dtype if result.ndim else result.dtype
        upstream = upstream_of(result.detach().to(dtype)).to(result.dtype)
        return Answer(result.detach(), _first_gradient(result, given, upstream))
    except torch.OutOfMemoryError:
        what = f"{case.kernel}, {case.name}"
        typer.echo(
            f"{what}: no memory for the fp32 reference; errors are not shown",
            err=True,
        )
        return None


def _first_gradient(result: Tensor, given: tuple, upstream: Tensor) -> Tensor:
    return torch.autograd.grad([result], given[:1], [upstream])[0]


def errors(
    form: Form,
    case: Case,
    upstream: Tensor | None,
    wanted: Answer,
) -> tuple[float, float | None]:
    """Of the output and of the first gradient, where both sides have one."""
    given = fresh(case.inputs)
    result = form.call(*given)
    if isinstance(result, tuple):
        output, gradient = result
    else:
        output = result.detach()
        gradient = None if upstream is None else _first_gradient(result, given, upstream)
    error = relative(output, wanted.output)
    if gradient is None or wanted.gradient is None:
        return error, None
    return error, relative(gradient, wanted.gradient)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of the wanted, in fp32."""
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        # Graphs of other forms would fill dynamo's cache, 8 deep, and hold their constants.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
