"""Parts: the small frozen values that sit in a recipe's slots, each known by its kind.

A part is plain data (numbers, words, other parts) plus pure methods.  It never imports torch at
the top of its file, so that recipes can be read, edited, hashed and listed without it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from ablab.core.errors import UserError

Cls = TypeVar("Cls", bound=type)


class Part:
    """Base of everything that a slot can hold."""

    kind: str
    known: ClassVar[dict[str, type["Part"]]] = {}
    foreign: ClassVar[
        dict[str, str]
    ] = {}  # kind -> digest of the user's own file that defines it


@dataclass_transform(frozen_default=True)
def part(kind: str):
    """Make a class a frozen dataclass with a `kind` that recipes refer to."""

    def decorate(cls: Cls) -> Cls:
        if (taken := Part.known.get(kind)) and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise UserError(
                f"two parts are called {kind!r}: {taken.__module__} and {cls.__module__}; rename one"
            )
        cls.__annotations__ = {"kind": str, **cls.__dict__.get("__annotations__", {})}
        cls.kind = dataclasses.field(
            default_factory=lambda: kind, init=False
        )  # a factory, so that instances hold it
        cls = dataclasses.dataclass(frozen=True)(cls)
        cls.kind = kind
        if issubclass(cls, Part):
            Part.known[kind] = cls
        return cls

    return decorate


def near(word: str, known) -> str:
    """`Did you mean ...? ` or nothing."""
    word, names = str(word), [str(name) for name in known]
    close = [
        name for name in names if len(word) > 2 and name.startswith(f"{word} ")
    ] or get_close_matches(word, names, n=1, cutoff=0.55)
    return f"Did you mean {close[0]!r}? " if close else ""


def fields_of(cls: type) -> dict[str, Any]:
    """Name -> type of the fields that a user may set."""
    hints = _hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


_hint_cache: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _hint_cache:
        _hint_cache[cls] = get_type_hints(cls, include_extras=True)
    return _hint_cache[cls]


def parse(hint: Any, plain: Any, path: str) -> Any:
    """Turn plain data (from YAML, JSON or an override) into the typed value; strict, and says where.

    Raises UserError: unknown key (with the near miss), missing key, wrong type, value out of range.
    """
    if (
        isinstance(hint, type)
        and issubclass(hint, Part)
        and "kind" not in hint.__dict__.get("__dataclass_fields__", {})
    ):
        return _parse_part(plain, path)
    if dataclasses.is_dataclass(hint):
        return plain if isinstance(plain, hint) else _parse_dataclass(hint, plain, path)
    if get_origin(hint) in (Union, UnionType) and any(
        _holds_parts(option) for option in get_args(hint)
    ):
        return (
            None
            if plain is None
            else parse(next(o for o in get_args(hint) if o is not type(None)), plain, path)
        )
    if get_origin(hint) is tuple and _holds_parts(get_args(hint)[0]):
        if not isinstance(plain, (list, tuple)):
            raise UserError(f"{path} must be a list, not {plain!r}")
        return tuple(
            parse(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(plain)
        )
    if get_origin(hint) is dict and _holds_parts(get_args(hint)[1]):
        return {
            key: parse(get_args(hint)[1], item, f"{path}.{key}")
            for key, item in _mapping(plain, path).items()
        }
    return _parse_leaf(hint, plain, path)


def _holds_parts(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Part))


def _mapping(plain: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(plain, Mapping):
        raise UserError(f"{path} must be a mapping of names to values, not {plain!r}")
    return plain


def _parse_part(plain: Any, path: str) -> Part:
    if isinstance(plain, Part):
        return plain
    if isinstance(plain, str):
        plain = {"kind": plain}
    kind = _mapping(plain, path).get("kind")
    if kind not in Part.known:
        said = f"unknown kind {kind!r}. {near(kind, Part.known)}" if kind else "no kind given. "
        raise UserError(f"{path}: {said}Registered: {', '.join(sorted(Part.known))}")
    return _parse_dataclass(
        Part.known[kind], {k: v for k, v in plain.items() if k != "kind"}, path
    )


def _parse_dataclass(cls: type, plain: Any, path: str) -> Any:
    types, plain = fields_of(cls), _mapping(plain, path)
    for key in plain:
        if key not in types:
            raise UserError(
                f"unknown key {join(path, key)!r}. {near(key, types)}Known here: {', '.join(types) or 'nothing'}"
            )
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in plain
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{join(path, missing[0])} is missing; give it a value")
    return cls(
        **{key: parse(types[key], value, join(path, key)) for key, value in plain.items()}
    )


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _parse_leaf(hint: Any, plain: Any, path: str) -> Any:
    given = plain
    if isinstance(plain, float) and plain.is_integer() and _wants_int(hint):
        plain = int(plain)  # 1.0e+8 tokens is how people write a budget
    try:
        if isinstance(plain, float) and not math.isfinite(plain):
            raise msgspec.ValidationError("must be finite")
        return msgspec.convert(plain, hint)
    except msgspec.ValidationError:
        raise UserError(
            f"{path}={_shown(given)} must be {_wanted(hint)}{_advice(given, hint)}"
        ) from None


def _shown(value: Any) -> str:
    """As one writes it in YAML: null, true, 'a word'."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else repr(value)
    )


LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
}


def _wanted(hint: Any) -> str:
    """What a leaf may be, in words: `a whole number >= 1`, `one of auto, cpu, cuda`, `a number > 0 or null`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [
            f"{sign} {limit:g}"
            for name, sign in LIMITS.items()
            if (limit := getattr(options[1], name, None)) is not None
        ]
        return " ".join([_wanted(options[0]), " and ".join(limits)]).rstrip()
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}"
    if origin in (Union, UnionType):
        return " or ".join(_wanted(option) for option in options)
    if origin is list:
        return (
            f"a list, each {_wanted(options[0])}"
            if options[0] in WORDS or get_origin(options[0])
            else "a list"
        )
    if origin is dict and options[1] is not Any:
        return f"a mapping, each {_wanted(options[1])}"
    return WORDS.get(origin or hint, str(hint))


UNITS = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}


def _advice(given: Any, hint: Any) -> str:
    """How to write what was probably meant: 100M -> 100e6; a word near one of the choices."""
    if isinstance(given, str) and (
        match := re.fullmatch(r"([\d._]+)\s*([kmgbt])", given.strip().lower())
    ):
        return f"; write {match[1]}e{UNITS[match[2]]}"
    choices = [
        word
        for option in (hint, *get_args(hint))
        if get_origin(option) is Literal
        for word in get_args(option)
    ]
    return f". {near(given, choices)}".rstrip() if choices and near(given, choices) else ""


def _wants_int(hint: Any) -> bool:
    return hint is int or any(_wants_int(option) for option in get_args(hint))
