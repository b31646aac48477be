"""Odd things to type and to write, and how many of them."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# `ablab` calls the command anew for each example, and holds nothing between two; a busy machine draws slowly.
many = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ODD = [
    "010",
    "1:30:00",
    "2026-01-02",
    "6e12345678901234",
    "99999999999",
    "-1",
    "1" * 5000,
    "1e308",
    "-1e-308",
    ".inf",
    ".nan",
    "null",
    "",
    "yes",
    "!!int x",
    "!!binary x",
    "!!map [a]",
    "&a [*a]",
    "*a",
    "{[a]: b}",
    "{? {a: b} : c}",
    "{1: 2}",
    "{kind: [a]}",
    "{kind: {}}",
    "[{}]",
    "[[]]",
    "{<<: 3}",
    "[010, 011]",
    '"a\\0b"',
    '"\\e[31m"',
    '"a\\nb"',
    "\udcff",
    "é" * 300,
    "[" * 20_000,
    "{a: " * 20_000,
    "x" * 90_000,
    "[" + "x, " * 30_000 + "]",
]
WRITTEN = (
    st.sampled_from(ODD)
    | st.integers(-(10**20), 10**20).map(str)
    | st.floats().map(str)
    | st.text(st.characters(exclude_characters="\0"), max_size=12)
)


TEXTS = st.text(max_size=30) | st.sampled_from(
    ["", "\ufeff", "\udcff", "a\0b", "<|endoftext|>"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places_in(tree, above=()):
    """Every path to a value within lists and mappings; those near the top first, and few of a long list."""
    held = list(tree.items()) if isinstance(tree, dict) else []
    held = list(enumerate(tree)) if isinstance(tree, list) else held
    for key, inner in held[:12]:
        yield (*above, key)
        yield from places_in(inner, (*above, key))


def changed(tree, at: float, value):
    """A copy with `value` in one of its places."""
    copy = json.loads(json.dumps(tree))
    places = list(places_in(copy))
    *above, last = places[min(int(at * len(places)), len(places) - 1)]
    holder = copy
    for key in above:
        holder = holder[key]
    holder[last] = value
    return copy


def sheet(**keys: str) -> str:
    usual = {
        "question": "q",
        "base": "[base, mini]",
        "with": "[qk_norm]",
        "runtime": "{device: cpu}",
    }
    return "".join(f"{key}: {value}\n" for key, value in (usual | keys).items())
