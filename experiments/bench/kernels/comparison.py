"""All kernels beside their peers and their floors: `ablab bench kernels`.  measure.py says what the columns mean."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import typer

from ablab.core.errors import UserError
from ablab.core.language.parse import near, parse
from ablab.core.runtime.runtime import Runtime, settle
from ablab.experiments.bench.ceilings import copy_rate, machine, matmul_rate
from ablab.experiments.bench.kernels.attention import attention
from ablab.experiments.bench.kernels.case import Cases
from ablab.experiments.bench.kernels.cross_entropy import cross_entropy
from ablab.experiments.bench.kernels.fp8_projection import fp8_projection
from ablab.experiments.bench.kernels.fp8_swiglu import fp8_swiglu
from ablab.experiments.bench.kernels.linear_cross_entropy import linear_cross_entropy
from ablab.experiments.bench.kernels.measure import Ceilings, Row, measure
from ablab.experiments.bench.kernels.newton_schulz import newton_schulz
from ablab.experiments.bench.kernels.optimizer_step import optimizer_step
from ablab.experiments.bench.kernels.residual_norm import residual_norm
from ablab.experiments.bench.kernels.swiglu import swiglu
from ablab.experiments.bench.kernels.swiglu_epilogue import swiglu_epilogue
from ablab.experiments.text import table

KERNELS: dict[str, Cases] = {
    "attention": attention,
    "swiglu": swiglu,
    "swiglu_epilogue": swiglu_epilogue,
    "fp8_swiglu": fp8_swiglu,
    "fp8_projection": fp8_projection,
    "residual_norm": residual_norm,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "newton_schulz": newton_schulz,
    "optimizer": optimizer_step,
}


def bench_kernels(only: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Every case of the kernels that `only` names: a name or a pattern; None: all.

    Raises UserError where it fits none, or without the device.
    """
    chosen = _chosen(only)
    runtime = parse(Runtime, {"device": device}, "runtime")
    where = torch.device(settle(runtime, rows=1).device)
    ceilings = Ceilings(matmul_rate(where), copy_rate(where))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            for case in KERNELS[name](where, Path(folder) / name):
                rows += measure(case, ceilings, where)
                del case  # its inputs, before the next one's come
    told = machine(where) | {"gpu": where.type == "cuda"}
    told["matmul_tflops"] = ceilings.matmul / 1e12
    told["copy_tb_per_second"] = ceilings.copy / 1e12
    told["rows"] = [asdict(row) for row in rows]
    return told


def _chosen(only: str | None) -> list[str]:
    if only is None:
        return list(KERNELS)
    chosen = [name for name in KERNELS if fnmatchcase(name, only)]
    if not chosen:
        known = ", ".join(KERNELS)
        raise UserError(
            f"--only {only!r} fits no kernel. {near(only, KERNELS)}Kernels: {known}"
        )
    return chosen


# -- showing it ------------------------------------------------------------------------------------------
def show_kernels(found: dict[str, Any]) -> None:
    matmul = f"matrix products {found['matmul_tflops']:.3g} TFLOP/s"
    copies = f"copies {found['copy_tb_per_second']:.3g} TB/s"
    typer.echo(f"{found['device']}; measured here: {matmul}, {copies}")
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
    for name in ("kernel", "case", "form"):
        yield name, row[name]
    yield "forward ms", _number(row["forward_ms"], ".3f")
    yield "backward ms", _number(row["backward_ms"], ".3f")
    yield "rate", f"{_number(row['rate'], '.3g')} {row['unit']}".strip()
    yield "floor ms", _number(row["floor_ms"], ".3f")
    yield "of floor", _number(row["of_floor"], ".0%")
    yield "vs best peer", _number(row["vs_best_peer"], ".2f")
    yield "error", _number(row["error"], ".1e")
    yield "error of gradient", _number(row["gradient_error"], ".1e")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
