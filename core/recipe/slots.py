"""The slots of a recipe, one row each.  Whatever knows of slots reads this table:

    the checks of a recipe (recipe.py), clashes between interventions and the paths that they may claim
    (intervention.py), the stages of a plan (core/model/plan.py).

A slot is a field of the recipe and a row here; the place where its stages run is a line of core/model/transformer.py.
An empty slot is in no identity (recipe.py); a choice that came after the first runs is declared `silent` there.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from inspect import Parameter, signature
from itertools import chain
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.declare import Stage, Where
from ablab.core.language.part import Asked, Part
from ablab.core.recipe.asks import (
    Advances,
    Builds,
    MayBuild,
    Moves,
    Multiplies,
    Parametrizes,
    ScalesGradients,
    Schedules,
    ShapesBatches,
)


@dataclass(frozen=True)
class Slot:
    """A place for parts.

    path: dotted, from the recipe; `*` stands for each key of a mapping.
    asks: the Protocol that a part must satisfy.
    many: ordered parts, any number; else exactly one, and two interventions that choose it clash.
    signature: of the stage's function, or of the method asked where there is no stage.
    keeps_state: its parts keep tensors by their kind, so that no kind may stand there twice.
    """

    path: str
    asks: Any
    many: bool
    signature: str
    keeps_state: bool = False

    @cached_property
    def inputs(self) -> tuple[str, ...] | None:
        """The positional inputs of the stage's function, by name; None where parts build no stage."""
        if self.asks not in (Builds, MayBuild):
            return None
        given, _, _ = self.signature.partition(" -> ")
        without_shapes = re.sub(r"\[.*?\]", "", given)
        return tuple(word.split()[0] for word in without_shapes.split(","))

    def covers(self, path: str) -> bool:
        """Whether `path` is the slot, or holds it."""
        own = self.path.split(".")
        other = path.split(".")
        pairs = zip(own, other, strict=False)
        return len(other) <= len(own) and all(mine in (key, "*") for mine, key in pairs)

    def refusal(self, path: str, part: Asked) -> str:
        """Why the part cannot stand there, or ''."""
        if not (lacking := _lacking(type(part), self.asks)):
            return ""
        known: dict[str, Any] = Part.known
        fit = sorted(kind for kind, one in known.items() if not _lacking(one, self.asks))
        return (
            f"{path} cannot hold {part.kind!r}, which has no {lacking}(); "
            f"parts that have one: {', '.join(fit)}"
        )

    def stage(self, part: Any, where: Where) -> Stage | None:
        """What the part builds there.  Raises UserError for a stage that is made for another slot."""
        if said := self.refusal(self.path, part):
            raise UserError(said)
        stage: Stage | None = part.build(where)
        given = self.inputs or ()
        if stage is not None and not _fits(taken := _positional(stage), len(given)):
            names = ", ".join(one.name for one in taken) or "nothing"
            raise UserError(
                f"{self.path} cannot hold {part.kind!r}: its stage takes {names}, "
                f"and the slot gives {', '.join(given)}; choose a part that is made for this slot"
            )
        return stage


MANY = True
ONE = False

SLOTS = (
    Slot("model.on_embedding", MayBuild, MANY, "x [B,T,W], tokens [B,T], carry -> x, carry"),
    Slot("model.on_block", MayBuild, MANY, "x [B,T,W], carry -> x, carry"),
    Slot("model.block", Builds, ONE, "x [B,T,W], carry, attention, ffn -> x, carry"),
    Slot("model.on_norm", MayBuild, MANY, "x [B,T,W] -> x"),
    Slot("model.attention.on_qk", MayBuild, MANY, "q [B,T,H,D], k [B,T,KV,D] -> q, k"),
    Slot("model.attention.position", Builds, ONE, "q [B,T,H,D], k [B,T,KV,D], start -> q, k"),
    Slot("model.attention.on_values", MayBuild, MANY, "v [B,T,KV,D], carry -> v, carry"),
    Slot(
        "model.attention.mix",
        Builds,
        ONE,
        "q [B,H,T,D], k [B,KV,S,D], v [B,KV,S,D], carry, start -> y [B,H,T,D]",
    ),
    Slot("model.attention.on_heads", MayBuild, MANY, "y [B,T,H,D], x [B,T,W] -> y"),
    Slot("model.ffn", Builds, ONE, "x [B,T,W] -> x"),
    Slot("model.on_features", MayBuild, MANY, "x [B,T,W], carry -> x"),
    Slot("model.on_logits", MayBuild, MANY, "logits [B,T,V] -> logits"),
    Slot("model.products", Multiplies, MANY, "path, linear -> product of (x, weight), or None"),
    Slot(
        "objective",
        MayBuild,
        MANY,
        "features [B,T,W], logits [B,T,V], targets [B,T], read -> nats, their sum",
    ),
    Slot("parametrization", Parametrizes, ONE, "name, param, model, rule -> scales"),
    Slot(
        "optim.on_gradient",
        ScalesGradients,
        MANY,
        "norm, state, now -> factor on every gradient, state",
        keeps_state=True,
    ),
    Slot(
        "optim.chains.*.steps",
        Moves,
        MANY,
        "update [N,*shape], weight [N,*shape], state, bank, now -> update, state",
        keeps_state=True,
    ),
    Slot(
        "data.shape",
        ShapesBatches,
        ONE,
        "batch, context -> phases: until a share of the budget, rows, context",
    ),
    Slot("schedule", Schedules, ONE, "t, steps -> factor on the learning rate"),
    Slot("after_step", Advances, MANY, "state, weights, t, steps", keeps_state=True),
)
CHOICES = tuple(slot.path for slot in SLOTS if not slot.many)


def slot_at(path: str) -> Slot:
    return next(slot for slot in SLOTS if slot.path == path)


def held(recipe: Any) -> Iterator[tuple[Slot, str, tuple[Any, ...]]]:
    """Each slot of a recipe: its row, its path with the key in the place of a `*`, and the parts in it."""
    for slot in SLOTS:
        for path, value in _found(recipe, slot.path):
            yield slot, path, value if slot.many else (value,)


def _found(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What stands at a slot's path below `tree`, once for each key that a `*` may be."""
    key, _, below = path.partition(".")
    items = tree if key == "*" else {key: getattr(tree, key)}
    for name, item in items.items():
        if not below:
            yield name, item
            continue
        for inner, value in _found(item, below):
            yield f"{name}.{inner}", value


# Remembered for each class: a grid of 10,000 cells asks the same of the same few.
@cache
def _lacking(cls: type, asks: type) -> str:
    """The first member of the Protocol that a class of parts has not; '' where it has all."""
    members = chain.from_iterable(vars(one) for one in asks.__mro__)
    asked = [name for name in members if not name.startswith("_")]
    return next((name for name in asked if not hasattr(cls, name)), "")


def _positional(stage: Stage) -> list[Parameter]:
    """What the function is called with besides the bound values."""
    return [one for one in _not_by_name(stage.function) if one.name not in stage.bound]


@lru_cache
def _not_by_name(function: Callable[..., Any]) -> list[Parameter]:
    by_name = (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD)
    parameters = signature(function).parameters.values()
    return [one for one in parameters if one.kind not in by_name]


def _fits(taken: list[Parameter], given: int) -> bool:
    """Whether a function may be called with `given` positional inputs."""
    single = [one for one in taken if one.kind is not Parameter.VAR_POSITIONAL]
    needed = [one for one in single if one.default is Parameter.empty]
    takes_any_number = len(single) < len(taken)
    return len(needed) <= given and (takes_any_number or given <= len(single))
