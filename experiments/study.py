"""Studies: tune every cell on selection seeds, then confirm the winners on other seeds.

The coordinator proposes a generation for each cell, the runner executes it, the values go to the storage.  A trial is a
run (one for each selection seed) with its content id, so one that exists already costs nothing.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ablab.ablations.design import Cell
from ablab.analysis import tuning
from ablab.core.errors import UserError
from ablab.core.intervention import at, resolve
from ablab.core.load import assign
from ablab.core.recipe import Recipe, run_id
from ablab.core.record import FINISHED, Planned, Store
from ablab.experiments.experiment import Experiment, Run
from ablab.experiments.pruning import Referee, check
from ablab.experiments.runner import Pool, Watcher, execute, result_of
from ablab.experiments.trackers import trackers_for
from ablab.experiments.search import Axis, axes_of, corners, direction, open_storage, open_study, propose, tidy, total_trials

STATES = {FINISHED: "complete"}  # of a run -> of a trial; any other status keeps its name


@dataclass(frozen=True)
class Trial:
    """One proposed point of a cell; `number` counts from 0 within the cell."""

    cell: Cell
    number: int
    params: dict[str, Any]
    runs: list[Run]  # one for each selection seed


class Arm:
    """The search of one cell.  Doses of interventions that the cell lacks are no axes of it."""

    def __init__(self, experiment: Experiment, cell: Cell, axes: list[Axis], storage: Any):
        self.experiment, self.cell, self.sheet = experiment, cell, experiment.sheet.study
        self.axes = [axis for axis in axes if not axis.path.startswith("with.") or axis.path.split(".")[1] in cell.treatment]
        if not self.axes:
            raise UserError(f"cell {cell.name!r} has nothing to tune: none of {', '.join(a.path for a in axes)} is in it; add a recipe path such as optim.lr")
        self.name = f"{experiment.name}/{cell.name}"
        self.total = total_trials(self.axes, self.sheet)
        facts = {
            "space": {axis.path: [axis.kind, *axis.values] for axis in self.axes}, "sampler": self.sheet.sampler, "seeds": self.sheet.seeds,
            "sampler_seed": self.sheet.sampler_seed, "generation": self.sheet.generation, "metric": experiment.sheet.metric.name,
            "recipe": run_id(resolve(experiment.base, cell.treatment)),
        }  # fmt: skip
        self.study = open_study(storage, self.name, experiment.sheet.metric.better, facts)

    @property
    def prunes(self) -> bool:
        """Pruning compares trials of this arm alone, and never one whose curve crosses its control's late."""
        return self.sheet.pruner != "none" and not any(one.about.crosses_late for one in self.cell.treatment.values())

    def recipe(self, params: dict[str, Any]) -> Recipe:
        return tuned_recipe(self.experiment, self.cell, params)

    def check(self) -> None:
        """Every corner of the space must build.  Raises UserError naming the corner that cannot."""
        for corner in corners(self.axes):
            try:
                self.recipe(corner)
            except UserError as flaw:
                where = ", ".join(f"{path}={value}" for path, value in corner.items())
                raise UserError(f"study.space of {self.experiment.name}: the corner {where} of cell {self.cell.name!r} cannot be built: {flaw}") from None

    def generation(self) -> list[Trial]:
        """The trials that come next, those of an interrupted generation first; empty when the search is over."""
        stored = self.study.get_trials(deepcopy=False)
        if len(stored) >= self.total:
            return self._widening(stored)
        size = self.total if self.sheet.sampler in ("grid", "qmc") else self.sheet.generation
        whole = len(stored) // size * size
        points = propose(self.axes, self.sheet, self.name, self.experiment.sheet.metric.better, stored[:whole], min(size, self.total - whole))
        return [self._trial(whole + i, params) for i, params in enumerate(points) if whole + i >= len(stored)]

    def _widening(self, stored: list[Any]) -> list[Trial]:
        """One more point beyond an edge that won, within the hard bounds."""
        if len(stored) >= self.total + self.sheet.widenings or not self.sheet.hard:
            return []
        spent = [as_record(self, frozen) for frozen in stored]
        searched = (spent, self.sheet.space, self.sheet.hard, self.experiment.sheet.metric.better)
        value = tuning.widen(*searched)
        if value is None:
            return []
        won = tuning.winner(*searched)
        return [self._trial(len(stored), won.params | {won.path: tidy(value)})]

    def _trial(self, number: int, params: dict[str, Any]) -> Trial:
        recipe, runs = self.recipe(params), []
        for i, seed in enumerate(self.sheet.seeds):
            seeded = replace(recipe, seed=seed)
            runs.append(Run(self.cell.name, number * len(self.sheet.seeds) + i, seeded, run_id(seeded)))
        return Trial(self.cell, number, params, runs)

    def tell(self, trial: Trial, store: Store) -> None:
        """Store a trial whose runs have ended: complete with the mean over its seeds, or pruned, or failed with the reason."""
        from optuna.distributions import FloatDistribution
        from optuna.trial import TrialState, create_trial

        results = [store.run(run.id).result() for run in trial.runs]
        worst = next((result for result in results if result.status != FINISHED), results[0])
        values = {str(run.recipe.seed): result.metrics.get(self.experiment.sheet.metric.name) for run, result in zip(trial.runs, results, strict=True)}
        state = {FINISHED: TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(worst.status, TrialState.FAIL)
        spaces = {axis.path: axis.distribution() for axis in self.axes}
        for path, space in spaces.items():
            if isinstance(space, FloatDistribution):  # rounding and widening may leave the declared range
                spaces[path] = FloatDistribution(min(space.low, trial.params[path]), max(space.high, trial.params[path]), log=space.log)
        steps = {int(line["step"]): line[name] for line in store.run(trial.runs[0].id).metrics() if (name := self.experiment.sheet.metric.name) in line}
        self.study.add_trial(create_trial(
            state=state, value=sum(values.values()) / len(values) if state == TrialState.COMPLETE else None, params=trial.params,
            distributions=spaces, intermediate_values=steps,
            user_attrs={"state": STATES.get(worst.status, worst.status), "runs": [run.id for run in trial.runs],
                        "values": values, "seconds": sum(result.seconds for result in results), "error": worst.error},
        ))  # fmt: skip


def tuned_recipe(experiment: Experiment, cell: Cell, params: dict[str, Any]) -> Recipe:
    """The cell's recipe with searched values in place; `with.NAME.DOSE` sets a dose, any other path the base recipe."""
    base, treatment = experiment.base, dict(cell.treatment)
    for path, value in params.items():
        if path.startswith("with."):
            _, name, dose = path.split(".")
            treatment[name] = assign(treatment[name], dose, value)
        else:
            base = assign(base, path, value)
    return resolve(base, treatment)


def as_record(arm: Arm, frozen: Any) -> tuning.Trial:
    attrs = frozen.user_attrs
    return tuning.Trial(arm.cell.name, frozen.number, dict(frozen.params), attrs["state"], frozen.value, attrs["values"], attrs["runs"], attrs["seconds"])


@dataclass(frozen=True)
class Tuned(Experiment):
    """The confirmation: each cell at its own best point."""

    best: dict[str, dict[str, Any]] = None  # cell -> params

    def _resolve(self, cell: Cell) -> Recipe:
        return tuned_recipe(self, cell, self.best[cell.name])


class Study:
    """The coordinator of one experiment's study."""

    def __init__(self, experiment: Experiment, store: Store, watcher: Watcher, storage: str | None = None):
        sheet = experiment.sheet.study
        if sheet is None:
            raise UserError(f"{experiment.name} has no study: block; add one with a space, or start it with: ablab run {experiment.name}")
        if shared := sorted(set(sheet.seeds) & set(experiment.sheet.seeds)):
            raise UserError(f"study.seeds and seeds share {shared}; selection and confirmation need disjoint seeds")
        self.experiment, self.store, self.watcher, self.sheet = experiment, store, watcher, sheet
        self.axes = axes_of(sheet.space)
        check(sheet.pruner, sheet.seeds)
        _check_paths(experiment, self.axes)
        store.root.mkdir(parents=True, exist_ok=True)
        self.url = storage or f"sqlite:///{store.root / 'optuna.db'}"
        held = open_storage(self.url)
        self.arms = [Arm(experiment, cell, self.axes, held) for cell in experiment.cells]
        for arm in self.arms:
            arm.check()

    @cached_property
    def plan_name(self) -> str:
        return f"{self.experiment.name}@study"

    def tune(self, jobs: int | None, plugins: Iterable[str], mlflow: bool) -> tuning.StudyRecord:
        """Run generations until every arm is done or the hours are spent.  Returns what stands in the storage."""
        began, pool = time.monotonic(), None
        trackers = trackers_for(self.store, self.plan(), self.watcher.say) if mlflow else None
        try:
            while trials := [(arm, trial) for arm in self.arms for trial in arm.generation()]:
                if self.sheet.hours and time.monotonic() - began > self.sheet.hours * 3600:
                    self.watcher.say(f"stopped after {self.sheet.hours} h with {len(trials)} proposed trials open; the same command goes on")
                    break
                plan = self.plan([trial for _, trial in trials])
                self.store.write_plan(plan)
                runs = {run.id: run for _, trial in trials for run in trial.runs}
                missing = [run for id, run in runs.items() if not result_of(self.store.run(id), self.watcher.say)]
                self.watcher.planned(len(runs), len(runs) - len(missing), jobs or 0)
                if missing:
                    pool = pool or Pool(self.experiment, self.store, self.watcher, jobs, plugins)
                    pool.trackers = trackers.over(plan) if trackers else None
                    pool.train(missing, self._stops(trials))
                for arm, trial in trials:
                    arm.tell(trial, self.store)
                self.write()
        finally:
            if pool:
                pool.close()
        self.store.write_plan(self.plan())
        if trackers:
            trackers.over(self.plan()).finish()
        return self.write()

    def _stops(self, trials: list[tuple[Arm, Trial]]) -> Callable[[Run, int, dict[str, float]], bool]:
        """Whether a run that has just logged should end: asked only at evaluations, only in arms that may be pruned."""
        metric, better = self.experiment.sheet.metric.name, self.experiment.sheet.metric.better
        referees = {
            trial.runs[0].id: Referee(self.sheet.pruner, direction(better), arm.study.get_trials(deepcopy=False)) for arm, trial in trials if arm.prunes
        }
        return lambda run, step, scalars: metric in scalars and run.id in referees and referees[run.id].stops(step, scalars[metric])

    def plan(self, coming: Iterable[Trial] = ()) -> Any:
        """Every trial as a planned run: what MLflow shows, tagged with study, trial number and state."""
        rows = []
        for arm in self.arms:
            for frozen in arm.study.get_trials(deepcopy=False):
                trial = arm._trial(frozen.number, dict(frozen.params))
                rows += [self._row(trial, run, frozen.user_attrs["state"]) for run in trial.runs]
        rows += [self._row(trial, run, "running") for trial in coming for run in trial.runs]
        return replace(self.experiment.plan([]), name=self.plan_name, design="study", rows=rows)

    def _row(self, trial: Trial, run: Run, state: str) -> Planned:
        tags = {"ablab.study": self.experiment.name, "ablab.trial": str(trial.number), "ablab.trial_state": state}
        return Planned(run.cell, run.pair, run.recipe.seed, run.id, tags=tags)

    def write(self) -> tuning.StudyRecord:
        """Leave STORE/studies/NAME.json: what the reports read."""
        sheet, metric = self.sheet, self.experiment.sheet.metric
        trials = [as_record(arm, frozen) for arm in self.arms for frozen in arm.study.get_trials(deepcopy=False)]
        base = {axis.path: at(self.experiment.base, axis.path) for axis in self.axes if not axis.path.startswith("with.")}
        record = tuning.StudyRecord(
            name=self.experiment.name, question=self.experiment.sheet.question, metric=metric.name, better=metric.better, space=sheet.space,
            hard=sheet.hard, base=base, sampler=sheet.sampler, pruner=sheet.pruner, seeds=sheet.seeds,
            trials_per_cell=self.arms[0].total, trials=trials, importance={arm.cell.name: importance(arm.study) for arm in self.arms},
            tuned=f"{self.experiment.name}@tuned" if self.experiment.sheet.seeds else None,
        )  # fmt: skip
        tuning.write(self.store, record)
        return record

    def confirm(self, record: tuning.StudyRecord, jobs: int | None, plugins: Iterable[str], mlflow: bool) -> None:
        """Train every cell on the confirmation seeds: once at the shared values, once at its own best ones."""
        best = {}
        for arm in self.arms:
            spent = [trial for trial in record.trials if trial.cell == arm.cell.name]
            try:
                won = tuning.winner(spent, record.space, record.hard, record.better)
            except UserError as dead:
                self.watcher.say(f"{dead}; the other arms are confirmed without it")
                continue
            best[arm.cell.name] = won.params
            if not won.admissible:
                self.watcher.say(f"{arm.cell.name}: INADMISSIBLE: {won.reason}")
        fields = {name: getattr(self.experiment, name) for name in ("sheet", "base")}
        fields["cells"] = [replace(cell, reference=cell.reference if cell.reference in best else None) for cell in self.experiment.cells if cell.name in best]
        tuned = Tuned(name=f"{self.experiment.name}@tuned", best=best, **fields)
        for experiment in (self.experiment, tuned):
            execute(experiment, self.store, experiment.runs(), self.watcher, jobs, plugins, mlflow)


def _check_paths(experiment: Experiment, axes: list[Axis]) -> None:
    """Refuse an unknown path, with the near miss, before anything runs."""
    for axis in axes:
        if axis.path.startswith("with."):
            known = {f"with.{name}" for cell in experiment.cells for name in cell.treatment}
            holder = next((cell for cell in experiment.cells if axis.path.split(".")[1] in cell.treatment), None)
            if holder is None:
                raise UserError(f"study.space: unknown path {axis.path!r}; this experiment has {', '.join(sorted(known)) or 'no interventions'}")
            tuned_recipe(experiment, holder, {axis.path: axis.ends[0]})
        else:
            assign(experiment.base, axis.path, axis.ends[0])


def importance(study: Any) -> dict[str, float]:
    """PED-ANOVA importance of each axis, shares of 1; empty with fewer than four complete trials or one axis."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if len(complete) < 4 or len(complete[0].params) < 2:
        return {}
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    total = sum(shares.values()) or 1.0
    return {path: share / total for path, share in shares.items()}
