"""Several doses of one idea, as a sheet writes them under `with`.

    {z_loss: {weight: [1.0e-5, 1.0e-4]}}                  a list where a dose expects one value: an arm each
    {z_loss: [{weight: 1.0e-5}, {weight: 1.0e-4}]}        the same; several lists are crossed
    {z_loss: {mild: {weight: 1.0e-5}, usual: {}}}         doses with names

A design makes arms of them, called by what tells the doses apart: `z_loss weight=1e-05`, `z_loss mild`.  A cell holds
one dose of an idea.  A field that is a list by its type keeps meaning a list.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, near, parse
from ablab.core.language.written import typed
from ablab.core.recipe.intervention import REGISTRY, Intervention, name_and_dose
from ablab.core.recipe.load import assign

MOST_DOSES = 64  # of one idea: each is an arm
NAME = re.compile(r"[A-Za-z0-9_.+-]{1,40}")


@dataclass(frozen=True)
class Doses:
    """The doses of one intervention, in the order of the file.

    names: one each, where the sheet gives some; () where a dose is called by what tells it from the others.
    """

    intervention: str
    doses: tuple[Intervention, ...]
    names: tuple[str, ...] = ()

    @property
    def first(self) -> Intervention:
        """The one that stands where a single dose is wanted: in `full`, and below what builds on it."""
        return self.doses[0]

    @property
    def labelled(self) -> dict[str, Intervention]:
        """What an arm is called after -> the dose; of a single dose, the intervention."""
        if len(self.doses) == 1:
            return {self.intervention: self.first}
        words = self.names or [self._apart(dose) for dose in self.doses]
        labels = [f"{self.intervention} {word}" for word in words]
        return dict(zip(labels, self.doses, strict=True))

    def _apart(self, dose: Intervention) -> str:
        """weight=1e-05, start=2: the fields in which the doses differ."""
        told = []
        for field in fields_of(type(dose)):
            value = getattr(dose, field)
            if any(getattr(other, field) != value for other in self.doses):
                told.append(f"{field}={as_typed(value)}")
        return ", ".join(told)

    def with_field(self, field: str, value: Any) -> "Doses":
        """Every dose with that value, or with each of a list of them; doses that become one are one.

        Raises UserError for an unknown field or a wrong value.
        """
        kind = type(self.first)
        values = value if _is_list_of_doses(kind, field, value) else [value]
        where = f"with.{self.intervention}.{field}"
        if not values:
            raise UserError(f"{where}=[] names no dose; list one or more")
        made = [assign(dose, field, one) for one in values for dose in self.doses]
        distinct = tuple(dose for place, dose in enumerate(made) if dose not in made[:place])
        keeps_names = len(values) == 1 and len(distinct) == len(made)
        return Doses(self.intervention, distinct, self.names if keeps_names else ())


Menu = Mapping[str, Doses]  # intervention -> its doses


def menu_of(listed: Iterable[str | Mapping[str, Any]], path: str = "with") -> dict[str, Doses]:
    """Read `[qk_norm, {z_loss: {weight: [1.0e-5, 1.0e-4]}}]`.

    Raises UserError for an unknown name, dose key or dose, and for a dose that stands there twice.
    """
    menu: dict[str, Doses] = {}
    for item in listed:
        name, dose = name_and_dose(item, path)
        if name in menu:
            raise UserError(
                f"{path} names {name!r} twice; keep one, or write its doses as a list: "
                f"{{{name}: [{{...}}, {{...}}]}}"
            )
        menu[name] = doses_of(name, dose, f"{path}.{name}")
    return menu


def doses_of(name: str, written: Any, path: str) -> Doses:
    """Of one item.  Raises UserError."""
    kind = REGISTRY[name]
    names: tuple[str, ...] = ()
    if isinstance(written, list):
        parts = [one for dose in written for one in _crossed(kind, dose or {}, path)]
    elif _has_names(kind, written):
        names = tuple(written)
        parts = [dose or {} for dose in written.values()]
    else:
        parts = _crossed(kind, written or {}, path)
    if not 1 <= len(parts) <= MOST_DOSES:
        raise UserError(
            f"{path} names {len(parts)} doses; list at least one, and at most {MOST_DOSES}"
        )
    for word in names:
        if not isinstance(word, str) or not NAME.fullmatch(word):
            raise UserError(
                f"{path}: {word!r:.60} cannot name a dose; use letters, digits and _.+-"
            )
    where = [f"{path}.{word}" for word in names] or [path] * len(parts)
    doses = tuple(parse(kind, part, place) for part, place in zip(parts, where, strict=True))
    _refuse_twins(doses, names, path)
    return Doses(name, doses, names)


def _has_names(kind: type, written: Any) -> bool:
    """Whether its keys are names of doses: none is a field, and below each stands a dose."""
    if (
        not isinstance(written, Mapping)
        or not written
        or written.keys() & fields_of(kind).keys()
    ):
        return False
    return all(isinstance(dose, Mapping) for dose in written.values())


def _crossed(kind: type, written: Any, path: str) -> list[Any]:
    """One dose for each combination of what its lists hold."""
    if not isinstance(written, Mapping):
        return [written]
    varied = {
        field: value
        for field, value in written.items()
        if _is_list_of_doses(kind, field, value)
    }
    for field, values in varied.items():
        if not values:
            raise UserError(f"{path}.{field}=[] names no dose; list one or more")
    return [
        {**written, **dict(zip(varied, chosen, strict=True))}
        for chosen in product(*varied.values())
    ]


def _is_list_of_doses(kind: type, field: str, value: Any) -> bool:
    known = fields_of(kind)
    return isinstance(value, list) and field in known and not _takes_a_list(known[field])


def _takes_a_list(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return _takes_a_list(get_args(hint)[0])
    if origin in (Union, UnionType):
        return any(_takes_a_list(option) for option in get_args(hint))
    return hint is Any or (origin or hint) in (list, tuple, set, frozenset)


def _refuse_twins(doses: tuple[Intervention, ...], names: tuple[str, ...], path: str) -> None:
    for place, dose in enumerate(doses):
        if dose in doses[:place]:
            same = doses.index(dose)
            told = (
                f"{names[same]} and {names[place]}" if names else f"{same + 1} and {place + 1}"
            )
            raise UserError(f"{path}: the doses {told} are the same; keep one of them")


def as_typed(value: Any) -> str:
    """20000.0 as 20000, None as null: one value has one spelling, and it can be typed again."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return typed(value)


def firsts(menu: Menu) -> dict[str, Intervention]:
    """The treatment that has the first dose of each."""
    return {name: doses.first for name, doses in menu.items()}


def several(menu: Menu) -> dict[str, Doses]:
    """Those of which there is more than one dose."""
    return {name: doses for name, doses in menu.items() if len(doses.doses) > 1}


def with_edits(menu: Menu, edits: Mapping[str, Any]) -> dict[str, Doses]:
    """edits: with.NAME.DOSE -> value.  Raises UserError for one that no intervention has."""
    changed = dict(menu)
    for name, field, value in edits_of(menu, edits):
        changed[name] = changed[name].with_field(field, value)
    return changed


def edits_of(names: Iterable[str], edits: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """with.NAME.DOSE -> value as (NAME, DOSE, value).  Raises UserError for a NAME that is not among `names`."""
    known = {name: f"with.{name}.<dose>" for name in names}
    for path, value in edits.items():
        _, name, *field = path.split(".")
        if name not in known or len(field) != 1:
            raise UserError(
                f"unknown path {path!r}. {near(path, known.values())}"
                f"This experiment has: {', '.join(known.values())}"
            )
        yield name, field[0], value
