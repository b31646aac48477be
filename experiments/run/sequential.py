"""Looks: seeds are added to the arms that are undecided, and to nothing else, until all are decided or the budget ends.

At the first look every cell has three seeds, at the second the undecided ones five, at the last eight; a verdict passes
what O'Brien and Fleming's spending leaves to its look (analysis/effects/looks.py).  What each look asks for follows
from the results of the looks before it, so the same command goes on wherever it was stopped, and changes nothing once
all is said.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import INCONCLUSIVE, TOO_FEW, Effect
from ablab.analysis.effects.effects import measure
from ablab.analysis.effects.looks import LOOKS
from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger
from ablab.core.store.planned import command
from ablab.core.store.registration import Stopping
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.run.forecast import forecast
from ablab.experiments.run.pool import Outcome
from ablab.experiments.run.progress import Watcher, duration
from ablab.experiments.run.verdicts import note_verdicts

Train = Callable[[Experiment, list[PlannedRun]], Outcome]
HOURS = {"s": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}
UNDECIDED = (INCONCLUSIVE, TOO_FEW)


@dataclass
class Looked:
    """What came of the looks."""

    outcome: Outcome = field(default_factory=Outcome)
    seeds: int = 0  # of the last look
    undecided: list[str] = field(default_factory=list)
    # Why there was no further look; "" where all is decided, or the last look was taken.
    stopped: str = ""


def hours_of(text: str, flag: str = "--budget", example: str = "90m, 4h or 2d") -> float:
    """`90m`, `4h`, `1.5d`.  Raises UserError."""
    said = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|m|min|h|d)\s*", text)
    hours = float(said[1]) * HOURS[said[2]] if said else 0.0
    if not hours:
        raise UserError(f"{flag} {text!r:.80} must be a time above 0, such as {example}")
    return hours


def with_looks(experiment: Experiment, hours: float) -> Experiment:
    """The experiment whose seeds are those of its sheet, then the next unused ones, as many as the last look sees.

    Raises UserError where it has no arm to decide.
    """
    if not any(cell.reference for cell in experiment.cells):
        raise UserError(
            f"{experiment.name} has no arm to decide: design {experiment.sheet.design!r} compares nothing; "
            "run it without --until-decided"
        )
    seeds = list(dict.fromkeys(experiment.sheet.seeds))
    following = max(seeds, default=-1) + 1
    seeds += range(following, following + LOOKS[-1])
    return replace(experiment, stopping=Stopping(tuple(seeds[: LOOKS[-1]]), LOOKS, hours))


class Looking:
    """The looks of one experiment.  train: trains what is missing of these runs."""

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        watcher: Watcher,
        jobs: int | None,
        train: Train,
    ):
        self.experiment = experiment
        self.store = store
        self.watcher = watcher
        self.jobs = jobs
        self.train = train
        self.asked: set[tuple[str, int]] = set()  # (cell, seed), by all looks so far

    def until_decided(self) -> Looked:
        """Raises UserError, KeyboardInterrupt; the same call goes on."""
        looked = Looked()
        wanted = {cell.name for cell in self.experiment.cells}
        for seeds in self.experiment.stopping.looks:
            runs = self._runs(wanted, seeds)
            if too_dear := self._too_dear(runs, seeds):
                looked.stopped = too_dear
                break
            outcome = self.train(self.experiment, runs)
            _add(looked.outcome, outcome)
            effects = self._effects(seeds)
            looked.seeds = seeds
            looked.undecided = [one.cell for one in effects if one.verdict in UNDECIDED]
            note_verdicts(
                Ledger(self.store.root), self.experiment.name, effects, self.watcher.say, seeds
            )
            self.watcher.note(self._told(looked, effects))
            wanted = self._with_references(looked.undecided)
            if not wanted:
                break
        return looked

    def _runs(self, cells: set[str], seeds: int) -> list[PlannedRun]:
        """What this look and those before it ask for, the first seed of all cells before the second."""
        first = self.experiment.stopping.seeds[:seeds]
        self.asked |= set(product(cells, first))
        return [
            run for run in self.experiment.runs(first) if (run.cell, run.pair) in self.asked
        ]

    def _too_dear(self, runs: list[PlannedRun], seeds: int) -> str:
        """Why the budget does not carry the look; empty where it does."""
        hours = self.experiment.stopping.hours or 0.0
        coming = forecast(self.experiment, runs, self.store, self.jobs)
        spent = self._spent()
        if not coming.missing or spent + coming.device_seconds <= 3600 * hours:
            return ""
        left = max(3600 * hours - spent, 0)
        return (
            f"a look at {seeds} seeds needs {coming.missing} runs, about {duration(coming.device_seconds)} of training "
            f"({coming.rate} rate); {duration(left)} of the budget are left; raise --budget to go on"
        )

    def _spent(self) -> float:
        """Seconds that the runs of all looks have trained, earlier stages among them, whoever asked for them."""
        runs = self.experiment.runs(self.experiment.stopping.seeds)
        ids = {one.id for run in runs for one in run.chain}
        return sum(_seconds(self.store, id) for id in ids)

    def _effects(self, seeds: int) -> list[Effect]:
        """As the look sees them: later seeds, which another call may have left, are not peeked at."""
        plan = self.store.read_plan(self.experiment.name)
        table = frame.load(self.store, plan.name)
        seen = table[table.pair.isin(self.experiment.stopping.seeds[:seeds])]
        if not (seen.status == FINISHED).any():
            again = command(plan.name, "report", plan.sheet, plan.asked)
            raise UserError(
                f"no run of {plan.name} has finished, so there is nothing to look at; see why: {again}"
            )
        return measure(seen, plan.metric, plan.better, plan.equivalence, plan.looks)

    def _with_references(self, cells: Iterable[str]) -> set[str]:
        """The cells and all that they are measured against."""
        wanted: set[str] = set()
        for name in cells:
            at: str | None = name
            while at and at not in wanted:
                wanted.add(at)
                at = self.experiment.cell_named[at].reference
        return wanted

    def _told(self, looked: Looked, effects: list[Effect]) -> str:
        arms = sum(one.reference is not None for one in effects)
        undecided = f": {', '.join(looked.undecided)}" if looked.undecided else ""
        return f"look at {looked.seeds} seeds: {len(looked.undecided)} of {arms} arms undecided{undecided}"


def _add(all_of_it: Outcome, more: Outcome) -> None:
    """A run that a later look finds done was trained or reused before."""
    known = {*all_of_it.trained, *all_of_it.reused}
    all_of_it.trained += more.trained
    all_of_it.reused += [run for run in more.reused if run not in known]
    all_of_it.failed = more.failed
    all_of_it.inert |= more.inert


def _seconds(store: Store, run: str) -> float:
    """Of training; a damaged result counts as none."""
    try:
        result = store.run(run).result()
    except UserError:
        return 0.0
    return result.seconds if result else 0.0
