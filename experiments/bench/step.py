"""What a training step takes, and where the time goes: `ablab bench step`.

Whole optimizer steps through the trainer, without evaluating and saving, on random tokens; a second subject takes
turns in the same process, A B B A.  Profiling comes after the timing, so that neither sees the other.
    MFU    FLOPs a token (core/model/cost.py: 6 * matrix parameters + causal attention) * tokens/s / peak
    split  busy time of the device by the phase that launched it, on a CPU the host's time; gaps: the rest of the
           timed step.  On a GPU the gaps are those between the kernels of steps as they were timed; the phases are
           then told apart in steps launched kernel by kernel, whose clock may be another, and scaled to the rest
"""

import resource
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ablab.core.errors import UserError
from ablab.experiments.bench import ceilings, phases
from ablab.experiments.bench.clocks import in_turn, settled
from ablab.experiments.bench.phases import Marks
from ablab.experiments.bench.subjects import Stepper, Subject, subjects_of
from ablab.experiments.run.worker import keep_freed_memory

STEPS = {"cuda": 100, "cpu": 10}
WINDOWS = {"cuda": 3, "cpu": 3}
WARM_UP = {"cuda": 50, "cpu": 3}
SPLIT = 5  # steps whose host time is split
LOAD = 30  # steps before a profile: a card at its power limit lowers its clock, and must have done so here too
GIB = 2**30


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
    host_data_ms: float = 0.0  # building a batch and starting its copy; a GPU works meanwhile
    split_ms: dict[str, float] = field(default_factory=dict)
    longest: list[dict[str, Any]] = field(default_factory=list)  # kernels; empty on a CPU


@dataclass(frozen=True)
class Counts:
    steps: int  # of a window
    windows: int  # of each subject
    warm_up: int  # steps before the first window

    @staticmethod
    def of(
        device: torch.device, steps: int | None, windows: int | None, warm_up: int | None
    ) -> "Counts":
        """None: the device's own number."""
        return Counts(
            steps=steps or STEPS[device.type],
            windows=windows or WINDOWS[device.type],
            warm_up=WARM_UP[device.type] if warm_up is None else warm_up,
        )


class NoRoom(UserError):
    """A subject that does not fit into the memory that is left."""


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
        subjects = subjects_of(name, overrides, against, cell, Path(folder))
        device = _common_device(subjects)
        return _timed(subjects, Counts.of(device, steps, windows, warm_up), device)


def _common_device(subjects: list[Subject]) -> torch.device:
    kinds = [subject.settled.device for subject in subjects]
    if len(set(kinds)) > 1:
        raise UserError(
            f"the two subjects run on {kinds[0]} and {kinds[1]}; time them on one device"
        )
    return torch.device(kinds[0])


def _timed(subjects: list[Subject], counts: Counts, device: torch.device) -> dict[str, Any]:
    benches, told = benches_in_turn(subjects, counts, device)
    for bench in benches:
        bench.split(device)
    told["subjects"] = [asdict(bench.timed) for bench in benches]
    if len(benches) > 1:
        first, second = (bench.timed.tokens_per_second for bench in benches)
        told["ratio"] = first / second
    return told


def benches_in_turn(
    subjects: list[Subject], counts: Counts, device: torch.device
) -> tuple[list["Bench"], dict[str, Any]]:
    """The subjects timed, all of them at hand in this process; and what is said of the machine.

    Raises UserError; NoRoom where they do not all fit.
    """
    benches = [Bench(subject, counts.warm_up, device) for subject in subjects]
    steps = [bench.stepper.step for bench in benches]
    times = in_turn(steps, counts.steps, counts.windows, device)
    clocks = ceilings.clocks_under(steps[0]) if device.type == "cuda" else {}
    rate = ceilings.matmul_rate(device)
    for bench, spans in zip(benches, times, strict=True):
        rate_it(bench.timed, spans, rate, device.type)
    told = ceilings.machine(device) | asdict(counts)
    told["peak_tflops"] = ceilings.PEAK / 1e12
    told["matmul_tflops"] = rate / 1e12
    told["clocks"] = clocks
    return benches, told


class Bench:
    """One subject: built, its first step taken, warm; then its numbers, in `timed`."""

    stepper: Stepper

    def __init__(self, subject: Subject, warm_up: int, device: torch.device) -> None:
        """Its peak memory is counted from what was in use before."""
        self.marks = Marks()
        in_use = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            in_use = torch.cuda.memory_allocated()
        began = time.perf_counter()
        try:
            self.stepper = subject.build(self.marks)
            built = time.perf_counter()
            self._steps(1, device)
            stepped = time.perf_counter()
            self._steps(warm_up, device)
        except torch.OutOfMemoryError:
            raise NoRoom(_memory_advice(subject)) from None
        peak = self.stepper.peak_memory() - in_use
        if device.type == "cpu":
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.timed = Timed(
            name=subject.name,
            about=self.stepper.about,
            tokens_per_step=subject.recipe.tokens_per_step,
            flops_per_token=self.stepper.flops_per_token,
            peak_gib=peak / GIB,
            build_seconds=built - began,
            compile_seconds=stepped - built,
        )

    def _steps(self, count: int, device: torch.device) -> None:
        for _ in range(count):
            self.stepper.step()
        settled(device)

    def split(self, device: torch.device) -> None:
        """Where the time of a timed step goes."""
        if device.type == "cuda":
            split_device(self.timed, self.stepper, self.marks, device)
        host = phases.host_split(self.stepper.step, self.marks, SPLIT)
        self.timed.host_data_ms = 1e3 * host["data"]
        if device.type == "cpu":
            split = {phase: 1e3 * spent for phase, spent in host.items()}
            split["gaps"] = self.timed.ms_per_step - sum(split.values())
            self.timed.split_ms = split


def _memory_advice(subject: Subject) -> str:
    rows = subject.settled.micro_batch
    return (
        f"{subject.name}: out of memory with micro-batches of {rows} rows;"
        f" try runtime.micro_batch={max(rows // 2, 1)}"
    )


def rate_it(timed: Timed, spans: list[float], rate: float, device_type: str) -> None:
    """Tokens/s and MFU from the seconds a step of each window; rate: FLOP/s of a matrix product in this run."""
    step = median(spans)
    timed.windows_ms = [1e3 * span for span in spans]
    timed.ms_per_step = 1e3 * step
    timed.tokens_per_second = timed.tokens_per_step / step
    achieved = timed.tokens_per_second * timed.flops_per_token
    timed.mfu_measured = achieved / rate
    if device_type == "cuda":  # a CPU has another peak
        timed.mfu = achieved / ceilings.PEAK


def split_device(
    timed: Timed,
    stepper: Stepper,
    marks: Marks,
    device: torch.device,
) -> None:
    """The share of gaps from steps as they were timed; the rest by phase, from steps launched kernel by kernel."""
    for _ in range(LOAD):
        stepper.step()
    share = phases.busy_share(stepper.step, device)
    if share is None:
        return  # a profiler without its tracing library sees nothing
    stepper.show_phases()
    for _ in range(LOAD):
        stepper.step()
    found = phases.device_split(stepper.step, marks, device)
    clock = share * timed.ms_per_step / (1e3 * sum(found.seconds.values()))
    timed.split_ms = {phase: 1e3 * clock * spent for phase, spent in found.seconds.items()}
    timed.split_ms["gaps"] = (1 - share) * timed.ms_per_step
    timed.longest = [_kernel(kernel, clock) for kernel in found.longest]
    timed.kernels_per_step = found.kernels
    timed.launches_per_step = found.launches


def _kernel(kernel: phases.Kernel, clock: float) -> dict[str, Any]:
    """clock: of a timed step over that of a profiled one."""
    return {
        "phase": kernel.phase,
        "kernel": kernel.name,
        "ms": clock * kernel.ms,
        "times": kernel.times,
    }
