"""Parts: the small frozen values that sit in a recipe's slots, each known by its kind.

A part is plain data (numbers, words, other parts) plus pure methods.  It never imports torch at
the top of its file, so that recipes can be read, edited, hashed and listed without it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform

from ablab.core.errors import UserError

Cls = TypeVar("Cls", bound=type)


@dataclass_transform(frozen_default=True)
class Part:
    """Base of everything that a slot can hold."""

    kind: str
    known: ClassVar[dict[str, type["Part"]]] = {}
    # kind -> digest of the user's own file that defines it
    foreign: ClassVar[dict[str, str]] = {}


class Asked(Protocol):
    """What a slot asks of every part.  The Protocol of a slot adds its method (core/recipe/asks.py)."""

    @property
    def kind(self) -> str: ...

    def __hash__(self) -> int: ...


SILENT = "silent"  # of the metadata of a field


def silent(value: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """A field that identities do not see while it is at its default: one that came after runs that it must not rename.

    bias: bool = silent(False).  Such a default is never edited; what `factory` makes is a part without doses.
    """
    return dataclasses.field(default=value, default_factory=factory, metadata={SILENT: True})


def part(kind: str) -> Callable[[Cls], Cls]:
    """Make a class a frozen dataclass with a `kind` that recipes refer to."""

    def decorate(cls: Cls) -> Cls:
        refuse_namesake("parts", kind, Part.known.get(kind), cls)
        made: Any = cls
        made.__annotations__ = {"kind": str, **made.__dict__.get("__annotations__", {})}
        # a factory, so that instances hold it
        made.kind = dataclasses.field(default_factory=lambda: kind, init=False)
        made = dataclasses.dataclass(frozen=True)(made)
        made.kind = kind
        if issubclass(made, Part):
            Part.known[kind] = made
        return made

    return decorate


def refuse_namesake(nouns: str, name: str, taken: Any, cls: Any) -> None:
    """Raises UserError where `taken`, another class, has the name; the same file imported again is the same class."""
    if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"two {nouns} are called {name!r}: {taken.__module__} and {cls.__module__}; rename one"
        )
