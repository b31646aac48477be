"""Designs that cross factors, so that interactions can be told: every combination, a fraction of them, or pairs.

A factor is an ingredient that is off (-1) or on (+1); the ingredients that are no factor are on in every cell.  A main
effect is half the difference between the means of the cells at +1 and at -1; the interaction of two factors that of
the product of their levels.  In a fraction, effects whose columns are equal up to their sign are *aliases*: the data
cannot tell which of them it is.  Resolution III: main effects may hide behind interactions of two factors; IV: those
interactions behind each other; V: neither.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from math import prod
from typing import Literal

from ablab.ablations.designs.cell import BASE, FULL, Cell, Layout
from ablab.ablations.designs.one_at_a_time import without
from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.intervention import Treatment
from ablab.core.store.planned import Factors, Levels

MOST_CELLS = 256  # each is planned, hashed and trained on every seed
MOST_FACTORS = 15  # of a fraction: its aliases are looked for among 2^factors effects
REST = "rest"  # no factor is on, but what is no factor is


@dataclass(frozen=True)
class Factorial:
    """Every combination of the factors, off and on: 2^k cells.  factors: all ingredients, unless some are named."""

    factors: list[str] = field(default_factory=list)

    def layout(self, treatment: Treatment) -> Layout:
        names = chosen_factors("factorial", self.factors, treatment)
        if 2 ** len(names) > MOST_CELLS:
            most = MOST_CELLS.bit_length() - 1
            raise UserError(
                f"design factorial of {len(names)} factors has {2 ** len(names):,} cells; name at most {most} in "
                "design.factorial.factors, or choose design: fractional"
            )
        rows = list(product((-1, 1), repeat=len(names)))
        cells, levels = _crossed(names, rows, treatment)
        return Layout(cells, factors_of(_off_on(names), levels))


@dataclass(frozen=True)
class Fractional:
    """The smallest regular fraction of the factorial with that resolution; its cell without factors is the reference.

    pydoe chooses the fraction; all signs are turned, so that the cell in which every factor is off is one of it:
    it can always be built.
    """

    resolution: Literal[3, 4, 5] = 5
    factors: list[str] = field(default_factory=list)

    def layout(self, treatment: Treatment) -> Layout:
        from pydoe import fracfact_by_res

        names = chosen_factors("fractional", self.factors, treatment)
        if len(names) > MOST_FACTORS:
            raise UserError(
                f"design fractional of {len(names)} factors is too large; "
                f"name at most {MOST_FACTORS} in design.fractional.factors"
            )
        fraction = fracfact_by_res(len(names), self.resolution)
        rows = [tuple(-int(sign) for sign in row) for row in fraction]
        if len(rows) > MOST_CELLS:
            raise UserError(
                f"design fractional of {len(names)} factors at resolution {self.resolution} has {len(rows):,} cells; "
                "lower design.fractional.resolution, or name fewer factors"
            )
        cells, levels = _crossed(names, sorted(rows), treatment)
        generators = _generators(names, levels)
        resolution = self.resolution if generators else None
        return Layout(cells, factors_of(_off_on(names), levels, generators, resolution))


@dataclass(frozen=True)
class Pairs:
    """full, full without each of the named ingredients, and full without each two of them: their interactions."""

    of: list[str]

    def layout(self, treatment: Treatment) -> Layout:
        names = chosen_factors("pairs", self.of, treatment, key="of")
        singles = {name: without(name, treatment) for name in names}
        cells = [Cell(FULL, dict(treatment)), *singles.values()]
        infeasible = {}
        for one, other in combinations(names, 2):
            both = f"- {one}, {other}"
            alone = singles[one].treatment.keys() & singles[other].treatment.keys()
            rest = {kept: dose for kept, dose in treatment.items() if kept in alone}
            same = [single.name for single in singles.values() if single.treatment == rest]
            if same:
                infeasible[both] = f"it is {same[0]}"
            else:
                cells.append(Cell(both, rest, FULL))
        levels = {cell.name: levels_of(cell, names) for cell in cells}
        return Layout(cells, factors_of(_off_on(names), levels), infeasible)


def chosen_factors(
    design: str, named: list[str], treatment: Treatment, key: str = "factors"
) -> list[str]:
    """The named factors, else all of the treatment.  Raises UserError: unknown, twice, or fewer than two."""
    for name in named:
        if name not in treatment:
            listed = ", ".join(treatment) or "none"
            raise UserError(
                f"design.{design}.{key} names {name!r}, which `with` does not list. {near(name, treatment)}"
                f"Listed: {listed}"
            )
        if named.count(name) > 1:
            raise UserError(f"design.{design}.{key} names {name!r} twice; keep one")
    names = named or list(treatment)
    if len(names) < 2:
        raise UserError(
            f"design {design} crosses two factors or more, not {len(names)}; "
            "list more interventions under `with`, or choose design: add_one"
        )
    return names


def _crossed(
    names: list[str], rows: Iterable[tuple[int, ...]], treatment: Treatment
) -> tuple[list[Cell], dict[str, Levels]]:
    """A cell for each row of levels, and the levels by cell; the cell without factors is the reference."""
    constant = [kept for kept in treatment if kept not in names]
    lowest = REST if constant else BASE
    cells = []
    levels: dict[str, Levels] = {}
    for row in rows:
        level = dict(zip(names, row, strict=True))
        on = [name for name in names if level[name] > 0]
        title = lowest
        if on:
            title = FULL if len(on) == len(names) else f"+ {', '.join(on)}"
        chosen = {kept: treatment[kept] for kept in treatment if kept in constant or kept in on}
        cells.append(Cell(title, chosen, lowest if on else None))
        levels[title] = level
    return cells, levels


def levels_of(cell: Cell, names: Iterable[str]) -> Levels:
    return {name: 1 if name in cell.treatment else -1 for name in names}


def factors_of(
    names: dict[str, list[str]],
    levels: Mapping[str, Levels],
    generators: Iterable[str] = (),
    resolution: int | None = None,
) -> Factors:
    """What these cells can tell of the factors, up to interactions of two.

    names: factor -> its two levels in words, that of -1 first.
    """
    known = aliases_of(names, levels)
    hidden = {effect for group in known for effect in group}
    pairs = [pair for pair in combinations(names, 2) if pair not in hidden]
    return Factors(
        names=dict(names),
        levels=dict(levels),
        interactions=[list(pair) for pair in _separable(names, pairs, levels)],
        aliases=[_equation(group, levels) for group in known],
        generators=list(generators),
        resolution=resolution,
    )


Effect = tuple[str, ...]  # the factors whose levels are multiplied; of none: the mean
MEAN: Effect = ()


def aliases_of(names: Iterable[str], levels: Mapping[str, Levels]) -> list[list[Effect]]:
    """Groups of the mean, main effects and interactions of two whose columns are equal up to their sign."""
    names = list(names)
    effects = [MEAN, *((name,) for name in names), *combinations(names, 2)]
    groups: dict[tuple[int, ...], list[Effect]] = {}
    for effect in effects:
        column = _column(effect, levels)
        unsigned = tuple(column[0] * level for level in column)
        groups.setdefault(unsigned, []).append(effect)
    return [group for group in groups.values() if len(group) > 1]


def _separable(
    names: Iterable[str], pairs: Iterable[Effect], levels: Mapping[str, Levels]
) -> list[Effect]:
    """The interactions that add to the rank of mean, factors and those before: where cells lack, not all of them do."""
    import numpy as np  # here alone: showing a plain design loads nothing heavy

    columns = [_column(effect, levels) for effect in (MEAN, *((name,) for name in names))]
    rank = np.linalg.matrix_rank(np.array(columns))
    kept = []
    for pair in pairs:
        with_it = [*columns, _column(pair, levels)]
        rank_with_it = np.linalg.matrix_rank(np.array(with_it))
        if rank_with_it > rank:
            columns, rank = with_it, rank_with_it
            kept.append(pair)
    return kept


def _column(effect: Effect, levels: Mapping[str, Levels]) -> tuple[int, ...]:
    """Its level in each cell."""
    return tuple(prod(level[name] for name in effect) for level in levels.values())


def _equation(effects: Iterable[Effect], levels: Mapping[str, Levels]) -> str:
    """gating = - muon x wsd = ..."""
    first, *others = effects
    column = _column(first, levels)
    told = [_product(first)]
    for other in others:
        sign = "" if _column(other, levels) == column else "- "
        told.append(sign + _product(other))
    return " = ".join(told)


def _product(effect: Effect) -> str:
    return " x ".join(effect) or "mean"


def _generators(names: list[str], levels: Mapping[str, Levels]) -> list[str]:
    """The factors that the first ones decide, each as their product; none of a whole factorial."""
    base = names[: len(levels).bit_length() - 1]
    sizes = range(2, len(base) + 1)
    products = [chosen for size in sizes for chosen in combinations(base, size)]
    made = []
    for name in names[len(base) :]:
        column = _column((name,), levels)
        opposite = tuple(-level for level in column)
        equal = [one for one in products if _column(one, levels) in (column, opposite)]
        made.append(_equation([(name,), equal[0]], levels))
    return made


def _off_on(names: Iterable[str]) -> dict[str, list[str]]:
    return {name: ["off", "on"] for name in names}
