"""The search of one cell: what was tried, what comes next, and how an ended trial is stored."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ablab.ablations.design import Cell
from ablab.analysis.tuning import winners as tuning
from ablab.core.errors import UserError
from ablab.core.recipe.intervention import resolve
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import Recipe, run_id
from ablab.core.store import study_record
from ablab.core.store.planned import Planned
from ablab.core.store.result import FINISHED, PRUNED
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.tune import proposals as search
from ablab.experiments.tune import storage
from ablab.experiments.tune.proposals import Axis
from ablab.experiments.tune.pruning import Past, Referee

STATES = {
    FINISHED: study_record.COMPLETE
}  # of a run -> of a trial; any other status keeps its name


@dataclass(frozen=True)
class Trial:
    """One proposed point of a cell; `number` counts from 0 within the cell."""

    cell: Cell
    number: int
    params: dict[str, Any]
    runs: list[PlannedRun]  # one for each selection seed


class Arm:
    """Doses of interventions that the cell lacks are no axes of it."""

    def __init__(self, experiment: Experiment, cell: Cell, axes: list[Axis]):
        self.experiment, self.cell, self.sheet = experiment, cell, experiment.sheet.study
        self.axes = [
            axis
            for axis in axes
            if not axis.path.startswith("with.") or axis.path.split(".")[1] in cell.treatment
        ]
        if not self.axes:
            raise UserError(
                f"cell {cell.name!r} has nothing to tune: none of {', '.join(a.path for a in axes)} is in it; add a recipe path such as optim.lr"
            )
        self.name, self.metric = f"{experiment.name}/{cell.name}", experiment.sheet.metric
        self.total = search.total_trials(self.axes, self.sheet)
        at_once = (
            self.sheet.sampler in ("grid", "qmc") and self.sheet.pruner == "none"
        )  # their points wait for no result, a pruner does
        self.size = self.total if at_once else self.sheet.generation
        self.study: Any = None
        self.referees: dict[int, Referee] = {}  # of the trials that are not stored yet
        self.records: list[
            study_record.Trial
        ] = []  # of those that are, as far as they were asked for

    # -- before anything runs --------------------------------------------------------------------------------------
    def check(self) -> None:
        """Every corner of the space must build, and so must the hard bounds and whole numbers between.  Raises UserError naming the point."""
        lows = {axis.path: axis.ends[0] for axis in self.axes}
        inner = [
            lows | {axis.path: axis.ends[0] + 1} for axis in self.axes if axis.kind == "int"
        ]
        beyond = [
            lows | {path: end}
            for path, bounds in self.sheet.hard.items()
            if path in lows
            for end in bounds
        ]
        for what, points in (
            ("corner", search.corners(self.axes)),
            ("point", inner),
            ("hard bound", beyond),
        ):
            for point in points:
                try:
                    self.recipe(point)
                except UserError as flaw:
                    where = ", ".join(f"{path}={value}" for path, value in point.items())
                    raise UserError(
                        f"study.space of {self.experiment.name}: the {what} {where} of cell {self.cell.name!r} cannot be built: {flaw}"
                    ) from None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the proposals and values: two studies that differ in one of these are two studies."""
        grid, qmc = self.sheet.sampler == "grid", self.sheet.sampler == "qmc"
        return {
            "space": {
                axis.path: [axis.kind, *axis.values]
                + [axis.points] * (grid and axis.kind != "choices")
                for axis in self.axes
            },
            "sampler": self.sheet.sampler,
            "sampler_seed": self.sheet.sampler_seed,
            "generation": self.sheet.generation,
            "seeds": self.sheet.seeds,
            "metric": self.metric.name,
            "better": self.metric.better,
            "pruner": self.sheet.pruner,
            "recipe": run_id(resolve(self.experiment.base, self.cell.treatment)),
        } | ({"trials_per_cell": self.total} if qmc else {})

    def open(self, held: Any) -> None:
        self.study = storage.open_study(
            held,
            self.name,
            self.metric.better,
            self.facts,
            search.spread_of(self.axes, self.sheet),
        )
        self.spread = self.study.user_attrs["spread"]

    # -- what comes next -------------------------------------------------------------------------------------------
    @property
    def stored(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def recipe(self, params: dict[str, Any]) -> Recipe:
        return tuned_recipe(self.experiment, self.cell, params)

    def generation(self) -> list[Trial]:
        """The trials that come next, those of an interrupted generation first; empty when the search is over."""
        stored = self.stored
        if len(stored) >= self.total:
            return self._widening(stored)
        first = self._first(len(stored))
        count = min(self.size, self.total - first)
        points = search.propose(
            self.axes,
            self.sheet,
            self.name,
            self.metric.better,
            stored[:first],
            count,
            self.spread,
        )
        return [
            self._trial(first + i, params)
            for i, params in enumerate(points)
            if first + i >= len(stored)
        ]

    def _first(self, number: int) -> int:
        """The first trial of the generation of trial `number`; after the last generation, each stands alone."""
        return number if number >= self.total else number // self.size * self.size

    def _widening(self, stored: list[Any]) -> list[Trial]:
        """One more point beyond an edge that won, within the hard bounds."""
        spent = self.spent()
        if (
            len(stored) >= self.total + self.sheet.widenings
            or not self.sheet.hard
            or not any(one.state == study_record.COMPLETE for one in spent)
        ):
            return []
        searched = (spent, self.sheet.space, self.sheet.hard, self.metric.better)
        value = tuning.widen(*searched)
        if value is None:
            return []
        won = tuning.winner(*searched)
        return [self._trial(len(stored), won.params | {won.path: search.tidy(value)})]

    def _trial(self, number: int, params: dict[str, Any]) -> Trial:
        recipe, runs = self.recipe(params), []
        for i, seed in enumerate(self.sheet.seeds):
            seeded = replace(recipe, seed=seed)
            runs.append(
                PlannedRun(
                    self.cell.name, number * len(self.sheet.seeds) + i, seeded, run_id(seeded)
                )
            )
        return Trial(self.cell, number, params, runs)

    # -- pruning ---------------------------------------------------------------------------------------------------
    @cached_property
    def past(self) -> Past | None:
        """None: nothing is pruned here.  A curve that crosses its control's late is never judged early."""
        if self.sheet.pruner == "none" or any(
            one.about.crosses_late for one in self.cell.treatment.values()
        ):
            return None
        steps = resolve(self.experiment.base, self.cell.treatment).steps
        return Past(
            self.sheet.pruner,
            search.direction(self.metric.better),
            steps,
            self.experiment.sheet.runtime.evaluations,
        )

    def verdict(self, trial: Trial, store: Store) -> int | None:
        """The step after which the trial is pruned, as far as its curve has got; None: it may go on."""
        if self.past is None:
            return None
        if trial.number not in self.referees:
            self.referees[trial.number] = self.past.referee(
                self.stored[: self._first(trial.number)], trial.number
            )
        return self.referees[trial.number].verdict(self._curve(trial, store))

    def _curve(self, trial: Trial, store: Store) -> dict[int, float]:
        return {
            int(line["step"]): line[self.metric.name]
            for line in store.run(trial.runs[0].id).metrics()
            if self.metric.name in line
        }

    # -- what has ended --------------------------------------------------------------------------------------------
    def tell(self, trial: Trial, store: Store) -> None:
        """Store a trial whose runs have ended: complete with the mean over its seeds, or pruned, or failed with the reason.

        Curves are stored where a pruner will ask for them; everywhere else they stay in the run folders.
        """
        from optuna.trial import TrialState, create_trial

        results = [store.run(run.id).result() for run in trial.runs]
        worst = next((result for result in results if result.status != FINISHED), results[0])
        values = {
            str(run.recipe.seed): result.metrics.get(self.metric.name)
            for run, result in zip(trial.runs, results, strict=True)
        }
        stopped, curve = self.verdict(trial, store), self._curve(trial, store)
        status = worst.status if stopped is None else PRUNED
        state = {FINISHED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}.get(
            status, TrialState.FAIL
        )
        told = {
            "runs": [run.id for run in trial.runs],
            "values": values,
            "seconds": sum(result.seconds for result in results),
        }
        if why := worst.error if stopped is None else f"pruned at step {stopped}":
            told["error"] = why
        heard = (
            {step: value for step, value in curve.items() if step <= (stopped or step)}
            if self.past
            else {}
        )
        self.study.add_trial(
            create_trial(  # each value and attribute is a row of a database: 3 ms to store, 10,000 trials to load
                state=state,
                value=sum(values.values()) / len(values)
                if state == TrialState.COMPLETE
                else None,
                params=trial.params,
                distributions=self._spaces(trial.params),
                intermediate_values=heard,
                user_attrs={"state": STATES.get(status, status), "told": told},
            )
        )
        self.referees.pop(trial.number, None)

    def _spaces(self, params: dict[str, Any]) -> dict[str, Any]:
        """The distributions that Optuna wants to see; that of a widened path reaches as far as its value."""
        from optuna.distributions import FloatDistribution

        spaces = {axis.path: axis.distribution() for axis in self.axes}
        for path, space in spaces.items():
            if isinstance(space, FloatDistribution):
                spaces[path] = FloatDistribution(
                    min(space.low, params[path]), max(space.high, params[path]), log=space.log
                )
        return spaces

    def spent(self) -> list[study_record.Trial]:
        """The stored trials, as the reports want them."""
        for frozen in self.stored[len(self.records) :]:
            told = frozen.user_attrs["told"]
            known = (
                dict(frozen.params),
                frozen.user_attrs["state"],
                frozen.value,
                told["values"],
                told["runs"],
                told["seconds"],
            )
            self.records.append(study_record.Trial(self.cell.name, frozen.number, *known))
        return self.records

    def rows(self, coming: list[Trial]) -> list[Planned]:
        """Every trial as planned runs: what MLflow shows, tagged with study, trial number and state."""
        known = [
            (one.number, one.state, list(zip(self.sheet.seeds, one.runs, strict=True)))
            for one in self.spent()
        ]
        known += [
            (one.number, study_record.RUNNING, [(run.recipe.seed, run.id) for run in one.runs])
            for one in coming
        ]
        tags = {"ablab.study": self.experiment.name}
        return [
            Planned(
                self.cell.name,
                number * len(runs) + i,
                seed,
                id,
                tags=tags | {"ablab.trial": str(number), "ablab.trial_state": state},
            )
            for number, state, runs in known
            for i, (seed, id) in enumerate(runs)
        ]


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
