"""Plain data (from YAML, JSON or an override) -> typed values.  Strict, and every refusal says where."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from ablab.core.errors import UserError
from ablab.core.language.part import Asked, Part


def parse(hint: Any, plain: Any, path: str) -> Any:
    """The typed value of plain data.

    Raises UserError: unknown key (with the near miss), missing key, wrong type, value out of range.
    """
    if _is_slot(hint):
        return _parse_part(plain, path)
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(hint, plain, path)
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType) and any(_holds_parts(option) for option in options):
        held = next(option for option in options if option is not type(None))
        return None if plain is None else parse(held, plain, path)
    if origin is tuple and _holds_parts(options[0]):
        if not isinstance(plain, (list, tuple)):
            raise UserError(f"{path} must be a list, not {_shown(plain)}")
        return tuple(parse(options[0], item, f"{path}[{i}]") for i, item in enumerate(plain))
    if origin is dict and _holds_parts(options[1]):
        items = _mapping(plain, path).items()
        return {key: parse(options[1], item, f"{path}.{key}") for key, item in items}
    return _parse_leaf(hint, plain, path)


def _is_slot(hint: Any) -> bool:
    """Part itself, a base of parts, or a slot's Protocol: any registered kind may stand there."""
    if not isinstance(hint, type):
        return False
    registered = "kind" in hint.__dict__.get("__dataclass_fields__", {})
    return Asked in hint.__mro__ or (issubclass(hint, Part) and not registered)


def _holds_parts(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or _is_slot(hint)


def _mapping(plain: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(plain, Mapping):
        raise UserError(f"{path} must be a mapping of names to values, not {_shown(plain)}")
    return plain


def _parse_part(plain: Any, path: str) -> Part:
    if isinstance(plain, Part):
        return plain
    if isinstance(plain, str):
        plain = {"kind": plain}
    kind = _mapping(plain, path).get("kind")
    if not isinstance(kind, str) or kind not in Part.known:
        said = "no kind given. "
        if kind:
            said = f"unknown kind {_shown(kind)}. {near(kind, Part.known)}"
        raise UserError(f"{path}: {said}Registered: {', '.join(sorted(Part.known))}")
    dose = {key: value for key, value in plain.items() if key != "kind"}
    return _parse_dataclass(Part.known[kind], dose, path)


def _parse_dataclass(cls: Any, plain: Any, path: str) -> Any:
    if isinstance(plain, cls):
        return plain
    types, given = fields_of(cls), _mapping(plain, path)
    for key in given:
        if key not in types:
            known = ", ".join(types) or "nothing"
            raise UserError(
                f"unknown key {join(path, key)!r}. {near(key, types)}Known here: {known}"
            )
    for field in dataclasses.fields(cls):
        if field.init and field.name not in given and _is_required(field):
            raise UserError(f"{join(path, field.name)} is missing; give it a value")
    return cls(
        **{key: parse(types[key], value, join(path, key)) for key, value in given.items()}
    )


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def fields_of(cls: Any) -> dict[str, Any]:
    """Name -> type of the fields that a user may set."""
    hints = _hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def paths_of(cls: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all fields that a user may set, through the dataclasses below; parts and mappings are leaves."""
    for name, hint in fields_of(cls).items():
        yield join(path, name)
        if dataclasses.is_dataclass(hint):
            yield from paths_of(hint, join(path, name))


_hint_cache: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _hint_cache:
        _hint_cache[cls] = get_type_hints(cls, include_extras=True)
    return _hint_cache[cls]


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


# -- leaves ------------------------------------------------------------------------------------------------------------


def _parse_leaf(hint: Any, plain: Any, path: str) -> Any:
    value = plain
    if isinstance(plain, float) and plain.is_integer() and _wants(int, hint):
        value = int(plain)  # 1.0e+8 tokens is how people write a budget
    try:
        if any(_is_beyond(number) for number in _items(value)):
            raise msgspec.ValidationError("must be finite, and a whole number have 64 bits")
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        said = f"{path}={_shown(plain)} must be {_wanted(hint)}{_advice(plain, hint)}"
        raise UserError(said) from None


def _wants(leaf: type, hint: Any) -> bool:
    return hint is leaf or any(_wants(leaf, option) for option in get_args(hint))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else (value,)


def _is_beyond(value: Any) -> bool:
    """No number that every file and every library here can hold."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and abs(value) >= BEYOND


def _shown(value: Any) -> str:
    """As one writes it in YAML: null, true, 'a word'; the beginning of a long one."""
    if value is None:
        return "null"
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


BEYOND = 2**63
SHOWN = 120  # characters of a value in a message


LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
WORDS: dict[Any, str] = {
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
        limited = f"{_wanted(options[0])} {_limits(options[1])}".rstrip()
        return options[1].description or limited
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}"
    if origin in (Union, UnionType):
        return " or ".join(_wanted(option) for option in options)
    if origin in (list, tuple):
        named = options[0] in WORDS or get_origin(options[0])
        return f"a list, each {_wanted(options[0])}" if named else "a list"
    if origin is dict and options[1] is not Any:
        return f"a mapping, each {_wanted(options[1])}"
    return WORDS.get(origin or hint, str(hint))


def _limits(meta: Any) -> str:
    given = {sign: getattr(meta, name, None) for name, sign in LIMITS.items()}
    return " and ".join(
        f"{sign} {limit:g}" for sign, limit in given.items() if limit is not None
    )


UNITS = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}


def _advice(given: Any, hint: Any) -> str:
    """How to write what was probably meant: 100M -> 100e6, 010 -> 10; a word near one of the choices."""
    for one in _items(given):
        if cure := _cure(one, hint):
            return f"; {cure}"
    literals = [one for one in (hint, *get_args(hint)) if get_origin(one) is Literal]
    choices = [word for literal in literals for word in get_args(literal)]
    return f". {near(given, choices)}".rstrip() if choices and near(given, choices) else ""


def _cure(given: Any, hint: Any) -> str:
    """What to do about one value of another type."""
    if isinstance(given, str) and not _wants(str, hint):
        text = given.strip().lower()
        if match := re.fullmatch(r"([\d._]+)\s*([kmgbt])", text):
            return f"write {match[1]}e{UNITS[match[2]]}"
        if match := re.fullmatch(r"([-+]?)0+([1-9]\d*)", text):
            return f"write {match[1]}{match[2]}, without the 0"
        if re.fullmatch(r"[-+]?\d+(:\d+)+(\.\d*)?", text):
            return "write one number, without ':'"
    if isinstance(given, (int, float)):
        if _wants(str, hint) and get_origin(hint) is not dict:  # whose keys alone are words
            return "a word that looks like something else needs quotes: '\"...\"'"
        if _is_beyond(given) and math.isfinite(given):
            return "write less than 2^63"
    return ""


def near(word: Any, known: Iterable[Any]) -> str:
    """`Did you mean ...? ` or nothing."""
    text, names = str(word)[:SHOWN], [str(name) for name in known]
    longer = [name for name in names if len(text) > 2 and name.startswith(f"{text} ")]
    close = longer or get_close_matches(text, names, n=1, cutoff=0.55)
    return f"Did you mean {close[0]!r}? " if close else ""
