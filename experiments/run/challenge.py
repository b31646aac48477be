"""A challenge: the arm and what it is measured against, again, on as many seeds that nothing has used."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import INADMISSIBLE, INERT, REFERENCE, TOO_FEW, Effect
from ablab.analysis.effects.effects import measure
from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.store.ledger import CHALLENGE, Ledger
from ablab.core.store.planned import CHALLENGED, GridPlan
from ablab.core.store.registration import Stopping
from ablab.core.store.result import FINISHED, said
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment
from ablab.experiments.plan.overrides import LONGEST_NAME
from ablab.experiments.run.verdicts import verdict_of

STANDS = "stands"
FALLS = "does not stand"


@dataclass(frozen=True)
class Challenged:
    """A verdict beside that of the fresh seeds."""

    arm: str
    before: Effect
    after: Effect

    @property
    def stands(self) -> bool:
        return self.before.verdict == self.after.verdict

    @property
    def sentence(self) -> str:
        word = STANDS if self.stands else FALLS
        seeds = ", ".join(map(str, self.after.seeds))
        return (
            f"`{self.arm}`: {self.before.verdict} {_number(self.before)} {word}: "
            f"{self.after.verdict} {_number(self.after)} on fresh seeds {seeds}"
        )


def _number(effect: Effect) -> str:
    if effect.delta is None:
        return "without a number"
    if effect.interval is None:
        return f"{effect.delta:+.4f}"
    return f"{effect.delta:+.4f} [{effect.interval.low:+.4f}, {effect.interval.high:+.4f}]"


class Challenge:
    """Of one arm of an experiment that has a verdict.  Raises UserError where it has none."""

    def __init__(self, experiment: Experiment, store: Store, arm: str):
        self.store = store
        self.arm = arm
        self.plan = store.read_plan(experiment.name)
        self.before = _verdict_on(arm, store, self.plan)
        cell = experiment.cell_named[arm]
        reference = experiment.cell_named[cell.reference or arm]
        self.experiment = replace(
            experiment,
            name=_name(experiment.name, arm),
            cells=[replace(reference, reference=None), cell],
            factors=None,
            infeasible={},
            stopping=Stopping(),
        )
        self.seeds = self._fresh()

    def _fresh(self) -> list[int]:
        """Those of a challenge that was begun, while nothing else has used them; else the next ones."""
        used = {row.pair for row in self.plan.rows}
        count = max(self.before.n, 1)
        path = self.store.plan_path(self.experiment.name)
        if path.is_file():
            begun = self.store.read_plan(self.experiment.name)
            seeds = sorted({row.pair for row in begun.rows} - used)
            if len(seeds) >= count:
                return seeds[-count:]
        following = max(used, default=-1) + 1
        return list(range(following, following + count))

    def judge(self, say: Callable[[str], None]) -> Challenged:
        """After its runs have ended; written into the ledger.  Raises UserError where none has finished."""
        plan = self.store.read_plan(self.experiment.name)
        runs = frame.load(self.store, plan.name)
        fresh = runs[runs.pair.isin(self.seeds)]
        if not (fresh.status == FINISHED).any():
            raise UserError(
                f"no run of the challenge of {self.arm!r} has finished: {said(Counter(fresh.status))}"
            )
        effects = measure(fresh, plan.metric, plan.better, self.plan.equivalence)
        after = next(one for one in effects if one.cell == self.arm)
        found = Challenged(self.arm, self.before, after)
        content = {
            "arm": self.arm,
            "stands": found.stands,
            "sentence": found.sentence,
            "before": verdict_of(self.before),
            "after": verdict_of(after),
        }
        Ledger(self.store.root).note(CHALLENGE, self.plan.name, content, say)
        return found


def _verdict_on(arm: str, store: Store, plan: GridPlan) -> Effect:
    runs = frame.load(store, plan.name)
    effects = measure(runs, plan.metric, plan.better, plan.equivalence, plan.looks)
    arms = {one.cell: one for one in effects}
    challenged = [name for name, one in arms.items() if one.verdict != REFERENCE]
    if arm not in arms:
        raise UserError(
            f"{plan.name} has no arm {arm!r}. {near(arm, challenged)}Arms: {', '.join(challenged) or 'none'}"
        )
    found = arms[arm]
    why = {
        REFERENCE: "it is what others are measured against",
        INERT: "it changes nothing, on any seed",
        INADMISSIBLE: "no run of it has finished",
        TOO_FEW: f"it has too few seeds ({found.n})",
    }
    if found.verdict in why:
        raise UserError(
            f"{arm!r} of {plan.name} has no verdict to challenge: {why[found.verdict]}; "
            f"arms with one: {', '.join(_with_verdict(arms)) or 'none'}"
        )
    return found


def _with_verdict(arms: dict[str, Effect]) -> list[str]:
    without = (REFERENCE, INERT, INADMISSIBLE, TOO_FEW)
    return [name for name, one in arms.items() if one.verdict not in without]


def _name(experiment: str, arm: str) -> str:
    """quickstart@challenge=- mup, whose plan and report stand beside those of quickstart."""
    name = f"{experiment}@{CHALLENGED}{arm}"
    if len(name.encode()) < LONGEST_NAME:
        return name
    return f"{experiment}@{CHALLENGED}{hashlib.sha256(arm.encode()).hexdigest()[:12]}"
