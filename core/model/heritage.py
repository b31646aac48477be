"""What one recipe can hand to another, settled before either is trained.  No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import params
from ablab.core.model.plan import plan_of
from ablab.core.parts.shape import Fixed
from ablab.core.parts.transforms import Transform
from ablab.core.recipe.recipe import ROLES, Chain, Data, Recipe, Role, run_id
from ablab.core.recipe.stage import Handover, Read

Wanted = Literal["optimizer", "steps", "average"]


@dataclass(frozen=True)
class Wish:
    """What a stage asks of its parent besides the weights."""

    takes: tuple[Wanted, ...] = ("optimizer", "steps")
    read: Read = "trained"


def following(parent: Recipe, child: Recipe, wish: Wish) -> Recipe:
    """The child, going on from the parent.  Raises UserError for what the parent cannot give."""
    _check_wish(parent, child, wish)
    _check_weights(parent, child)
    if "optimizer" in wish.takes:
        _check_chains(parent.optim.chains, child.optim.chains)
    counted = parent.before.steps + parent.steps
    averaged = parent.before.averaged + parent.steps
    handed = Handover(
        run=run_id(parent),
        read=wish.read,
        takes=tuple(branch for branch in wish.takes if branch != "steps"),
        steps=counted if "steps" in wish.takes else 0,
        averaged=averaged if "average" in wish.takes else 0,
        windows=_windows_read(parent, child) if _same(parent.data, child.data) else 0,
    )
    return replace(child, init=handed)


def beginning(source: Recipe, weights: str, recipe: Recipe) -> Recipe:
    """The recipe, beginning with weights of `source` that have this digest.  Raises UserError where they do not fit."""
    _check_weights(source, recipe, "among the weights of init")
    return replace(recipe, init=Handover(weights=weights))


def _windows_read(parent: Recipe, child: Recipe) -> int:
    """Windows of the child that hold as many tokens as were read before, rounded up."""
    read = parent.before.windows + parent.batches.windows_before(parent.steps)
    return math.ceil(read * parent.data.context / child.data.context)


def _same(ours: Data, theirs: Data) -> bool:
    """Whether they name the same tokens, however these are cut."""
    return _uncut(ours) == _uncut(theirs)


def _uncut(data: Data) -> Data:
    return replace(data, context=1, batch=1, shape=Fixed(), held_out=1)


def _check_wish(parent: Recipe, child: Recipe, wish: Wish) -> None:
    if "optimizer" in wish.takes and "steps" not in wish.takes:
        raise UserError(
            "takes: optimizer without steps would correct a full average as if it were new; "
            "take steps too"
        )
    if wish.read == "evaluated" and not parent.after_step:
        raise UserError(
            "read: evaluated asks for an average, and the stage before has none; "
            "give it ema, or read: trained"
        )
    if "average" not in wish.takes:
        return
    lacking = [part.kind for part in child.after_step if part not in parent.after_step]
    if lacking or not child.after_step:
        what = f"has no {lacking[0]} like this one's" if lacking else "and this one have none"
        raise UserError(
            f"takes: average, but the stage before {what}; use the same in both, or drop it"
        )


def _check_weights(
    parent: Recipe, child: Recipe, there_is: str = "in the stage before"
) -> None:
    there, here = _shapes(parent), _shapes(child)
    for name in dict.fromkeys([*here, *there]):
        ours, theirs = here.get(name), there.get(name)
        if ours != theirs:
            raise UserError(
                f"{name} is {_shown(ours)} here and {_shown(theirs)} {there_is}; "
                "keep the model: its sizes and parts are the same for both"
            )


def _shapes(recipe: Recipe) -> Mapping[str, tuple[int, ...]]:
    return {name: declared.shape for name, declared in params(plan_of(recipe))}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _check_chains(there: Mapping[Role, Chain], here: Mapping[Role, Chain]) -> None:
    for role in ROLES:
        ours, theirs = _with_state(here[role]), _with_state(there[role])
        if ours != theirs:
            raise UserError(
                f"optim.chains.{role} keeps state as {', '.join(ours) or 'nothing'} here and as "
                f"{', '.join(theirs) or 'nothing'} in the stage before; "
                "keep the optimizer, or write takes: []"
            )


def _with_state(chain: Chain) -> list[str]:
    """Kinds of the steps that keep some."""
    return [
        step.kind
        for step in chain.steps
        if getattr(type(step), "state", None) is not Transform.state
    ]
