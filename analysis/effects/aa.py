"""A/A arms: the same recipe on other seeds.  A verdict that tells them apart is a false alarm; how often is counted.

An A/A arm is a cell on seeds of its own with the treatment of its reference, as design replicate makes it.  Where
verdicts err in 5 % of families, at most 5 % of these should be told apart.
"""

from dataclasses import dataclass

from scipy.special import betaincinv

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import HELPS, HURTS, Effect
from ablab.analysis.effects.effects import measure
from ablab.analysis.effects.intervals import MODERATED_FROM
from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store


@dataclass(frozen=True)
class FalseAlarms:
    """Over all experiments of a store."""

    arms: int  # A/A arms with seeds enough for a verdict
    alarms: tuple[str, ...]  # those that were told apart: EXPERIMENT: CELL

    @property
    def rate(self) -> float:
        return len(self.alarms) / self.arms

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's 95 % interval of the rate."""
        k, n = len(self.alarms), self.arms
        low = float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0
        high = float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
        return low, high

    def __str__(self) -> str:
        if not self.arms:
            return (
                "no A/A arm in this store has seeds enough for a verdict: "
                "its rate of false alarms is not known (design: replicate measures it)"
            )
        low, high = self.interval
        which = f": {', '.join(self.alarms)}" if self.alarms else ""
        return (
            f"{len(self.alarms)} of {self.arms} A/A arms in this store are told apart, {self.rate:.0%} "
            f"(95 % interval {low:.0%} to {high:.0%}){which}"
        )


def false_alarms(store: Store) -> FalseAlarms:
    """Experiments whose plan or runs cannot be read are passed over: their own reports say so."""
    arms = 0
    alarms = []
    for name in store.experiments():
        try:
            plan = store.read_plan(name)
            cells = replicas(plan)
            effects = _effects(store, plan) if cells else []
        except UserError:
            continue
        judged = [one for one in effects if one.cell in cells and one.n >= MODERATED_FROM]
        arms += len(judged)
        alarms += [f"{name}: {one.cell}" for one in judged if one.verdict in (HELPS, HURTS)]
    return FalseAlarms(arms, tuple(alarms))


def replicas(plan: GridPlan) -> set[str]:
    """The A/A arms of a plan: on seeds of their own, with the treatment of their reference."""
    treatments = plan.treatments
    seeds: dict[str, set[int]] = {}
    for row in plan.rows:
        seeds.setdefault(row.cell, set()).add(row.seed)
    return {
        row.cell
        for row in plan.rows
        if row.reference in seeds
        and treatments.get(row.cell) == treatments.get(row.reference)
        and plan.settings.get(row.cell) == plan.settings.get(row.reference)
        and not seeds[row.cell] & seeds[row.reference]
    }


def _effects(store: Store, plan: GridPlan) -> list[Effect]:
    runs = frame.load(store, plan.name)
    return measure(runs, plan.metric, plan.better, plan.equivalence, plan.looks)
