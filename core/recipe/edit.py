"""Pure edits of a frozen tree at a dotted path, and what differs between two trees."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from itertools import chain
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, join, near
from ablab.core.language.part import Part

Change = Callable[[Any], Any]


def edit(tree: Any, path: str, change: Change) -> Any:
    """A copy of `tree` whose value at `path` is `change(old)`.  Raises UserError for an unknown path."""
    return _edit(tree, path.split("."), change, "")


def _edit(tree: Any, keys: list[str], change: Change, seen: str) -> Any:
    if not keys:
        return change(tree)
    key, below = keys[0], keys[1:]
    known = children(tree)
    if key not in known:
        asked = join(seen, ".".join(keys))
        there = ", ".join(known) or "nothing"
        raise UserError(f"unknown path {asked!r}. {near(key, known)}Known here: {there}")
    new = _edit(known[key], below, change, join(seen, key))
    if isinstance(tree, Mapping):
        return {**tree, key: new}
    if isinstance(tree, tuple):
        return tuple(new if part is known[key] else part for part in tree)
    return replace(tree, **{key: new})


def children(tree: Any) -> dict[str, Any]:
    """What a path may name below `tree`: fields, keys, or the kinds of the parts in a slot."""
    if isinstance(tree, Mapping):
        return dict(tree)
    if isinstance(tree, tuple):
        # backwards: of two parts of a kind, the first is meant
        return {part.kind: part for part in reversed(tree) if isinstance(part, Part)}
    if is_dataclass(tree):
        return {name: getattr(tree, name) for name in fields_of(type(tree))}
    return {}


def at(tree: Any, path: str) -> Any:
    """The value at a dotted path that exists."""
    for key in path.split("."):
        by_key = isinstance(tree, Mapping | tuple)
        tree = children(tree)[key] if by_key else getattr(tree, key)
    return tree


def put(value: Any) -> Change:
    """Choose `value`, whatever stood there."""
    return lambda old: value


def append(*parts: Part) -> Change:
    return lambda old: (*old, *parts)


def swap(target: type[Part], *parts: Part) -> Change:
    """Put `parts` in the place of each part of class `target`.  A slot without one is an error."""
    return _at(target, lambda old: parts)


def after(target: type[Part], *parts: Part) -> Change:
    """Insert `parts` behind each part of class `target`.  A slot without one is an error."""
    return _at(target, lambda old: (old, *parts))


def _at(target: type[Part], become: Callable[[Part], tuple[Part, ...]]) -> Change:
    def change(old: tuple[Part, ...]) -> tuple[Part, ...]:
        if not any(isinstance(part, target) for part in old):
            kinds = ", ".join(part.kind for part in old)
            raise UserError(f"no {target.kind!r} in [{kinds}] to build on")
        parts = [become(part) if isinstance(part, target) else (part,) for part in old]
        return tuple(chain.from_iterable(parts))

    return change


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> plain leaf, over the dicts and lists that `recipe.plain` gives.

    The parts of a slot go by their kinds, as in overrides; an empty slot is a leaf, [].
    """
    if isinstance(tree, (list, tuple)):
        tree = {_name_of(item, i): item for i, item in enumerate(tree)} or []
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, join(path, key))
    return found


def _name_of(item: Any, place: int) -> Any:
    return item["kind"] if isinstance(item, Mapping) else place


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) for every leaf that differs; None where a side has no such leaf, or an empty slot."""
    before, behind = _filled_leaves(old), _filled_leaves(new)
    paths = dict.fromkeys([*before, *behind])
    pairs = {path: (before.get(path), behind.get(path)) for path in paths}
    return {path: (one, other) for path, (one, other) in pairs.items() if one != other}


def _filled_leaves(tree: Any) -> dict[str, Any]:
    return {path: value for path, value in leaves(tree).items() if value != []}
