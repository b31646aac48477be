"""Grids without training: runs whose results are drawn, by cell and seed, in the place of what workers would leave."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ablab.core.language.written import dump
from ablab.core.recipe.recipe import plain
from ablab.core.store.planned import GridPlan
from ablab.core.store.result import Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.grid_plan import merged_plan
from ablab.experiments.run.pool import Outcome
from ablab.experiments.run.registering import registered

SEED_SD = 0.05  # shared by all arms of a seed


@dataclass
class Drawn:
    """Trains by drawing:  loss = 3 + seed's own + effect of the cell + noise of the run.

    effects: cell -> what it adds; 0 for others.  noise: sd of each run's own part.  seconds: that a run has trained.
    """

    store: Store
    effects: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.001
    seconds: float = 60.0
    status: Callable[[PlannedRun], str] = lambda run: "finished"
    asked: list[set[tuple[str, int]]] = field(
        default_factory=list
    )  # (cell, seed) that each call trained

    def __call__(self, experiment: Experiment, runs: list[PlannedRun]) -> Outcome:
        missing = [run for run in runs if not self.store.run(run.id).stamp()]
        entry = registered(experiment, self.store, runs, print) if missing else ""
        self.store.change_plan(
            experiment.name,
            lambda old: _with_entry(merged_plan(experiment, runs, old), entry),
            print,
        )
        for run in missing:
            self.finish(run)
        self.asked.append({(run.cell, run.recipe.seed) for run in missing})
        known = [run.id for run in runs if run not in missing]
        return Outcome(trained=[run.id for run in missing], reused=known)

    def finish(self, run: PlannedRun) -> None:
        seed = run.recipe.seed
        shared = np.random.default_rng(seed).normal(0, SEED_SD)
        own = np.random.default_rng([seed, *run.id.encode()]).normal(0, self.noise)
        loss = 3 + shared + own + self.effects.get(run.cell, 0.0)
        record = self.store.run(run.id)
        record.folder.mkdir(parents=True, exist_ok=True)
        record.recipe_path.write_text(dump(plain(run.recipe)))
        ended = self.status(run)
        metrics = {"val/loss": float(loss)} if ended == "finished" else {}
        record.finish(
            Result(
                run.id, ended, 20, 1280, metrics, seconds=self.seconds, tokens_per_second=1e3
            )
        )


def _with_entry(plan: GridPlan, entry: str) -> GridPlan:
    return replace(plan, registered=entry or plan.registered)
