"""YAML as people write it, read as plain data and written so that it reads back to the same values.

YAML 1.1 takes 010 for 8, 1:30:00 for 5400 and 2026-01-02 for a date.  Here numbers are decimal (0x and 0b say that
they are not), and what is neither a number nor true, false or null is a word: refused, by name, where a number is
wanted.  What is written is quoted wherever either rule would take it for more than a word.
"""

import math
import re
from typing import Any

import yaml

LONGEST = 100_000  # characters, aliases written out; the longest shipped sheet has 710
DEEPEST = (
    40  # lists and mappings within each other; libyaml's composer overflows the stack at 30,000
)
FEWER_IN_11 = ("int", "float", "timestamp", "value")  # resolved otherwise here than by YAML 1.1

# Longer ones are words: Python itself refuses to convert 4,300 digits.
INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,99}|0x[0-9a-fA-F]{1,64}|0b[01]{1,256})$")
FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"  # YAML 1.1 reads 1e-3 as a word
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class Unreadable(ValueError):
    """Why a text cannot be read, on one line."""

    def __init__(self, why: str, line: int | None = None):
        super().__init__(why)
        self.line = line  # counted from 1, where known


SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(SafeLoader):
    """Numbers as said above; refuses a key that is given twice, of which YAML keeps the last in silence."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in rules if tag.rpartition(":")[2] not in FEWER_IN_11]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: Any) -> float | str:
        """A word where it is too large for a number: a digest such as 6e12345678901234 is not infinite."""
        value: float = super().construct_yaml_float(node)
        overflown = math.isinf(value) and "inf" not in node.value.lower()
        return node.value if overflown else value


class _Dumper(yaml.SafeDumper):
    """Tuples as lists, no anchors: the file is read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_list(dumper: yaml.SafeDumper, data: tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data)


def _as_word(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Double-quoted where it does not print: in single quotes PyYAML writes U+0085 so that it reads back as a space."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _kind in (
    _Loader,
    _Dumper,
):  # the dumper keeps YAML 1.1's rules besides: other programs read by them
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Dumper.add_representer(tuple, _as_list)
_Dumper.add_representer(str, _as_word)


def read(text: str) -> Any:
    """Plain data of a YAML text.  Raises Unreadable: no YAML, too long or too deep, a tag, a key twice, not UTF-8."""
    try:
        text.encode()
        _measure(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506  it is a SafeLoader
    except yaml.YAMLError as flaw:
        mark = getattr(flaw, "problem_mark", None)
        told = " ".join(str(getattr(flaw, "problem", None) or flaw).split())
        raise Unreadable(told, mark.line + 1 if mark else None) from None
    except UnicodeEncodeError as flaw:
        raise Unreadable(f"character {flaw.start} is no text in UTF-8") from None


def _measure(text: str) -> None:
    """Refuse, before anything is built, what would be too much once it is."""
    if len(text) > LONGEST:
        raise Unreadable(f"it is longer than {LONGEST:,} characters; write less")
    size = 0  # characters of the values so far, and one a value
    size_of: dict[str, int] = {}  # of what an anchor names
    opened: list[tuple[str, int]] = []  # anchor or "", size before
    for event in yaml.parse(text, Loader=SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else None
        anchor = getattr(event, "anchor", None) or ""
        if tag := getattr(event, "tag", None):
            raise Unreadable(f"tags such as {tag!r:.40} are not read; drop it", line)
        if isinstance(event, yaml.AliasEvent):
            size += size_of.get(anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            size_of[anchor] = 1 + len(event.value)
            size += size_of[anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, size))
            size_of[anchor] = LONGEST  # while it is open: what holds itself never ends
            size += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = opened.pop()
            size_of[name] = size - before
        if len(opened) > DEEPEST:
            raise Unreadable(f"it nests deeper than {DEEPEST}; write it flatter", line)
        if size > LONGEST:
            raise Unreadable(
                f"with its aliases written out it is longer than {LONGEST:,} characters; write less",
                line,
            )


def dump(tree: Any) -> str:
    """Plain data as YAML, keys in the order of their fields."""
    return yaml.dump(tree, sort_keys=False, allow_unicode=True, width=110, Dumper=_Dumper)


def typed(value: Any) -> str:
    """On one line, as one may type it: Python's spelling where it reads back to the same value, else YAML's."""
    plain = str(value)
    if plain.isprintable() and _same(plain, value):
        return plain
    flow = yaml.dump(
        value, sort_keys=False, default_flow_style=True, width=math.inf, Dumper=_Dumper
    )
    return flow.removesuffix("\n").removesuffix("\n...")


def _same(text: str, value: Any) -> bool:
    try:
        again = read(text)
    except Unreadable:
        return False
    return type(again) is type(value) and again == value
