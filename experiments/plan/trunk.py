"""A trunk: a WSD run cut before its cooldown into pieces that longer runs, and other cooldowns, go on from.

    trunk: 2.0e+7     in a sheet: tokens of a piece

    of T steps, the cooldown takes the last L = decay_fraction T;  a piece has p steps
    n = floor((T - L) / p) pieces at the full rate, each from the one before;  then one run of the T - n p steps left

Nothing of a piece knows T or L.  So a raised budget, or another cooldown, shares every piece that it has in common, and
trains on from there; the bits are those of the run that was never cut.  Averages begin with the last run, whose steps
they count from the start of the whole.
"""

import math
from collections.abc import Collection
from dataclasses import replace

from ablab.ablations.interventions.wsd import WSD
from ablab.core.errors import UserError
from ablab.core.parts.schedule import Constant
from ablab.core.parts.shape import Fixed
from ablab.core.recipe.recipe import Budget, Recipe
from ablab.experiments.plan.link import Link


def cut(whole: Recipe, tokens: int) -> list[Link]:
    """tokens: of a piece.  A recipe whose schedule is not WSD stays whole, as it follows the length of its run.

    Raises UserError for one that follows it otherwise, before the cooldown.
    """
    schedule = whole.schedule
    if not isinstance(schedule, WSD):
        return [Link("", whole)]
    _check(whole)
    step = whole.tokens_per_step
    length = schedule.decay_fraction * whole.steps
    piece = tokens // step
    count = math.floor((whole.steps - length) / piece) if piece else 0
    risen = schedule.idle_steps + (schedule.warmup_steps or 0)
    if piece < max(risen, 1):
        raise UserError(
            f"trunk={tokens} is {piece} steps, and the warm-up takes {risen}; "
            f"use at least {max(risen, 1) * step} tokens a piece"
        )
    if not count:
        return [Link("", whole)]
    left = whole.steps - count * piece
    # Of the schedule, a piece holds nothing but the rise: shape and floor are the cooldown's.
    rising = WSD(0.0, warmup_steps=schedule.warmup_steps, idle_steps=schedule.idle_steps)
    level = Constant()
    bare = replace(whole, after_step=(), budget=Budget(piece * step))
    pieces = [
        Link(f"trunk {k + 1}", replace(bare, schedule=level if k else rising), repeats=k > 0)
        for k in range(count)
    ]
    falls = replace(schedule, decay_fraction=length / left, warmup_steps=0, idle_steps=0)
    last = replace(whole, schedule=falls, budget=Budget(left * step))
    return [*pieces, Link("cooldown", last, counts_averages=True)]


def check_some(sheet_trunk: int | None, base: Recipe, names: Collection[str]) -> None:
    """Raises UserError where no arm could be cut.  names: of the interventions."""
    if sheet_trunk is not None and "wsd" not in names and not isinstance(base.schedule, WSD):
        raise UserError(
            f"trunk needs the schedule wsd, not {base.schedule.kind}: "
            "another one follows the length of the run from its first step; add wsd, or drop trunk"
        )


def _check(whole: Recipe) -> None:
    if whole.data.shape != Fixed():
        raise UserError(
            f"trunk: data.shape={whole.data.shape.kind} follows the length of the run; drop one of the two"
        )
    for role, chain in whole.optim.chains.items():
        for part in chain.steps:
            if getattr(part, "schedule", "constant") == "linear":
                raise UserError(
                    f"trunk: {part.kind} of optim.chains.{role} falls over the whole run; "
                    "give it the schedule constant or lr, or drop trunk"
                )
