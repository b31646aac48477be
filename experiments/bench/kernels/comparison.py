"""Kernels beside their peers and their floors: `ablab bench kernels`.

forward, backward   medians on random inputs; the backward pass of a fresh forward pass each time
floor               useful FLOPs over the matmul rate and least bytes over the copy rate, both measured in this run
rate                useful work over forward + backward: TFLOP/s, or TB/s where a kernel multiplies nothing
vs best peer        forward + backward of the best form that is not ours, over this one's: above 1 is faster than it
error               |y - y_ref| / |y_ref| against the formula in fp32 on the same inputs; of the first input's gradient likewise
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from ablab.core.errors import UserError
from ablab.core.language.parse import near, parse
from ablab.core.runtime.runtime import Runtime, settle
from ablab.experiments.bench import timing
from ablab.experiments.bench.kernels.attention import attention
from ablab.experiments.bench.kernels.cases import OURS, Case, Cases, Form
from ablab.experiments.bench.kernels.entropy import cross_entropy, linear_cross_entropy
from ablab.experiments.bench.kernels.feedforward import swiglu
from ablab.experiments.bench.kernels.optimizer import optimizer, orthogonal

KERNELS: dict[str, Cases] = {
    "attention": attention,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "newton_schulz": orthogonal,
    "optimizer": optimizer,
}
REPEATS = {"cuda": 30, "cpu": 3}


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
        return self.forward_ms + (self.backward_ms or 0.0)


def bench_kernels(only: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Every case of the kernels that `only` names (a name or a pattern; None: all).  Raises UserError where it fits none, or without the device."""
    chosen = [name for name in KERNELS if only is None or fnmatchcase(name, only)]
    if not chosen:
        raise UserError(
            f"--only {only!r} fits no kernel. {near(only, KERNELS)}Kernels: {', '.join(KERNELS)}"
        )
    device = torch.device(settle(parse(Runtime, {"device": device}, "runtime"), rows=1).device)
    matmul, copy = timing.matmul_rate(device), timing.copy_rate(device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            for case in KERNELS[name](device, Path(folder) / name):
                rows += _rows(case, matmul, copy, device)
                del case  # its inputs, before the next one's come
    ceilings = {"matmul_tflops": matmul / 1e12, "copy_tb_per_second": copy / 1e12}
    return (
        timing.machine(device)
        | {"gpu": device.type == "cuda"}
        | ceilings
        | {"rows": [asdict(row) for row in rows]}
    )


def _rows(case: Case, matmul: float, copy: float, device: torch.device) -> list[Row]:
    floor = case.floor(case.flops / matmul, case.bytes / copy)
    wanted, rows = _reference(case), []
    for name, build in case.forms.items():
        row = Row(case.kernel, case.name, name, 1e3 * floor)
        _free(device)
        try:
            form = build()
            row.same_work = form.same
            _measure(row, case, form, wanted, device)
            del form
        except Exception as why:  # a peer that is missing, out of memory, or refuses the shape: a line, not an end
            told = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
            row = Row(
                case.kernel, case.name, name, 1e3 * floor, note=f"not available: {told[:160]}"
            )
        rows.append(row)
    _compare(rows, case)
    return rows


def _measure(
    row: Row, case: Case, form: Form, wanted: tuple | None, device: torch.device
) -> None:
    before, repeats = form.before or (lambda: fresh(case.inputs)), REPEATS[device.type]
    result = form.call(*before())
    with_backward = isinstance(result, Tensor) and result.requires_grad
    upstream = upstream_of(result, case) if with_backward else None
    if wanted:
        row.error, row.gradient_error = errors(form, case, upstream, wanted)
    del result
    row.forward_ms = 1e3 * timing.median_seconds(
        lambda given: form.call(*given), device, repeats, before
    )
    if with_backward:

        def forward() -> tuple[Tensor, list[Tensor]]:
            given = before()
            return form.call(*given), learned(given)

        row.backward_ms = 1e3 * timing.median_seconds(
            lambda made: torch.autograd.grad(*made, upstream), device, repeats, forward
        )


def _compare(rows: list[Row], case: Case) -> None:
    """Fill in what is read off the times: rates, the floor's share, the best peer's time over this one's."""
    timed = [row for row in rows if row.forward_ms is not None and row.same_work]
    best = min((row.total_ms for row in timed if not row.form.startswith(OURS)), default=None)
    for row in timed:
        row.rate = (case.flops or case.bytes) / row.total_ms / 1e9
        row.unit, row.of_floor = (
            "TFLOP/s" if case.flops else "TB/s",
            row.floor_ms / row.total_ms,
        )
        row.vs_best_peer = best / row.total_ms if best else None


# -- inputs and errors -------------------------------------------------------------------------------------------------
def fresh(inputs: tuple, dtype: Callable[[Tensor], torch.dtype] = lambda x: x.dtype) -> tuple:
    """Copies, because a form may write into what it is given."""
    return tuple(
        x.detach().to(dtype(x), copy=True).requires_grad_(x.requires_grad) for x in inputs
    )


def learned(inputs: tuple) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def upstream_of(result: Tensor, case: Case) -> Tensor:
    """The gradient of the output: the same random numbers for every form; 1 where the output is one number."""
    draw = torch.Generator(result.device).manual_seed(1)
    return (
        torch.randn(result.shape, generator=draw, device=result.device).to(result.dtype)
        if result.ndim
        else torch.ones_like(result)
    )


def _reference(case: Case) -> tuple[Tensor, Tensor | None] | None:
    """Output and first gradient of the formula in fp32; None where there is none, or no memory for it."""
    if case.reference is None:
        return None
    try:
        given = fresh(
            case.inputs, lambda x: torch.float32 if x.is_floating_point() else x.dtype
        )
        result = case.reference(*given)
        if not result.requires_grad:
            return result, None
        like = case.inputs[0].dtype if result.ndim else result.dtype
        upstream = upstream_of(result.detach().to(like), case).to(result.dtype)
        return result.detach(), torch.autograd.grad(result, given[:1], upstream)[0]
    except torch.OutOfMemoryError:
        typer.echo(
            f"{case.kernel}, {case.name}: no memory for the fp32 reference; errors are not shown",
            err=True,
        )
        return None


def errors(
    form: Form, case: Case, upstream: Tensor | None, wanted: tuple[Tensor, Tensor | None]
) -> tuple[float, float | None]:
    given = fresh(case.inputs)
    result = form.call(*given)
    if isinstance(result, tuple):
        return relative(result[0], wanted[0]), relative(result[1], wanted[1])
    if upstream is None or wanted[1] is None:
        return relative(result, wanted[0]), None
    return relative(result.detach(), wanted[0]), relative(
        torch.autograd.grad(result, given[:1], upstream)[0], wanted[1]
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of the wanted, in fp32."""
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.compiler.reset()  # graphs of other forms would fill dynamo's cache, 8 deep, and hold their constants
        gc.collect()
        torch.cuda.empty_cache()


# -- showing it --------------------------------------------------------------------------------------------------------
def show_kernels(found: dict[str, Any]) -> None:
    from ablab.experiments.text import table

    typer.echo(
        f"{found['device']}; measured here: matrix products {found['matmul_tflops']:.3g} TFLOP/s, copies {found['copy_tb_per_second']:.3g} TB/s"
    )
    if not found["gpu"]:
        typer.echo(
            "no GPU: tiny shapes and torch forms alone; Triton's interpreter is not timed"
        )
    if timed := [row for row in found["rows"] if not row["note"]]:
        table([dict(_cells(row)) for row in timed])
    for row in found["rows"]:
        if row["note"]:
            typer.echo(f"{row['kernel']}, {row['case']}, {row['form']}: {row['note']}")


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    shown = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    yield from ((name, row[name]) for name in ("kernel", "case", "form"))
    yield "forward ms", shown(row["forward_ms"], ".3f")
    yield "backward ms", shown(row["backward_ms"], ".3f")
    yield "rate", f"{shown(row['rate'], '.3g')} {row['unit']}".strip()
    yield "floor ms", shown(row["floor_ms"], ".3f")
    yield "of floor", shown(row["of_floor"], ".0%")
    yield "vs best peer", shown(row["vs_best_peer"], ".2f")
    yield "error", shown(row["error"], ".1e")
    yield "error of gradient", shown(row["gradient_error"], ".1e")
