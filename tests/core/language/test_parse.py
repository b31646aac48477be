"""Plain data becomes typed values or a line that says where, what, and how to write it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, near, parse, paths_of
from ablab.core.language.part import Asked, Part, part
from ablab.core.parts.position import Rope
from ablab.core.parts.schedule import Cosine
from ablab.core.recipe.recipe import Recipe


class Turns(Asked, Protocol):
    """A slot's Protocol, as core/recipe/asks.py has them."""

    def turn(self) -> int: ...


@dataclass(frozen=True)
class Inner:
    word: Literal["near", "far"] = "near"


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Meta(ge=1)]
    inner: Inner = field(default_factory=Inner)
    one: Turns = field(default_factory=Rope)
    some: tuple[Turns, ...] = ()
    perhaps: Turns | None = None
    named: dict[str, Inner] = field(default_factory=dict)


def test_a_slot_takes_any_registered_kind_by_name_by_mapping_or_as_it_is():
    for given_part in ("cosine", {"kind": "cosine"}, Cosine()):
        read = parse(Outer, {"count": 2, "one": given_part, "some": [given_part]}, "")
        assert read.one == Cosine() and read.some == (Cosine(),)
    assert parse(Outer, {"count": 2, "perhaps": None}, "").perhaps is None
    assert parse(Outer, {"count": 2, "perhaps": "rope"}, "").perhaps == Rope()


def test_a_word_of_a_certain_form_is_asked_for_by_its_description():
    spelt = Annotated[str, Meta(pattern="^[ab]+$", description="letters a and b")]
    assert parse(spelt, "abba", "at") == "abba"
    with pytest.raises(UserError, match="^at='abc' must be letters a and b$"):
        parse(spelt, "abc", "at")


def test_what_is_not_given_has_its_default():
    assert parse(Outer, {"count": 2}, "") == Outer(2)
    assert parse(Outer, {"count": 2, "named": {"a": {"word": "far"}}}, "").named == {
        "a": Inner("far")
    }


@pytest.mark.parametrize(
    ("given_data", "said"),
    [
        ({}, "at.count is missing; give it a value"),
        ({"count": 0}, "at.count=0 must be a whole number >= 1"),
        ({"count": True}, "at.count=true must be a whole number >= 1"),
        ({"count": None}, "at.count=null must be a whole number >= 1"),
        ({"count": "100M"}, "at.count='100M' must be a whole number >= 1; write 100e6"),
        (
            {"count": 1, "iner": {}},
            "unknown key 'at.iner'. Did you mean 'inner'? "
            "Known here: count, inner, one, some, perhaps, named",
        ),
        (
            {"count": 1, "inner": {"word": "nar"}},
            "at.inner.word='nar' must be one of near, far. Did you mean 'near'?",
        ),
        ({"count": 1, "some": "rope"}, "at.some must be a list, not 'rope'"),
        ({"count": 1, "named": 3}, "at.named must be a mapping of names to values, not 3"),
        ({"count": 1, "one": {"base": 1.0}}, "at.one: no kind given. Registered: "),
        ({"count": 1, "one": "rop"}, "at.one: unknown kind 'rop'. Did you mean 'rope'? "),
        ({"count": 1, "some": ["rope", 1]}, "at.some[1] must be a mapping"),
    ],
)
def test_a_refusal_says_where_what_and_how_to_write_it(given_data, said):
    with pytest.raises(UserError) as refusal:
        parse(Outer, given_data, "at")
    assert str(refusal.value).startswith(said)
    assert "\n" not in str(refusal.value)


@given(st.integers(1, 10**15))
def test_a_whole_float_is_read_where_a_whole_number_is_wanted(count):
    assert parse(int, float(count), "budget") == count
    with pytest.raises(UserError, match="must be a whole number"):
        parse(int, 0.5, "budget")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_must_be_finite(value):
    with pytest.raises(UserError, match="x=.* must be a number"):
        parse(float, value, "x")


def test_near_names_the_longer_form_first_and_nothing_where_nothing_is_near():
    assert near("bench", ["bench step", "benches"]) == "Did you mean 'bench step'? "
    assert near("gatng", ["gating", "muon"]) == "Did you mean 'gating'? "
    assert near("xyz", ["gating", "muon"]) == ""


def test_paths_go_through_dataclasses_and_stop_at_parts():
    assert list(paths_of(Outer)) == [
        "count",
        "inner",
        "inner.word",
        "one",
        "some",
        "perhaps",
        "named",
    ]
    assert {"model.attention.mix", "optim.clip", "data.batch"} <= set(paths_of(Recipe))
    assert "kind" not in fields_of(Rope)


def test_a_kind_belongs_to_one_class(monkeypatch):
    monkeypatch.setattr(Part, "known", dict(Part.known))
    with pytest.raises(
        UserError, match="two parts are called 'rope': .*position and .*; rename"
    ):

        @part("rope")
        class Another(Part):
            pass


def test_the_same_file_imported_again_replaces_its_kind(monkeypatch):
    monkeypatch.setattr(Part, "known", dict(Part.known))

    def imported():
        @part("mine")
        class Mine(Part):
            size: int = 3

        return Mine

    imported()
    again = imported()
    assert Part.known["mine"] is again
    assert (again().kind, again.kind, again(4).size) == ("mine", "mine", 4)
