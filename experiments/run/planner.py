"""How many seeds a question needs, and what they cost, from the noise that a store has measured or a person expects."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from ablab.analysis.effects.power import POWER, seeds_needed, smallest_effect
from ablab.core.errors import UserError
from ablab.core.store.planned import command
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment
from ablab.experiments.run.forecast import Forecast, forecast
from ablab.experiments.run.noise import (
    ArmNoise,
    FamilyNoise,
    by_family,
    family_of,
    measured,
    setting_of,
    tree_of,
)

OWN_FROM = 6  # seeds that measure the spread of an arm well enough
MOST_SEEDS = 100  # that are counted in runs and hours: beyond, the answer is "another question"


@dataclass(frozen=True)
class ArmPlan:
    """One arm of the experiment.  Values in the metric's unit."""

    cell: str
    family: str
    spread: float  # expected of its differences
    source: str  # where that was measured
    seeds: int | None  # for the effect and power asked for; None above a thousand
    smallest: (
        float | None
    )  # that the present seeds show; None below three, which get no verdict


@dataclass(frozen=True)
class SeedPlan:
    """What is needed to tell an effect with that power in a family of all arms, by Holm's first step."""

    experiment: str
    metric: str
    effect: float
    power: float
    noise: list[FamilyNoise]
    arms: list[ArmPlan]
    present: int  # seeds of the sheet
    seeds: int | None  # that the noisiest arm needs; None above MOST_SEEDS
    runs: int  # of all cells with so many seeds
    missing: int
    hours: float  # of one device, for what is missing
    rate: str  # "measured" or "guessed"
    on_a_gpu: float | None = None  # hours on one H100, where a CPU would take days


def seed_plan(
    experiment: Experiment,
    store: Store,
    effect: float | None,
    power: float = POWER,
    jobs: int | None = None,
    spread: float | None = None,
) -> SeedPlan:
    """effect: None for the smallest effect of interest that the sheet names.

    spread: the sd over seeds of every arm's difference; None: as the store has measured it.
    Raises UserError where no effect is given, and where no spread is and the store has measured none of this setting.
    """
    effect = effect or experiment.sheet.equivalence
    if not effect:
        raise UserError(
            f"which difference in {experiment.sheet.metric.name} must be told? give --effect 0.003, "
            "or write equivalence: 0.003 in the sheet"
        )
    compared = [cell for cell in experiment.cells if cell.reference]
    if not compared:
        raise UserError(
            f"{experiment.name} has no arm to compare: design {experiment.sheet.design!r}; "
            "choose a design with arms"
        )
    spreads: Spreads = Assumed(spread) if spread else _known(experiment, store)
    present = len(dict.fromkeys(experiment.sheet.seeds))
    arms = []
    for cell in compared:
        family = family_of(tree_of(experiment.recipes[cell.name]))
        expected, source = spreads.of(cell.name, family)
        arms.append(
            ArmPlan(
                cell=cell.name,
                family=family,
                spread=expected,
                source=source,
                seeds=seeds_needed(effect, expected, len(compared), power),
                smallest=_finite(smallest_effect(expected, present, len(compared), power)),
            )
        )
    seeds = _most(arms)
    cost = _cost(experiment, store, seeds or MOST_SEEDS, jobs)
    return SeedPlan(
        experiment=experiment.name,
        metric=experiment.sheet.metric.name,
        effect=effect,
        power=power,
        noise=list(spreads.families.values()),
        arms=arms,
        present=present,
        seeds=seeds,
        runs=cost.runs,
        missing=cost.missing,
        hours=cost.device_seconds / 3600,
        rate=cost.rate,
        on_a_gpu=cost.on_a_gpu / 3600 if cost.on_a_gpu else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Spreads(Protocol):
    """What is known of the spreads of an experiment's arms, before they are trained."""

    @property
    def families(self) -> Mapping[str, FamilyNoise]: ...

    def of(self, cell: str, family: str) -> tuple[float, str]:
        """The spread to expect of an arm, and where that comes from."""


@dataclass(frozen=True)
class Assumed:
    """One spread for all arms, that a person gave."""

    spread: float
    families: Mapping[str, FamilyNoise] = field(default_factory=dict)

    def of(self, cell: str, family: str) -> tuple[float, str]:
        return self.spread, "as asked"


@dataclass(frozen=True)
class Known:
    """What the store has measured at the setting of an experiment."""

    experiment: str
    arms: list[ArmNoise]

    @cached_property
    def families(self) -> dict[str, FamilyNoise]:
        return by_family(self.arms)

    def of(self, cell: str, family: str) -> tuple[float, str]:
        """Of the arm itself where six seeds have measured it, else of its family, else of all arms.

        Three seeds know a spread to within a factor of three: the family's, pooled, is the better guess.
        """
        own = [
            arm for arm in self.arms if (arm.experiment, arm.cell) == (self.experiment, cell)
        ]
        if own and own[0].seeds >= OWN_FROM:
            return own[0].spread, f"itself, {own[0].seeds} seeds"
        if pooled := self.families.get(family):
            return pooled.spread, f"{family}, {pooled.arms} arms"
        noisiest = max(self.families.values(), key=_spread_of)
        return noisiest.spread, f"{noisiest.family}: no {family} arm is measured"


def _known(experiment: Experiment, store: Store) -> Known:
    metric = experiment.sheet.metric.name
    tree = tree_of(experiment.base)
    arms = measured(store, metric, setting_of(tree))
    if not arms:
        first = f"{command(experiment.name, sheet=experiment.origin, asked=experiment.asked)} --seeds 0-2"
        model, data = tree["model"], tree["data"]
        raise UserError(
            f"no noise is measured: {store.root} holds no arm with three finished seeds of {metric} at width "
            f"{model['width']}, {model['layers']} layers, {experiment.base.budget.tokens:,} tokens of {data['name']}; "
            f"run first: {first}; or say what to expect: --spread 0.002"
        )
    return Known(experiment.name, arms)


def _spread_of(noise: FamilyNoise) -> float:
    return noise.spread


def _most(arms: list[ArmPlan]) -> int | None:
    needed = [arm.seeds for arm in arms]
    if any(seeds is None or seeds > MOST_SEEDS for seeds in needed):
        return None
    return max(seeds for seeds in needed if seeds is not None)


def _cost(experiment: Experiment, store: Store, seeds: int, jobs: int | None) -> Forecast:
    """Of every cell on the seeds of the sheet and the next ones, up to so many."""
    named = list(dict.fromkeys(experiment.sheet.seeds))
    following = max(named, default=-1) + 1
    chosen = [*named, *range(following, following + seeds)][:seeds]
    return forecast(experiment, experiment.runs(chosen), store, jobs)
