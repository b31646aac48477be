"""The search of one cell: what was tried, what comes next, and which trials are stopped early."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ablab.ablations.design import Cell
from ablab.analysis.tuning.winners import widen, winner
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.planned import Planned
from ablab.core.store.result import Result
from ablab.core.store.store import Store
from ablab.core.store.study_record import COMPLETE, RUNNING, Trial
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.sheets import StudySheet
from ablab.experiments.tune import storage
from ablab.experiments.tune.proposals import LAID_OUT, Proposer, spread_of
from ablab.experiments.tune.pruning import Past, Referee
from ablab.experiments.tune.space import STAGES, Axis, Point, tidy, total_trials
from ablab.experiments.tune.storage import direction
from ablab.experiments.tune.trials import Candidate, ending_of, frozen, recorded

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


class CellSearch:
    """Proposes candidates of one cell, generation after generation, and keeps what became of them."""

    study: "Study"  # Optuna's, once `open` was called
    proposer: Proposer

    def __init__(
        self, experiment: Experiment, sheet: StudySheet, cell: Cell, axes: Sequence[Axis]
    ):
        """axes: of the whole study; doses of interventions that the cell lacks are no axes of it."""
        self.experiment = experiment
        self.sheet = sheet
        self.cell = cell
        self.axes = [axis for axis in axes if _concerns(axis, cell)]
        if not self.axes:
            raise UserError(
                f"cell {cell.name!r} has nothing to tune: none of {', '.join(axis.path for axis in axes)} "
                "is in it; add a recipe path such as optim.lr"
            )
        self.name = f"{experiment.name}/{cell.name}"
        self.metric = experiment.sheet.metric
        self.total = total_trials(self.axes, sheet)
        # Points that are fixed beforehand wait for no result; a pruner does.
        at_once = sheet.sampler in LAID_OUT and sheet.pruner == "none"
        self.size = self.total if at_once else sheet.generation
        self.referees: dict[int, Referee] = {}  # of the trials that are not stored yet
        self.records: list[Trial] = []  # of those that are, as far as they were asked for
        self.shown: dict[str, dict[str, Any]] = {}  # run id -> what trackers show of it

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the proposals and values: two studies that differ in one of these are two studies."""
        sheet = self.sheet
        facts: dict[str, Any] = {
            "space": {axis.path: self._described(axis) for axis in self.axes},
            "sampler": sheet.sampler,
            "sampler_seed": sheet.sampler_seed,
            "generation": sheet.generation,
            "seeds": sheet.seeds,
            "metric": self.metric.name,
            "better": self.metric.better,
            "pruner": sheet.pruner,
            "recipe": self._run(0, self.experiment.resolved(self.cell), seed=0).id,
        }
        if sheet.sampler == "qmc":
            facts["trials_per_cell"] = self.total
        return facts

    def _described(self, axis: Axis) -> list[Any]:
        described = [axis.kind, *axis.values]
        if self.sheet.sampler == "grid" and axis.kind != "choices":
            described.append(axis.points)
        return described

    def _run(self, pair: int, recipes: Sequence[Recipe], seed: int) -> PlannedRun:
        return self.experiment.planned(self.cell, pair, recipes, seed)

    def open(self, held: "BaseStorage") -> None:
        """Take up the study where it was, or make it.  Raises UserError for a stored trial that was changed."""
        spread = spread_of(self.axes, self.sheet)
        better = self.metric.better
        self.study = storage.open_study(held, self.name, better, self.facts, spread)
        first = self.study.user_attrs[storage.SPREAD]
        self.proposer = Proposer(self.axes, self.sheet, self.name, better, first)
        self.spent()

    # -- what comes next -------------------------------------------------------------------------------------------
    @property
    def stored(self) -> list["FrozenTrial"]:
        return self.study.get_trials(deepcopy=False)

    def recipes(self, params: Point) -> list[Recipe]:
        """One for each stage."""
        return self.experiment.resolved(self.cell, params)

    def generation(self) -> list[Candidate]:
        """The candidates that come next, those of an interrupted generation first; empty when the search is over."""
        stored = self.stored
        if len(stored) >= self.total:
            return self._widening(len(stored))
        first = self._first_of_generation(len(stored))
        count = min(self.size, self.total - first)
        points = self.proposer.points(stored[:first], count)
        numbered = list(enumerate(points, first))
        open_ones = numbered[len(stored) - first :]
        return [self._candidate(number, point) for number, point in open_ones]

    def _first_of_generation(self, number: int) -> int:
        """The first trial of the generation of trial `number`; after the last generation, each stands alone."""
        if number >= self.total:
            return number
        return number // self.size * self.size

    def _widening(self, stored: int) -> list[Candidate]:
        """One more point beyond an edge that won, within the hard bounds.  stored: how many trials there are."""
        sheet = self.sheet
        if not sheet.hard or stored >= self.total + sheet.widenings:
            return []
        spent = self.spent()
        if not any(one.state == COMPLETE for one in spent):
            return []
        searched = (spent, sheet.space, sheet.hard, self.metric.better)
        value = widen(*searched)
        won = winner(*searched)
        if value is None or won.path is None:
            return []
        return [self._candidate(stored, won.params | {won.path: tidy(value)})]

    def _candidate(self, number: int, params: Point) -> Candidate:
        recipes = self.recipes(params)
        seeds = self.sheet.seeds
        pairs = enumerate(seeds, number * len(seeds))
        runs = [self._run(pair, recipes, seed) for pair, seed in pairs]
        return Candidate(self.cell, number, params, runs)

    # -- pruning ---------------------------------------------------------------------------------------------------
    @cached_property
    def past(self) -> Past | None:
        """None: nothing is pruned here.  A curve that crosses its control's late is never judged early."""
        late = any(one.about.crosses_late for one in self.cell.treatment.values())
        if self.sheet.pruner == "none" or late:
            return None
        evaluations = self.experiment.sheet.runtime.evaluations
        better = direction(self.metric.better)
        steps = self.experiment.resolved(self.cell)[-1].steps
        return Past(self.sheet.pruner, better, steps, evaluations)

    def verdict(self, candidate: Candidate, store: Store) -> int | None:
        """The step after which the candidate is pruned, as far as its curve has got; None: it may go on."""
        if self.past is None:
            return None
        number = candidate.number
        if number not in self.referees:
            before = self.stored[: self._first_of_generation(number)]
            self.referees[number] = self.past.referee(before, number)
        return self.referees[number].verdict(self._curve(candidate, store))

    def _curve(self, candidate: Candidate, store: Store) -> dict[int, float]:
        """Step -> value, at the evaluations; of the first seed, the only one where a pruner judges."""
        lines = store.run(candidate.runs[0].id).metrics()
        name = self.metric.name
        return {int(line["step"]): line[name] for line in lines if name in line}

    # -- what has ended --------------------------------------------------------------------------------------------
    def tell(self, candidate: Candidate, store: Store) -> None:
        """Store a candidate whose runs have ended: complete with the mean over its seeds, or pruned, or failed.

        Curves are stored where a pruner will ask for them; everywhere else they stay in the run folders.
        """
        results = [_ended(store, run) for run in candidate.runs]
        stopped = self.verdict(candidate, store)
        curve = self._curve(candidate, store) if self.past else {}
        ending = ending_of(candidate, results, self.metric.name, stopped, curve)
        self.study.add_trial(frozen(candidate, ending, self.axes))
        self.referees.pop(candidate.number, None)

    def spent(self) -> list[Trial]:
        """The stored trials, as the reports want them."""
        for trial in self.stored[len(self.records) :]:
            self.records.append(recorded(self.cell.name, trial))
        return self.records

    def rows(self, coming: Sequence[Candidate]) -> list[Planned]:
        """Every trial as planned runs: what MLflow shows, tagged with study, trial number and state."""
        rows = []
        for one in self.spent():
            rows += self._planned(one.number, one.state, one.params, one.runs)
        for candidate in coming:
            ids = [run.id for run in candidate.runs]
            rows += self._planned(candidate.number, RUNNING, candidate.params, ids)
        return rows

    def _planned(self, number: int, state: str, point: Point, runs: list[str]) -> list[Planned]:
        tags = {
            "ablab.study": self.experiment.name,
            "ablab.trial": str(number),
            "ablab.trial_state": state,
        }
        seeded = zip(self.sheet.seeds, runs, strict=True)
        first = number * len(runs)
        rows = []
        for pair, (seed, id) in enumerate(seeded, first):
            params = self._params(point, seed, id)
            rows.append(Planned(self.cell.name, pair, seed, id, tags=tags, params=params))
        return rows

    def _params(self, point: Point, seed: int, id: str) -> dict[str, Any]:
        """What trackers show of a run: seen from this study, also where another experiment has trained it."""
        if id not in self.shown:
            run = self._run(0, self.recipes(point), seed)
            of_stages = {path: value for path, value in point.items() if _of_a_stage(path)}
            self.shown[id] = self.experiment.params(run) | of_stages
        return self.shown[id]


def _concerns(axis: Axis, cell: Cell) -> bool:
    """Whether the cell has what the axis searches: a dose is there with its intervention alone."""
    return not axis.dose_of or axis.dose_of in cell.treatment


def _of_a_stage(path: str) -> bool:
    return path.startswith(f"{STAGES}.")


def _ended(store: Store, run: PlannedRun) -> Result:
    result = store.run(run.id).result()
    assert result is not None, f"run {run.id} is told before it has ended"
    return result
