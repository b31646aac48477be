"""What the contract tests share.  They are parametrized over the registry: a file with an intervention is enough to be tested."""

import functools
from typing import get_args

import pytest

from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.recipe.intervention import REGISTRY
from ablab.core.recipe.recipe import run_id


@pytest.fixture(scope="session")
def needs():
    return requirements


@pytest.fixture(scope="session")
def other_values():
    return values_besides


@pytest.fixture(scope="session")
def shows():
    """recipe -> its liveness trace, taken once."""
    from ablab.ablations.checks.liveness import trace

    seen = {}

    def of(recipe) -> str:
        name = run_id(recipe)
        if name not in seen:
            seen[name] = trace(recipe)
        return seen[name]

    return of


@functools.cache
def requirements(name: str) -> tuple[str, ...]:
    """Everything that an intervention builds on, transitively."""
    wanted = [name]
    for one in wanted:
        wanted += [need for need in REGISTRY[one].about.requires if need not in wanted]
    return tuple(wanted[1:])


def values_besides(hint, value, path: str) -> list:
    """Valid values of the hinted type other than `value`: words of a Literal, the other truth value, or numbers near and far."""
    number = value if isinstance(value, (int, float)) else 1
    pool = (
        *_words(hint),
        True,
        False,
        number * 2,
        number / 2,
        0.25,
        2,
        0.75,
        5,
        number + 1,
        3,
        1,
        0,
        60.0,
        f"{value}x",
        None,
    )
    found = []
    for candidate in pool:
        try:
            candidate = parse(hint, candidate, path)
        except UserError:
            continue
        if candidate != value and not any(
            candidate == one and type(candidate) is type(one) for one in found
        ):
            found.append(candidate)
    return found


def _words(hint) -> tuple:
    """The words of every Literal inside the hint."""
    return tuple(
        word
        for option in get_args(hint)
        for word in ((option,) if isinstance(option, str) else _words(option))
    )
