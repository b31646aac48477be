"""What a checkpoint costs training, and the disk: `ablab bench checkpoint`.

Steps on random tokens, as `ablab bench step` takes them, in windows: without a save, and from a save until it is on the
disk.  The stall of a save is what such a window takes longer than as many steps of the windows beside it.  The first
save also finds the memory for the copies, once for all runs of a worker.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from ablab.core.store.record import Record
from ablab.core.train import checkpoint
from ablab.core.train.run import Loop, watched_by_nobody
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench.random_tokens import NAME, experiment_on_random_tokens

STEPS = {"cuda": 20, "cpu": 5}  # at least, of a window
SAVES = 5
GIB = 2**30


@dataclass
class Saved:
    """One window that began with a save."""

    steps: int
    seconds: float  # of all of it
    until_written: float


class Bench:
    """A run on its way, in the folder of its record."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer = trainer
        self.record = Record(folder)
        self.loop = Loop(trainer, self.record, watched_by_nobody, warn=typer.echo)
        self.least = STEPS[trainer.device.type]

    def steps(self, count: int) -> float:
        """Seconds that they take, to the end of the last."""
        began = time.perf_counter()
        for _ in range(count):
            self._step()
        self._catch_up()
        return time.perf_counter() - began

    def save(self) -> Saved:
        """And steps until it is on the disk."""
        began = time.perf_counter()
        self.loop.save()
        written = 0.0
        count = 0
        while count < self.least or not written:
            self._step()
            count += 1
            if not written and self.trainer.saver.is_idle():
                written = time.perf_counter() - began
        self._catch_up()
        return Saved(count, time.perf_counter() - began, written)

    def _step(self) -> None:
        norm = self.trainer.advance()
        self.trainer.watch.step(norm, self.trainer.recipe.tokens_per_step)

    def _catch_up(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)


def bench_checkpoint(name: str, overrides: dict[str, Any], cell: str | None) -> dict[str, Any]:
    """Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        experiment = experiment_on_random_tokens(name, overrides, root)
        chosen = cell or next(iter(experiment.recipes))
        recipe = experiment.recipes[chosen]
        trainer = Trainer(recipe, experiment.sheet.runtime, root / "data" / NAME)
        bench = Bench(trainer, root / "run")
        bench.steps(bench.least)
        first, _ = _stall(bench)
        stalls, saves = zip(*[_stall(bench) for _ in range(SAVES)], strict=True)
        [newest, *_] = reversed(checkpoint.listed(root / "run" / "checkpoints"))
        step = bench.steps(bench.least) / bench.least
        written = median(save.until_written for save in saves)
        size = newest.stat().st_size
        return {
            "cell": chosen,
            "device": str(trainer.device),
            "step_ms": 1e3 * step,
            "bytes": size,
            "first_stall_ms": 1e3 * first,
            "stall_ms": 1e3 * median(stalls),
            "stalls_ms": [1e3 * stall for stall in stalls],
            "share_of_a_step": median(stalls) / step,
            "written_seconds": written,
            "gib_per_second": size / GIB / written,
        }


def _stall(bench: Bench) -> tuple[float, Saved]:
    """Seconds, beside the same steps before and after."""
    before = bench.steps(bench.least)
    saved = bench.save()
    after = bench.steps(bench.least)
    step = (before + after) / (2 * bench.least)
    return saved.seconds - saved.steps * step, saved


def show_checkpoint(found: dict[str, Any]) -> None:
    typer.echo(
        f"{found['cell']} on {found['device']}: a step {found['step_ms']:.1f} ms, "
        f"a checkpoint {found['bytes'] / GIB:.3f} GiB\n"
        f"a save stalls training for {found['stall_ms']:.1f} ms, {found['share_of_a_step']:.1%} of a step "
        f"(median of {SAVES}; the first, which finds its memory, {found['first_stall_ms']:.0f} ms)\n"
        f"it is on the disk after {found['written_seconds']:.2f} s, {found['gib_per_second']:.2f} GiB/s"
    )
