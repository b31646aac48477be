"""ablab beside its peers, in one call: `ablab bench peers`.

The full cell of an experiment, the same with `fp8`, Hugging Face's Llama of its shape and, where a checkout of it is
named, nanochat: whole optimizer steps on the same random tokens, in turn, A B C D D C B A.  They share a process; where
they do not all fit into its memory, each has one of its own, started twice.  Every ratio is of this call.
"""

import gc
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from ablab.experiments.bench.step import Counts, NoRoom, Timed, benches_in_turn, rate_it
from ablab.experiments.bench.step_table import rates_of, show_machine
from ablab.experiments.bench.subjects import Subject, ablab_and_peers
from ablab.experiments.run.worker import keep_freed_memory
from ablab.experiments.text import Row, table

VISITS = 2  # of each subject that has a process of its own: there and back


@dataclass(frozen=True)
class Asked:
    """Who is timed, and how often."""

    name: str
    overrides: dict[str, Any]
    nanochat: Path | None  # the folder of its checkout
    plugins: Sequence[Path] = ()
    steps: int | None = None
    windows: int | None = None
    warm_up: int | None = None

    def subjects(self, root: Path) -> list[Subject]:
        return ablab_and_peers(self.name, self.overrides, self.nanochat, root)

    def counts(self, device: torch.device) -> Counts:
        return Counts.of(device, self.steps, self.windows, self.warm_up)


@dataclass
class Seen:
    """What was timed, and what is said of the machine."""

    timed: list[Timed]
    machine: dict[str, Any] = field(default_factory=dict)


def bench_peers(asked: Asked, apart: bool = False) -> dict[str, Any]:
    """Time them in turn.  apart: a process each, as where they do not fit into one.  Raises UserError."""
    seen = _apart(asked) if apart else _together_or_apart(asked)
    rates = {one.name: one.tokens_per_second for one in seen.timed}
    found = seen.machine | {"experiment": asked.name}
    found["subjects"] = [asdict(one) for one in seen.timed]
    found["ratios"] = {
        name: {other: rate / theirs for other, theirs in rates.items()}
        for name, rate in rates.items()
    }
    return found


def _together_or_apart(asked: Asked) -> Seen:
    try:
        return _together(asked)
    except NoRoom as refusal:
        typer.echo(f"{refusal}; each is timed in a process of its own", err=True)
    # What the others held goes with the frames of the refusal.
    gc.collect()
    torch.cuda.empty_cache()
    return _apart(asked)


def _together(asked: Asked, only: int | None = None) -> Seen:
    """only: one of the subjects, by its place; None: all of them.  Raises NoRoom."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        subjects = asked.subjects(Path(folder))
        chosen = subjects if only is None else [subjects[only]]
        device = torch.device(chosen[0].settled.device)
        benches, machine = benches_in_turn(chosen, asked.counts(device), device)
        return Seen([bench.timed for bench in benches], machine)


# -- a process each ----------------------------------------------------------------------------------------------------
def _apart(asked: Asked) -> Seen:
    """There and back: each of VISITS takes its share of the windows."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = asked.subjects(Path(folder))
    device = torch.device(subjects[0].settled.device)
    counts = asked.counts(device)
    once = replace(asked, windows=-(-counts.windows // VISITS))
    there = [_visited(once, place) for place in range(len(subjects))]
    back = [_visited(once, place) for place in reversed(range(len(subjects)))]
    return joined(there, back[::-1], device.type)


def _visited(asked: Asked, place: int) -> Seen:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(visit, asked, place).result()


def visit(asked: Asked, place: int) -> Seen:
    """One subject in this process, new and bare."""
    from ablab.ablations.registry import discover

    discover(asked.plugins)
    return _together(asked, place)


def joined(there: list[Seen], back: list[Seen], device_type: str) -> Seen:
    """Of each subject the windows of both visits; matrix products of all visits say what the machine reached."""
    visits = [*there, *back]
    machine = visits[0].machine
    tflops = median(visit.machine["matmul_tflops"] for visit in visits)
    machine = machine | {"matmul_tflops": tflops, "windows": VISITS * machine["windows"]}
    timed = []
    for first, second in zip(there, back, strict=True):
        ((one,), (again,)) = (first.timed, second.timed)
        spans = [ms / 1e3 for ms in (*one.windows_ms, *again.windows_ms)]
        rate_it(one, spans, tflops * 1e12, device_type)
        timed.append(one)
    return Seen(timed, machine)


# -- showing it --------------------------------------------------------------------------------------------------------
def show_peers(found: dict[str, Any]) -> None:
    subjects = found["subjects"]
    windows = f"{found['windows']} windows of {found['steps']} steps each"
    typer.echo(
        f"{found['experiment']} on {found['device']}; {windows}, in turn, there and back"
    )
    for one in subjects:
        typer.echo(f"{one['name']}: {one['about']}")
    table([_row(one, found["ratios"]) for one in subjects])
    show_machine(found)


def _row(one: dict[str, Any], ratios: dict[str, dict[str, float]]) -> Row:
    of_others = {f"x {name}": f"{ratio:.3f}" for name, ratio in ratios[one["name"]].items()}
    return rates_of(one) | of_others
