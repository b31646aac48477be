"""What a study costs beside its training: `ablab bench study`.

The real coordinator and an Optuna database in SQLite, with a formula in place of the training: it writes the records of a
run and nothing else.  TPE proposes from all trials before; a grid of 10,000 points is stored, then opened again.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.bench.overhead import Row, timed
from ablab.experiments.plan.experiment import load
from ablab.experiments.run.progress import Quiet
from ablab.experiments.tune import study

TRIALS, STORED = 1_000, 10_000
SHEET = """\
question: What does a trial cost?
base:     [base, size/tiny]
design:   add_one
seeds:    []
metric:   {{name: val/loss, better: lower}}
runtime:  {{device: cpu}}
set:      {{schedule.warmup_steps: 2, data.name: none, data.vocab: 64, budget.tokens: 5120}}
study:    {{space: {{optim.lr: {{log: [1.0e-4, 1.0e-1], points: 100}}, optim.clip: {{uniform: [0.1, 2.0], points: {clips}}}}},
           sampler: {sampler}, trials_per_cell: {trials}}}
"""


class Formula:
    """Stands for the pool of workers: each run ends at once, with a loss that its learning rate and clipping decide."""

    def __init__(
        self,
        experiment: Any,
        store: Store,
        watcher: Any,
        jobs: int | None = None,
        plugins: Any = (),
    ):
        self.store, self.watcher = store, watcher

    def train(self, runs: list[Any], stops: Any) -> None:
        began = time.perf_counter()
        for run in runs:
            record, optim = self.store.run(run.id), run.recipe.optim
            record.folder.mkdir(parents=True)
            loss = 3 + math.log10(optim.lr / 0.01) ** 2 + (optim.clip - 1) ** 2 / 10
            record.log(10, {"val/loss": loss}, {"seconds": 1.0, "tokens_per_second": 1.0})
            record.finish(
                result := Result(run.id, FINISHED, 10, 5120, {"val/loss": loss}, 1.0, 1.0)
            )
            self.watcher.finished(run, result)
        Formula.spent += time.perf_counter() - began

    def close(self) -> None: ...

    spent = 0.0  # seconds in `train`: what a grid would pay too


def bench_study(trials: int = TRIALS, stored: int = STORED) -> list[Row]:
    """Milliseconds of the coordinator for each of `trials` TPE trials, and seconds to open a study of about `stored`."""
    pool, study.Pool, Formula.spent = study.Pool, Formula, 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            seconds = (
                timed(lambda: _tuned(Path(folder), "tpe", "tpe", trials, 1)) - Formula.spent
            )
            clips = max(stored // 100, 1)
            _tuned(Path(folder), "grid", "grid", trials, clips)
            opened = timed(lambda: _tuned(Path(folder), "grid", "grid", trials, clips))
    finally:
        study.Pool = pool
    return [
        Row(
            f"coordinator, a trial of {trials:,} (TPE, SQLite)",
            1000 * seconds / trials,
            "ms",
            50.0,
        ),
        Row(f"opening a study of {100 * clips:,} stored trials", opened, "s", 5.0),
    ]


def _tuned(root: Path, name: str, sampler: str, trials: int, clips: int) -> None:
    sheet = root / f"{name}.yaml"
    sheet.write_text(SHEET.format(sampler=sampler, trials=trials, clips=clips))
    experiment = load(str(sheet), {}, lambda data: "0" * 16)
    study.Study(experiment, Store(root / "store"), Quiet()).tune(1, (), mlflow=False)
