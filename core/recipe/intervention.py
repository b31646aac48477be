"""Interventions: named, pure edits of a recipe, with their controls written down.

    @register("cautious_wd", off="ordinary decoupled decay with the same rate", ...)
    class CautiousDecay(Decay):
        def apply(self, recipe): ...

A registered class is a frozen dataclass whose fields are its *dose*; it may also be the part that it puts into a slot.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ablab.core.errors import UserError, place_in, told
from ablab.core.language.parse import fields_of, near, parse, paths_of
from ablab.core.language.part import Cls, part, refuse_namesake
from ablab.core.recipe.edit import at
from ablab.core.recipe.recipe import Recipe, check
from ablab.core.recipe.slots import CHOICES, SLOTS


@dataclass(frozen=True)
class About:
    """What is said of an intervention besides its formula."""

    name: str
    off: str  # one sentence: what its control does instead
    source: str
    slots: tuple[str, ...]  # the recipe paths that it may change, and no others
    order: int  # interventions are applied by (order, name), so that the order in a file cannot matter
    neutral_at_init: bool  # True: the same logits at step 0, bit for bit
    requires: tuple[str, ...]
    excludes: tuple[str, ...]
    crosses_late: bool  # True: its loss curve crosses the control's late, so it must never be pruned early
    acts_late: bool  # True: a few steps on random tokens may not show it, so it is never called inert for these
    summary: str  # first line of the docstring


class Intervention(Protocol):
    about: About
    kind: str

    def apply(self, recipe: Recipe) -> Recipe: ...


REGISTRY: dict[str, type[Intervention]] = {}


def register(
    name: str,
    *,
    off: str,
    source: str,
    slots: tuple[str, ...],
    order: int = 50,
    neutral_at_init: bool = False,
    requires: tuple[str, ...] = (),
    excludes: tuple[str, ...] = (),
    crosses_late: bool = False,
    acts_late: bool = False,
) -> Callable[[Cls], Cls]:
    """Make a class an intervention: a part of that kind, whose fields are its dose, with what is said of it.

    Raises UserError for a name that is taken and for a slot that no recipe has.
    """
    for path in slots:
        _refuse_unknown_slot(name, path)

    def decorate(cls: Cls) -> Cls:
        refuse_namesake("interventions", name, REGISTRY.get(name), cls)
        # read before a dataclass writes a docstring of its own
        said = (cls.__doc__ or "no description").strip()
        made: Any = part(name)(cls)
        made.about = About(
            name=name,
            off=off,
            source=source,
            slots=slots,
            order=order,
            neutral_at_init=neutral_at_init,
            requires=requires,
            excludes=excludes,
            crosses_late=crosses_late,
            acts_late=acts_late,
            summary=said.splitlines()[0],
        )
        REGISTRY[name] = made
        return made

    return decorate


def _refuse_unknown_slot(name: str, path: str) -> None:
    """A slot, a holder of slots such as optim.chains.hidden, or a setting such as optim.clip may be claimed."""
    settings = set(paths_of(Recipe))
    if path not in settings and not any(slot.covers(path) for slot in SLOTS):
        known = [*settings, *(slot.path for slot in SLOTS)]
        raise UserError(
            f"intervention {name!r} claims {path!r}, which no recipe has. {near(path, known)}"
            f"Slots: {', '.join(slot.path for slot in SLOTS)}"
        )


Treatment = Mapping[str, Intervention]  # name -> dose; the empty treatment is the base recipe


def treatment_of(
    listed: Iterable[str | Mapping[str, Any]], path: str = "with"
) -> dict[str, Intervention]:
    """Read `[qk_norm, {gating: {per: head}}]`.  Raises UserError for an unknown name, dose key or dose."""
    treatment: dict[str, Intervention] = {}
    for item in listed:
        name, dose = name_and_dose(item, path)
        if name in treatment:
            raise UserError(f"{path} names {name!r} twice; keep one")
        treatment[name] = parse(REGISTRY[name], dose or {}, f"{path}.{name}")
    return treatment


def name_and_dose(item: str | Mapping[str, Any], path: str) -> tuple[str, Any]:
    """Of one item of `with`.  Raises UserError for an unknown name."""
    name: Any = item
    dose = None
    if isinstance(item, Mapping):
        if len(item) != 1:
            raise UserError(
                f"{path} lists {dict(item)!r}; an item is one intervention, "
                "as qk_norm or {gating: {per: head}}"
            )
        name, dose = next(iter(item.items()))
    if not isinstance(name, str) or name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise UserError(
            f"unknown intervention {name!r}. {near(name, REGISTRY)}Registered: {known}; "
            "one of your own needs --plugins FOLDER"
        )
    return name, dose


def ordered(treatment: Treatment) -> list[Intervention]:
    return sorted(treatment.values(), key=lambda one: (one.about.order, one.about.name))


def resolve(base: Recipe, treatment: Treatment) -> Recipe:
    """Apply a set of interventions to a recipe.  Raises UserError on a missing requirement, an exclusion or a clash."""
    recipe = base
    chosen_by: dict[str, str] = {}
    for one in ordered(treatment):
        _refuse_company(one.about, treatment)
        new = _applied(one, recipe)
        for slot in CHOICES:
            found, chosen = at(recipe, slot), at(new, slot)
            if chosen == found:
                continue
            if not _holds(chosen, found):
                _refuse_clash(slot, chosen_by.get(slot), one.about)
            chosen_by[slot] = one.about.name
        recipe = new
    return check(recipe)


def _holds(chosen: Any, found: Any) -> bool:
    """Whether a choice has the one that it found as one of its fields: then both are in force, as mup and its base."""
    return any(getattr(chosen, name) == found for name in fields_of(type(chosen)))


def _applied(one: Intervention, recipe: Recipe) -> Recipe:
    """Raises UserError where the intervention's own code breaks."""
    try:
        return one.apply(recipe)
    except UserError:
        raise
    except (Exception, SystemExit) as flaw:
        file = getattr(sys.modules.get(type(one).__module__), "__file__", "")
        place = place_in(flaw, {file}) or file
        raise UserError(
            f"{one.about.name} cannot be applied, at {place}: {told(flaw)}"
        ) from flaw


def _refuse_company(about: About, treatment: Treatment) -> None:
    if missing := [name for name in about.requires if name not in treatment]:
        raise UserError(
            f"{about.name} builds on {missing[0]}; "
            f"add {missing[0]} to the same cell, or drop {about.name}"
        )
    if barred := [name for name in about.excludes if name in treatment]:
        raise UserError(
            f"{about.name} and {barred[0]} exclude each other; list them in separate cells"
        )


def _refuse_clash(slot: str, other: str | None, about: About) -> None:
    """A choice may be chosen again by one that builds on who chose it first, or that holds it (`_holds`)."""
    if other and other not in about.requires:
        raise UserError(
            f"{other} and {about.name} both choose {slot}; "
            "drop one, or list them in separate cells"
        )


def dependents(name: str, treatment: Treatment) -> list[str]:
    """Everything in the treatment that cannot stand without `name`, itself first."""
    gone = [name]
    for one in gone:
        needing = [other for other in treatment if one in treatment[other].about.requires]
        gone += [other for other in needing if other not in gone]
    return gone
