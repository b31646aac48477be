"""YAML is read in decimal, within bounds, and what is written reads back to the same values."""

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ablab.core.language.written import DEEPEST, LONGEST, Unreadable, dump, read, typed

# What YAML 1.1, or a reader of numbers, takes for something other than the word that it is.
MISREAD = [
    "010",
    "-0777",
    "1:30:00",
    "1:30.5",
    "2026-01-02",
    "2026-01-02T03:04:05Z",
    "0123456789012345",
    "6e12345678901234",
    "=",
    "1" * 5000,
]
NUMBERS = {
    "10": 10,
    "-3": -3,
    "1_000": 1000,
    "0x1f": 31,
    "0b11": 3,
    "1e-3": 0.001,
    "3.": 3.0,
    ".5": 0.5,
    "1_0.5": 10.5,
    "010.5": 10.5,
    "-1.5E+3": -1500.0,
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from([*MISREAD, *NUMBERS, "yes", "null", "~", "<<", "1234567890123e12"])
    | st.from_regex(r"[0-9]{1,3}[0-9e:._-]{1,8}", fullmatch=True)
    | st.from_regex(r"[0-9e]{16}", fullmatch=True)
)
TREES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("word", MISREAD)
def test_what_is_no_decimal_number_is_a_word(word):
    assert read(word) == word
    assert read(f"a: [{word}]") == {"a": [word]}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_as_it_looks(text):
    value = read(text)
    assert value == NUMBERS[text] and type(value) is type(NUMBERS[text])


@settings(max_examples=300)
@given(tree=TREES)
@example(tree={"\x85": "\u2028"})
def test_what_is_written_reads_back_here_and_by_the_rules_of_yaml_1_1(tree):
    written = dump(tree)
    assert same(read(written), tree)
    assert same(read(typed(tree)), tree)
    assert same(yaml.safe_load(written), tree)


def same(one, other) -> bool:
    """Equal in value and in type, all the way down."""
    return repr(one) == repr(other)


@settings(max_examples=100)
@given(digest=st.from_regex(r"[0-9]{1,15}e[0-9]{1,15}|[0-9]{16}", fullmatch=True))
def test_every_digest_reads_back_as_the_word_it_was(digest):
    assert read(dump({"digest": digest})) == {"digest": digest}
    assert read(typed(digest)) == digest


BOMBS = {
    "lists in lists": ("[" * 30_000, f"nests deeper than {DEEPEST}"),
    "mappings in mappings": ("{a: " * 20_000, f"nests deeper than {DEEPEST}"),
    "indented": ("- " * 30_000, f"nests deeper than {DEEPEST}"),
    "a long text": ("a" * (LONGEST + 1), f"longer than {LONGEST:,}"),
    "aliases of aliases": (
        "a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9)),
        "with its aliases written out",
    ),
    "an alias of a long word": (
        f"a: &a {'x' * 1000}\nb: [{', '.join(['*a'] * 1000)}]",
        "with its aliases written out",
    ),
    "a list that holds itself": ("a: &a [*a]", "with its aliases written out"),
    "a tag": ("!!int x", "tags such as"),
    "a tag of Python's": ("!!python/object:os.system x", "tags such as"),
    "a key that is a list": ("{[a]: b}", "unhashable key"),
    "a key twice": ("{a: 1, a: 2}", "'a' stands there twice"),
    "an alias of nothing": ("*a", "undefined alias"),
    "a lone surrogate": ("a: \udcff", "no text in UTF-8"),
    "a control character": ("a: \x01", "not allowed"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_text_that_would_be_too_much_is_refused_before_it_is_built(bomb):
    text, why = BOMBS[bomb]
    with pytest.raises(Unreadable, match=why) as refusal:
        read(text)
    assert len(str(refusal.value)) < 150 and "\n" not in str(refusal.value)


def test_an_alias_stands_for_what_it_names():
    assert read("{a: &a [1, 2], b: *a, c: [*a, *a]}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": [[1, 2], [1, 2]],
    }
