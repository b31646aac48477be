"""What a kernel may claim: everything between its two ends, or nothing.

A kernel is a rewrite of the frozen plan, before any module exists.  Its *region* is every field of a plan but those
that it names as outside, so fields and slots that it has never heard of are in it.  From the region it takes the stages
whose offers (core/language/offers.py) it computes; whatever is left makes it step aside: nothing is lost in silence.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from ablab.core.language.declare import Stage
from ablab.core.language.offers import Fixed, Offer

Offered = TypeVar("Offered", bound=Offer)


class StepsAside(Exception):
    """The kernel cannot compute what stands at its place; why, in a few words, for people."""


@dataclass(frozen=True)
class Claimed(Generic[Offered]):
    """A stage that a kernel computes: where the built module has it, and what it offers."""

    field: str
    name: str  # in the slot; "" where the field is the stage itself
    offer: Offered

    def of(self, module: Any) -> "Built[Offered]":
        """The stage in the module that was built from the plan."""
        place = getattr(module, self.field)
        return Built(self.offer, place[self.name] if self.name else place)


class Built(Generic[Offered]):
    """A claimed stage of a built model: in training it is not called, but its parameters, maps and tables are read."""

    def __init__(self, offer: Offered, stage: Any):
        self.offer = offer
        self.stage = stage

    def bound(self) -> dict[str, Any]:
        """Name -> parameter, map, table or number, as they are now: tables move with the model."""
        stage = self.stage
        return {**stage._parameters, **stage._modules, **stage._buffers, **stage.numbers}


class Region:
    """What stands between the ends of a kernel and is not yet claimed.

    left: field -> name -> stage, each slot in its order.
    """

    def __init__(self, plan: Any, outside: Collection[str]):
        inside = [field.name for field in fields(plan) if field.name not in outside]
        self.left = {name: _named(getattr(plan, name)) for name in inside}

    def take(self, field: str, offer: type[Offered]) -> Claimed[Offered] | None:
        """The first unclaimed stage of a field, if it offers that; from now on it is claimed."""
        stages = self.left.get(field, {})
        name = next(iter(stages), None)
        if name is None or not isinstance(found := _offered(stages[name]), offer):
            return None
        del stages[name]
        return Claimed(field, name, found)

    def take_all(self, field: str, offer: type[Offered]) -> list[Claimed[Offered]]:
        """Every unclaimed stage of a field up to the first that does not offer that."""
        taken = []
        while claimed := self.take(field, offer):
            taken.append(claimed)
        return taken

    def need(self, field: str, offer: type[Offered]) -> Claimed[Offered]:
        """The same where the kernel cannot do without it.  Raises StepsAside."""
        if claimed := self.take(field, offer):
            return claimed
        self.refuse(field)
        raise StepsAside(f"{field} is empty, and the kernel needs its {offer.__name__}")

    def close(self) -> None:
        """Raises StepsAside where a stage is left."""
        for field in self.left:
            self.refuse(field)

    def refuse(self, field: str) -> None:
        """Raises StepsAside where a stage of this field is left."""
        if stages := self.left.get(field):
            raise StepsAside(f"{_told(field, stages)}, which the kernel does not know")


def _offered(stage: Any) -> Offer | None:
    """None of what is no stage, and of one that has bound what its offer cannot say."""
    if not isinstance(stage, Stage) or (isinstance(stage.offer, Fixed) and stage.bound):
        return None
    return stage.offer


def _named(value: Any) -> dict[str, Any]:
    """A field as a slot: what stands there by name; nothing where it is empty."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple):
        return {str(place): one for place, one in enumerate(value)}
    return {} if value is None else {"": value}


def _told(field: str, stages: Mapping[str, Any]) -> str:
    """`on_qk holds mine`, or, where the field is the stage itself, `mix is windowed`."""
    names = [name for name in stages if name]
    if names:
        return f"{field} holds {', '.join(names)}"
    (value,) = stages.values()
    return f"{field} is {value.function.__name__ if isinstance(value, Stage) else value}"
