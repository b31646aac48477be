"""A recipe made shorter, every ratio kept: tokens, and all that is counted in optimizer steps.

    budget.tokens <- s tokens;  warm-ups, horizons <- s steps, rounded, at least 1 where they were

Batch, context, shares of the run (cooldown, span of an average) and shares of a mix stay.  A number that is counted in
steps or tokens says so in its type: `Steps`, `SomeSteps`, `SomeTokens` of core/language/numbers.py.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any, get_args

from msgspec import Meta

from ablab.core.language.numbers import SCALES
from ablab.core.language.parse import fields_of, join
from ablab.core.recipe.recipe import Recipe, check


def scaled(recipe: Recipe, share: float) -> Recipe:
    """share: in (0, 1].  Raises UserError where nothing is left of it."""
    if share == 1:
        return recipe
    shorter: Recipe = _scaled(recipe, share)
    return check(shorter)


def inexact(recipe: Recipe, share: float) -> list[str]:
    """What cannot be kept exactly: `schedule.warmup_steps=2500 becomes 3, not 2.5`."""
    said = [
        f"{path}={value:,} becomes {_shorter(value, share):,}, not {value * share:,g}"
        for path, value in _counted(recipe, "")
        if value > 1 and abs(_shorter(value, share) - value * share) > 1e-9 * value
    ]
    steps = scaled(recipe, share).steps
    if abs(steps - recipe.steps * share) > 1e-9 * recipe.steps:
        said.append(f"{recipe.steps:,} steps become {steps:,}, not {recipe.steps * share:,g}")
    return said


def _shorter(value: int, share: float) -> int:
    return max(round(value * share), 1) if value else 0


def _scaled(value: Any, share: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(item, share) for item in value)
    if isinstance(value, dict):
        return {key: _scaled(item, share) for key, item in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for name, hint in fields_of(type(value)).items():
        old = getattr(value, name)
        new = _shorter(old, share) if _is_counted(hint, old) else _scaled(old, share)
        if new != old:
            changes[name] = new
    return replace(value, **changes) if changes else value


def _counted(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Path and value of everything that is counted in steps or tokens."""
    if isinstance(value, tuple):
        for item in value:
            yield from _counted(item, join(path, getattr(item, "kind", "")))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _counted(item, join(path, key))
    elif is_dataclass(value) and not isinstance(value, type):
        for name, hint in fields_of(type(value)).items():
            below = getattr(value, name)
            if _is_counted(hint, below):
                yield join(path, name), below
            else:
                yield from _counted(below, join(path, name))


def _is_counted(hint: Any, value: Any) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    options = [hint, *get_args(hint)]
    metas = [one for option in options for one in get_args(option) if isinstance(one, Meta)]
    metas += [one for one in options if isinstance(one, Meta)]
    return any(SCALES in (one.extra or {}) for one in metas)
