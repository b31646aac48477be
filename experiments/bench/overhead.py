"""What ablab itself costs, on this machine: `ablab bench overhead`.

Times of commands are the best of several starts: a busy machine only adds.  The step is compared with a plain PyTorch
loop of the same model in one process, A-B-B-A, by medians over windows.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import typer

from ablab.core.runtime.runtime import Runtime
from ablab.core.store.files import write_atomically
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, load
from ablab.experiments.run.messages import Logged
from ablab.experiments.run.progress import Quiet

SEEDS = 834  # with the 12 cells of quickstart: 10,008 runs
STEP = 0.020  # seconds: the step that tracking is measured against
LOG_EVERY = 10
WINDOW, ROUNDS = 50, 5  # steps a window, A-B-B-A rounds


@dataclass(frozen=True)
class Row:
    what: str
    measured: float
    unit: str
    target: float  # not above

    @property
    def ok(self) -> bool:
        return self.measured <= self.target


def overhead() -> list[Row]:
    """Everything that is paid beside the training itself."""
    with tempfile.TemporaryDirectory() as folder:
        store, experiment = _grid(Path(folder))
        dry = ("run", "quickstart", "--seeds", f"0-{SEEDS - 1}", "--dry-run", "--store", folder)
        return [
            Row("ablab --help", _command("--help"), "s", 0.4),
            Row("ablab list", _command("list"), "s", 0.4),
            Row(f"dry run of {12 * SEEDS:,} runs", _command(*dry, times=3), "s", 3.0),
            Row(
                f"resume check of {12 * SEEDS:,} finished runs",
                _resume_check(store, experiment),
                "s",
                3.0,
            ),
            Row(
                f"tracking, of a {STEP * 1000:.0f} ms step",
                100 * _tracking(store) / STEP,
                "%",
                1.0,
            ),
            Row(
                "step on the CPU, over a plain PyTorch loop",
                _step_ratio(store, experiment),
                "x",
                1.05,
            ),
        ]


def show_bench(rows: list[Row], out: Path | None) -> None:
    """Print a line for each row; write all of it as JSON to `out`."""
    width = max(len(row.what) for row in rows)
    typer.echo(f"{'what':<{width}}  measured    target  ok")
    for row in rows:
        typer.echo(
            f"{row.what:<{width}}  {row.measured:>6.3f} {row.unit:<2}  {row.target:>5g} {row.unit:<2}  {'yes' if row.ok else 'NO'}"
        )
    busy, cores = os.getloadavg()[0], os.cpu_count()
    typer.echo(
        f"{cores} cores, load {busy:.1f}"
        + (": busy, so times in seconds are too long" if busy > cores else "")
    )
    if out:
        machine = {
            "machine": platform.machine(),
            "cores": cores,
            "load": busy,
            "python": platform.python_version(),
        }
        write_atomically(
            out,
            json.dumps(
                machine | {"rows": [asdict(row) | {"ok": row.ok} for row in rows]}, indent=1
            ).encode(),
        )


# -- commands and grids ------------------------------------------------------------------------------------------------
def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _command(*words: str, times: int = 5) -> float:
    """Seconds of `ablab WORDS`, the best of `times`."""
    line = [sys.executable, "-m", "ablab.experiments.cli.main", *words]
    return min(
        timed(lambda: subprocess.run(line, check=True, capture_output=True))
        for _ in range(times)
    )


def _grid(folder: Path) -> tuple[Store, Experiment]:
    """quickstart over the shipped validation text: 88,527 tokens, made in a second."""
    from ablab.ablations.registry import discover
    from ablab.core.data.corpus import CONFIGS, tokenize

    discover()
    text = CONFIGS / "embedded"
    meta = tokenize(
        [text / "val.jsonl.xz"],
        [],
        text / "tokenizer.json",
        folder / "data" / "bench",
        val_fraction=0.2,
    )
    return Store(folder), load(
        "quickstart",
        {"data.name": "bench", "data.digest": meta.digest, "runtime.device": "cpu"},
    )


def _resume_check(store: Store, experiment: Experiment) -> float:
    """Seconds of a call that finds everything done, reading every result and writing the plan."""
    import msgspec

    from ablab.experiments.run.runner import execute

    runs = experiment.runs(range(SEEDS))
    for run in runs:
        record = store.run(run.id)
        record.folder.mkdir(parents=True)
        record.result_path.write_bytes(
            msgspec.json.encode(Result(run.id, FINISHED, 1, 1, {"val/loss": 1.0}))
        )  # not synced: 10,000 would take minutes

    def check() -> None:
        outcome = execute(experiment, store, runs, Quiet(), mlflow=False)
        assert len(outcome.reused) == len(runs) and not outcome.trained

    return min(timed(check) for _ in range(2))


def _tracking(store: Store, count: int = 2000) -> float:
    """Seconds a step of writing the logs and telling the runner, every tenth step."""
    scalars = {
        name: 1.2345678
        for name in (
            "tokens",
            "train/loss",
            "train/grad_norm",
            "optim/lr",
            "val/loss",
            "val/bits_per_byte",
        )
    }
    pace, record = {"seconds": 12.345678, "tokens_per_second": 123456.78}, store.run("tracked")
    record.folder.mkdir(parents=True)
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("spawn").Process(
        target=_drain, args=(ours, count), daemon=True
    )
    reader.start()
    theirs.recv()

    def log() -> None:
        for step in range(count):
            record.log(step, scalars, pace)
            theirs.send(Logged(step, scalars | pace, 12.3))

    seconds = timed(log) / count / LOG_EVERY
    reader.join()
    return seconds


def _drain(pipe: Any, count: int) -> None:
    pipe.send("ready")
    for _ in range(count):
        pipe.recv()


# -- the step ----------------------------------------------------------------------------------------------------------
def _step_ratio(store: Store, experiment: Experiment) -> float:
    """Median step of the trainer over that of the plain loop; both log every tenth step, one thread each, memory as in a worker."""
    from ablab.core.train.trainer import Trainer
    from ablab.experiments.bench.plain_loop import PlainLoop
    from ablab.experiments.run.worker import keep_freed_memory

    keep_freed_memory()

    recipe = experiment.base
    long = replace(
        recipe,
        budget=replace(recipe.budget, tokens=recipe.tokens_per_step * WINDOW * ROUNDS * 10),
    )
    folder, record = store.root / "data" / "bench", store.run("stepped")
    record.folder.mkdir(parents=True)
    trainer = Trainer(long, Runtime(device="cpu", threads=1), folder)
    plain = PlainLoop(folder, long.steps)
    assert plain.parameters() == sum(value.numel() for value in trainer.model.parameters())

    def ours() -> None:
        norm = trainer.advance()
        if trainer.step % LOG_EVERY == 0:
            scalars = {"train/loss": trainer.close_window(), "train/grad_norm": norm.item()}
            record.log(trainer.step, scalars, {"seconds": time.perf_counter()})

    times: dict[Any, list[float]] = {ours: [], plain.step: []}
    for step in [ours, plain.step] + [ours, plain.step, plain.step, ours] * ROUNDS:
        times[step].append(timed(lambda step=step: [step() for _ in range(WINDOW)]))
    return median(times[ours][1:]) / median(
        times[plain.step][1:]
    )  # the first window of each warms up
