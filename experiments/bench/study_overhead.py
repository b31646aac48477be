"""What a study costs beside its training: `ablab bench study`.

The real coordinator and an Optuna database in SQLite, with a formula in place of the training: it writes the
records of a run and nothing else.  TPE proposes from all trials before; a grid of 10,000 points is stored, then
opened again.
"""

import math
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.bench.clocks import host_seconds
from ablab.experiments.bench.targets import Cost
from ablab.experiments.plan.experiment import Experiment, PlannedRun, load
from ablab.experiments.run.executor import Launcher
from ablab.experiments.run.progress import Quiet
from ablab.experiments.tune import study

TRIALS = 1_000
STORED = 10_000
LRS = 100  # points of the learning rate
STEPS, TOKENS = 10, 5120
SHEET = """\
question: What does a trial cost?
base:     [base, size/tiny]
design:   add_one
seeds:    []
metric:   {{name: val/loss, better: lower}}
runtime:  {{device: cpu}}
set:      {{schedule.warmup_steps: 2, data.name: none, data.vocab: 64, budget.tokens: {tokens}}}
study:
  space:
    optim.lr:   {{log: [1.0e-4, 1.0e-1], points: {lrs}}}
    optim.clip: {{uniform: [0.1, 2.0], points: {clips}}}
  sampler: {sampler}
  trials_per_cell: {trials}
"""


class Spent:
    """Seconds that stand for training."""

    seconds = 0.0


class FormulaPool:
    """Stands for the pool of workers: each run ends at once; its learning rate and clipping decide its loss."""

    def __init__(
        self,
        spent: Spent,
        experiment: Experiment,
        store: Store,
        watcher: Any,
        jobs: int | None = None,
        plugins: Iterable[str] = (),
        launcher: Launcher | None = None,
    ) -> None:
        self.spent = spent
        self.store = store
        self.watcher = watcher

    def train(self, runs: list[PlannedRun], stops: Any) -> None:
        self.spent.seconds += host_seconds(lambda: self._train(runs))

    def _train(self, runs: list[PlannedRun]) -> None:
        for run in runs:
            loss = self.loss(run)
            record = self.store.run(run.id)
            record.folder.mkdir(parents=True)
            record.log(STEPS, {"val/loss": loss}, {"seconds": 1.0, "tokens_per_second": 1.0})
            result = Result(run.id, FINISHED, STEPS, TOKENS, {"val/loss": loss}, 1.0, 1.0)
            record.finish(result)
            self.watcher.finished(run, result)

    @staticmethod
    def loss(run: PlannedRun) -> float:
        """A bowl with its lowest point, 3, at a learning rate of 0.01 and clipping at 1."""
        optim = run.recipe.optim
        assert optim.clip is not None  # the sheet's space holds it
        decades = math.log10(optim.lr / 0.01)
        return 3 + decades**2 + (optim.clip - 1) ** 2 / 10

    def close(self) -> None: ...


def bench_study(trials: int = TRIALS, stored: int = STORED) -> list[Cost]:
    """Milliseconds of the coordinator for each TPE trial, and seconds to open a study of about `stored`."""
    spent = Spent()
    clips = max(stored // LRS, 1)
    pool = partial(FormulaPool, spent)
    with tempfile.TemporaryDirectory() as folder, patch.object(study, "Pool", pool):
        tpe = _sheet(Path(folder), "tpe", trials, clips=1)
        grid = _sheet(Path(folder), "grid", trials, clips)
        proposing = host_seconds(lambda: _tune(tpe)) - spent.seconds
        _tune(grid)
        opening = host_seconds(lambda: _tune(grid))
    what = f"coordinator, a trial of {trials:,} (TPE, SQLite)"
    return [
        Cost(what, 1000 * proposing / trials, "ms", 50.0),
        Cost(f"opening a study of {LRS * clips:,} stored trials", opening, "s", 5.0),
    ]


def _sheet(root: Path, sampler: str, trials: int, clips: int) -> Path:
    path = root / f"{sampler}.yaml"
    path.write_text(
        SHEET.format(sampler=sampler, trials=trials, clips=clips, lrs=LRS, tokens=TOKENS)
    )
    return path


def _tune(sheet: Path) -> None:
    experiment = load(str(sheet), {}, lambda data: "0" * 16)
    store = Store(sheet.parent / "store")
    study.Study(experiment, store, Quiet()).tune(1, (), tracked=())
