"""What a training step takes, and where the time goes: `ablab bench step`.

Whole optimizer steps through the trainer, without evaluating and saving, on random tokens; a second subject takes turns in the
same process, A B B A.  Profiling comes after the timing, so that neither sees the other.
    MFU    FLOPs a token (core/model/plan.py: 6 * matrix parameters + causal attention) * tokens/s / peak
    split  busy time of the device by the phase that launched it, on a CPU the host's time; gaps: the rest of the timed step.
           On a GPU the gaps are those between the kernels of steps as they were timed; the phases are then told apart in
           steps launched kernel by kernel, whose clock may be another, and scaled to the rest
"""

import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.model.cost import cost_of
from ablab.core.recipe.recipe import Budget, Recipe
from ablab.core.runtime.runtime import Runtime, Settled, settle
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench import timing
from ablab.experiments.bench.random_tokens import NAME, experiment_on_random_tokens
from ablab.experiments.bench.timing import Marks
from ablab.experiments.run.worker import keep_freed_memory

HF = "hf"
STEPS, WINDOWS, WARM_UP = (
    {"cuda": 100, "cpu": 10},
    {"cuda": 3, "cpu": 3},
    {"cuda": 50, "cpu": 3},
)
SHOWN = (
    "dtype",
    "compile",
    "replay",
    "micro_batch",
    "recompute",
    "deterministic",
    "threads",
    "kernels",
)  # of the runtime
SPLIT = 5  # steps whose host time is split
LOAD = 30  # steps on a GPU before a profile: a card at its power limit lowers its clock, and must have done so here too
GIB = 2**30


class Ours:
    """The trainer's own `advance`; the marks stand around its calls, not in it."""

    def __init__(self, recipe: Recipe, runtime: Runtime, folder: Path, marks: Marks):
        self.trainer, self.marks = (trainer := Trainer(recipe, runtime, folder)), marks
        step = trainer.training_step
        step.loss = marks.around(step.loss, "forward", "backward")
        trainer.tokens.rows = marks.around(trainer.tokens.rows, "data", "data")
        trainer.optimizer.step = marks.around(trainer.optimizer.step, "optimizer", "optimizer")
        self.flops_per_token = cost_of(recipe).flops_per_token
        self.about = ", ".join(
            f"{name}={value}"
            for name, value in asdict(trainer.runtime).items()
            if name in SHOWN
        )

    def step(self) -> None:
        self.marks("data")
        self.trainer.advance()

    def peak_memory(self) -> int:
        return self.trainer.peak_memory()

    def show_phases(self) -> None:
        """From here on without replays: the kernels are the same, but launched one by one, each by its phase."""
        for one in self.trainer.training_step.replayed:
            one.stop_replaying()


@dataclass(frozen=True)
class Subject:
    """What is timed: `make` builds it from the recipe, the settled or asked runtime, the token folder and marks."""

    name: str
    recipe: Recipe
    runtime: Runtime
    folder: Path
    make: Callable[..., Any]

    @property
    def settled(self) -> Settled:
        return settle(self.runtime, self.recipe.batches.largest_micro_batch)


@dataclass
class Timed:
    """A subject's numbers.  Rates of work count attention causally; None: not measured on this device."""

    name: str
    about: str = ""
    tokens_per_second: float = 0.0
    ms_per_step: float = 0.0
    windows_ms: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    flops_per_token: int = 0
    mfu: float | None = None  # of 989 TFLOP/s
    mfu_measured: float | None = None  # of the matmul rate of this run
    peak_gib: float = 0.0  # of this subject alone on a GPU, of the process on a CPU
    build_seconds: float = 0.0
    compile_seconds: float = 0.0  # until the first step has ended
    kernels_per_step: float | None = None
    launches_per_step: float | None = None
    host_data_ms: float = (
        0.0  # building a batch and starting its copy; on a GPU the device works meanwhile
    )
    split_ms: dict[str, float] = field(default_factory=dict)
    longest: list[dict[str, Any]] = field(
        default_factory=list
    )  # kernels by their ms a step; empty on a CPU


def bench_step(
    name: str,
    overrides: dict[str, Any],
    against: str | None,
    cell: str | None,
    steps: int | None,
    windows: int | None,
    warm_up: int | None,
) -> dict[str, Any]:
    """Time one subject, or two in turn.  None: the device's own number.  Raises UserError."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        subjects = _subjects(name, overrides, against, cell, Path(folder))
        device = torch.device(subjects[0].settled.device)
        if (other := subjects[-1].settled.device) != device.type:
            raise UserError(
                f"the two subjects run on {device.type} and {other}; time them on one device"
            )
        kind = device.type
        counts = {
            "steps": steps or STEPS[kind],
            "windows": windows or WINDOWS[kind],
            "warm_up": WARM_UP[kind] if warm_up is None else warm_up,
        }
        made = [_made(subject, counts["warm_up"], device) for subject in subjects]
        times = timing.in_turn(
            [one.step for one, _, _ in made], counts["steps"], counts["windows"], device
        )
        clocks = timing.clocks(made[0][0].step) if kind == "cuda" else {}
        rate = timing.matmul_rate(device)
        for (one, marks, timed), spans in zip(made, times, strict=True):
            rate_it(timed, spans, rate, kind)
            _split(timed, one, marks, device)
    timed = [timed for _, _, timed in made]
    ratio = (
        {"ratio": timed[0].tokens_per_second / timed[1].tokens_per_second}
        if len(timed) > 1
        else {}
    )
    ceilings = {
        "peak_tflops": timing.PEAK / 1e12,
        "matmul_tflops": rate / 1e12,
        "clocks": clocks,
    }
    return (
        timing.machine(device)
        | counts
        | ceilings
        | {"subjects": [asdict(one) for one in timed]}
        | ratio
    )


# -- who is timed ------------------------------------------------------------------------------------------------------
def _subjects(
    name: str, overrides: dict[str, Any], against: str | None, cell: str | None, root: Path
) -> list[Subject]:
    first = _ours(name, overrides, cell, root)
    if against is None:
        return [first]
    if against == HF:
        return [first, replace(first, name="Hugging Face Llama", make=_peer)]
    if "=" in against:
        from ablab.core.recipe.load import overrides_from

        return [
            first,
            replace(
                _ours(name, overrides | overrides_from([against]), cell, root / "against"),
                name=f"{first.name}, {against}",
            ),
        ]
    return [first, _ours(name, overrides, against, root, [HF, "path=value"])]


def _ours(
    name: str,
    overrides: dict[str, Any],
    cell: str | None,
    root: Path,
    others: Iterable[str] = (),
) -> Subject:
    """The cell asked for, else `full`, else the first."""
    experiment = experiment_on_random_tokens(name, overrides, root)
    recipes = experiment.recipes
    cell = cell or ("full" if "full" in recipes else next(iter(recipes)))
    if cell not in recipes:
        known = [*recipes, *others]
        raise UserError(f"no cell {cell!r}. {near(cell, known)}Cells: {', '.join(known)}")
    recipe = recipes[cell]
    long = (
        max(recipe.steps, 10_000) * recipe.tokens_per_step
    )  # a schedule that does not end while we look
    recipe = replace(recipe, budget=Budget(long))
    return Subject(
        f"{experiment.name.split('@')[0]}, {cell}",
        recipe,
        experiment.sheet.runtime,
        root / "data" / NAME,
        Ours,
    )


def _peer(recipe: Recipe, runtime: Runtime, folder: Path, marks: Marks) -> Any:
    from ablab.experiments.bench.hugging_face import HuggingFace

    return HuggingFace(
        recipe, settle(runtime, recipe.batches.largest_micro_batch), folder, marks
    )


# -- timing one --------------------------------------------------------------------------------------------------------
def _made(subject: Subject, warm_up: int, device: torch.device) -> tuple[Any, Marks, Timed]:
    """Build it, take the first step, warm up.  Its peak memory is counted from what was in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, marks, began = (
        torch.cuda.memory_allocated() if device.type == "cuda" else 0,
        Marks(),
        time.perf_counter(),
    )
    try:
        one = subject.make(subject.recipe, subject.runtime, subject.folder, marks)
        built = time.perf_counter()
        one.step()
        timing.settled(device)
        stepped = time.perf_counter()
        for _ in range(warm_up):
            one.step()
        timing.settled(device)
    except torch.OutOfMemoryError:
        rows = subject.settled.micro_batch
        raise UserError(
            f"{subject.name}: out of memory with micro-batches of {rows} rows; try runtime.micro_batch={max(rows // 2, 1)}"
        ) from None
    peak = (
        one.peak_memory() - before
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    costs = {
        "tokens_per_step": subject.recipe.tokens_per_step,
        "flops_per_token": one.flops_per_token,
    }
    return (
        one,
        marks,
        Timed(
            subject.name,
            one.about,
            **costs,
            peak_gib=peak / GIB,
            build_seconds=built - began,
            compile_seconds=stepped - built,
        ),
    )


def rate_it(timed: Timed, spans: list[float], rate: float, device_type: str) -> None:
    """Tokens/s and MFU from the seconds a step of each window; rate: FLOP/s of a matrix product in this run."""
    step = median(spans)
    timed.windows_ms, timed.ms_per_step = [1e3 * span for span in spans], 1e3 * step
    timed.tokens_per_second = timed.tokens_per_step / step
    achieved = timed.tokens_per_second * timed.flops_per_token
    timed.mfu_measured = achieved / rate
    timed.mfu = (
        achieved / timing.PEAK if device_type == "cuda" else None
    )  # a CPU has another peak


def _split(timed: Timed, one: Any, marks: Marks, device: torch.device) -> None:
    if device.type == "cuda":
        _split_device(timed, one, marks, device)
    host = timing.host_split(one.step, marks, SPLIT)
    timed.host_data_ms = 1e3 * host["data"]
    if device.type == "cpu":
        timed.split_ms = {phase: 1e3 * spent for phase, spent in host.items()}
        timed.split_ms["gaps"] = timed.ms_per_step - sum(timed.split_ms.values())


def _split_device(timed: Timed, one: Any, marks: Marks, device: torch.device) -> None:
    for _ in range(LOAD):
        one.step()
    if (share := timing.busy_share(one.step, device)) is None:
        return  # a profiler without its tracing library sees nothing
    one.show_phases()
    for _ in range(LOAD):
        one.step()
    found = timing.device_split(one.step, marks, device)
    scale = (
        share * timed.ms_per_step / sum(found["split"].values())
    )  # ms of the timed step for a second of these
    timed.split_ms = {phase: scale * spent for phase, spent in found["split"].items()} | {
        "gaps": (1 - share) * timed.ms_per_step
    }
    timed.longest = [kernel | {"ms": scale * kernel["ms"] / 1e3} for kernel in found["longest"]]
    timed.kernels_per_step, timed.launches_per_step = found["kernels"], found["launches"]


# -- showing it --------------------------------------------------------------------------------------------------------
def show_step(found: dict[str, Any]) -> None:
    from ablab.experiments.text import table

    subjects = found["subjects"]
    typer.echo(
        f"{found['device']}; {found['windows']} windows of {found['steps']} steps after {found['warm_up']} to warm up; random tokens"
    )
    for one in subjects:
        typer.echo(f"{one['name']}: {one['about']}")
    table([_row(one) for one in subjects])
    typer.echo("")
    table([_split_row(one) for one in subjects])
    for one in subjects:
        if one["longest"]:
            typer.echo(f"\n{one['name']}: the longest kernels of a step")
            table([_kernel_row(kernel) for kernel in one["longest"]])
    peak = "MFU counts attention causally" + (
        "" if subjects[0]["mfu"] is None else f", of {found['peak_tflops']:g} TFLOP/s"
    )
    typer.echo(
        f"\n{peak}; matrix products reach {found['matmul_tflops']:.3g} TFLOP/s in this run"
    )
    if found["clocks"]:
        typer.echo(
            "clocks under load: "
            + ", ".join(f"{name} {value:g}" for name, value in found["clocks"].items())
        )
    if "ratio" in found:
        typer.echo(
            f"{subjects[0]['name']} / {subjects[1]['name']}: {found['ratio']:.3f} x tokens/s, same run, A B B A"
        )


def _row(one: dict[str, Any]) -> dict[str, str]:
    percent = lambda value: "-" if value is None else f"{100 * value:.1f} %"  # noqa: E731
    number = lambda value: "-" if value is None else f"{value:,.0f}"  # noqa: E731
    return {
        "what": one["name"],
        "tokens/s": f"{one['tokens_per_second']:,.0f}",
        "ms/step": f"{one['ms_per_step']:.2f}",
        "MFU": percent(one["mfu"]),
        "of matmul": percent(one["mfu_measured"]),
        "peak GiB": f"{one['peak_gib']:.2f}",
        "kernels/step": number(one["kernels_per_step"]),
        "launches/step": number(one["launches_per_step"]),
        "build s": f"{one['build_seconds']:.1f}",
        "first step s": f"{one['compile_seconds']:.1f}",
    }


def _split_row(one: dict[str, Any]) -> dict[str, str]:
    phases = {phase: f"{spent:.2f}" for phase, spent in one["split_ms"].items()} or {
        "ms of a step": "the profiler saw no kernel"
    }
    return {"what": one["name"]} | phases | {"host: data": f"{one['host_data_ms']:.2f}"}


def _kernel_row(one: dict[str, Any]) -> dict[str, str]:
    return {
        "phase": one["phase"],
        "ms": f"{one['ms']:.3f}",
        "times": f"{one['times']:g}",
        "kernel": one["kernel"][:100],
    }
