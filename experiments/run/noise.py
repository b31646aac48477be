"""How noisy the runs of a store are, for each optimizer family: what a planner of seeds must know.

Noise depends on the setting (data, width, depth, tokens, metric), so only arms of the setting that is asked for count.
Each arm against its reference gives the sd over seeds of its differences, its spread; an A/A arm, whose seeds are its
own, gives the sd of its seeds, and sqrt(2) of that is a spread without pairing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ablab.analysis.effects import frame
from ablab.analysis.effects.aa import replicas
from ablab.analysis.effects.effect import Effect
from ablab.analysis.effects.effects import measure
from ablab.analysis.effects.power import spread_of
from ablab.core.errors import UserError
from ablab.core.language.written import Unreadable, read
from ablab.core.recipe.recipe import Recipe, plain
from ablab.core.store.planned import GridPlan
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store

FEWEST = 3  # seeds of an arm that counts
DIALS = (("data", "name"), ("model", "width"), ("model", "layers"), ("budget", "tokens"))
MATRICES = "hidden"  # the role whose chain names the family
DECAY = "decay"
NAMES = {"orthogonalize": "muon", "adam": "adamw"}

Setting = tuple[object, ...]


@dataclass(frozen=True)
class ArmNoise:
    """What one finished arm says.  Values in the metric's unit."""

    experiment: str
    cell: str
    family: str
    seeds: int
    sd: float  # of its final metric over seeds
    spread: float  # of its difference from the reference; of an A/A arm sd sqrt(2)
    correlation: float | None  # with its reference over shared seeds
    replica: bool  # an A/A arm


@dataclass(frozen=True)
class FamilyNoise:
    """The arms of one optimizer family, pooled by their degrees of freedom."""

    family: str
    arms: int
    seeds: int  # of all arms together
    sd: float
    spread: float
    quietest: float  # the smallest spread of an arm
    noisiest: float
    correlation: float | None  # mean over arms


def family_of(tree: dict) -> str:
    """Of a recipe as plain data: the first kind of the chain that moves the hidden matrices, or muon."""
    steps = [step["kind"] for step in tree["optim"]["chains"][MATRICES]["steps"]]
    named = [NAMES.get(kind, kind) for kind in steps if kind != DECAY]
    return "muon" if "muon" in named else (named or ["none"])[0]


def setting_of(tree: dict) -> Setting:
    return tuple(tree[holder][name] for holder, name in DIALS)


def tree_of(recipe: Recipe) -> dict:
    tree: dict = plain(recipe)
    return tree


def measured(store: Store, metric: str, setting: Setting) -> list[ArmNoise]:
    """Every finished arm of that setting in the store.  A plan or run that cannot be read is passed over."""
    found: list[ArmNoise] = []
    for name in store.experiments():
        try:
            plan = store.read_plan(name)
            if plan.metric == metric:
                found += _arms(store, plan, setting)
        except UserError:
            continue
    return _once(found)


def _arms(store: Store, plan: GridPlan, setting: Setting) -> Iterator[ArmNoise]:
    trees = {row.cell: row.run for row in plan.rows}
    runs = frame.load(store, plan.name)
    if runs.empty or not (runs.status == FINISHED).any():
        return
    apart = replicas(plan)
    for effect in measure(runs, plan.metric, plan.better):
        if effect.reference is None or effect.n < FEWEST or not effect.sd:
            continue
        tree = _recipe(store, trees[effect.cell])
        if not tree or setting_of(tree) != setting:
            continue
        spread = effect.spread if effect.cell not in apart else spread_of(effect.sd, 0.0)
        if spread:
            yield _noise(plan, effect, family_of(tree), spread, effect.cell in apart)


def _noise(
    plan: GridPlan, effect: Effect, family: str, spread: float, replica: bool
) -> ArmNoise:
    return ArmNoise(
        experiment=plan.name,
        cell=effect.cell,
        family=family,
        seeds=effect.n,
        sd=effect.sd or 0.0,
        spread=spread,
        correlation=None if replica else effect.correlation,
        replica=replica,
    )


def _recipe(store: Store, run: str) -> dict:
    """As its folder holds it; empty where that cannot be read, or is of another form."""
    try:
        tree = read(store.run(run).recipe_path.read_text("utf-8"))
        setting_of(tree), family_of(tree)
    except (OSError, Unreadable, UnicodeDecodeError, KeyError, TypeError):
        return {}
    return dict(tree)


def _once(arms: Iterable[ArmNoise]) -> list[ArmNoise]:
    """Two experiments may share an arm and its reference: the same numbers count once."""
    kept = {(arm.cell, arm.seeds, arm.sd, arm.spread): arm for arm in arms}
    return list(kept.values())


def by_family(arms: Iterable[ArmNoise]) -> dict[str, FamilyNoise]:
    """A/A arms count only where no other arm of their family does: they know nothing of pairing."""
    grouped: dict[str, list[ArmNoise]] = {}
    for arm in arms:
        grouped.setdefault(arm.family, []).append(arm)
    return {family: _pooled(family, of_it) for family, of_it in grouped.items()}


def _pooled(family: str, arms: list[ArmNoise]) -> FamilyNoise:
    paired = [arm for arm in arms if not arm.replica] or arms
    spreads = [arm.spread for arm in paired]
    correlations = [arm.correlation for arm in paired if arm.correlation is not None]
    return FamilyNoise(
        family=family,
        arms=len(arms),
        seeds=sum(arm.seeds for arm in arms),
        sd=_root_mean_square([arm.sd for arm in arms], [arm.seeds for arm in arms]),
        spread=_root_mean_square(spreads, [arm.seeds for arm in paired]),
        quietest=min(spreads),
        noisiest=max(spreads),
        correlation=float(np.mean(correlations)) if correlations else None,
    )


def _root_mean_square(values: list[float], seeds: list[int]) -> float:
    """Of standard deviations, weighted by their degrees of freedom."""
    degrees = np.array(seeds) - 1
    return float(np.sqrt(np.average(np.square(values), weights=degrees)))
