"""Several doses of one idea: how a sheet writes them, and what the arms are called."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.language.written import read
from ablab.core.recipe.doses import firsts, menu_of, several, with_edits


def labels(item) -> list[str]:
    (doses,) = menu_of([item]).values()
    return list(doses.labelled)


def weights(item, edits={}) -> list[float]:
    menu = with_edits(menu_of([item]), edits)
    return [dose.weight for dose in menu["z_loss"].doses]


def test_a_list_where_a_dose_expects_one_value_is_one_dose_each():
    item = {"z_loss": {"weight": [1.0e-5, 1.0e-4, 1]}}
    assert weights(item) == [1e-5, 1e-4, 1.0]
    assert labels(item) == ["z_loss weight=1e-05", "z_loss weight=0.0001", "z_loss weight=1"]


@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=5, unique=True))
def test_a_label_can_be_typed_again_and_means_the_same_dose(values):
    item = {"z_loss": {"weight": values}}
    told = [label.partition("=")[2] for label in labels(item)]
    assert [float(read(word)) for word in told] == weights(item) == values


def test_lists_of_two_fields_are_crossed():
    item = {"gating": {"per": ["head", "elementwise"], "init": ["zero", "normal"]}}
    assert labels(item) == [
        "gating per=head, init=zero",
        "gating per=head, init=normal",
        "gating per=elementwise, init=zero",
        "gating per=elementwise, init=normal",
    ]


def test_a_field_that_is_a_list_keeps_meaning_a_list():
    (doses,) = menu_of([{"batch_ramp": {"stages": [0.25, 0.5, 1.0]}}]).values()
    assert [list(dose.stages) for dose in doses.doses] == [[0.25, 0.5, 1.0]]
    assert list(doses.labelled) == ["batch_ramp"]


def test_doses_may_have_names_and_a_list_of_doses_needs_none():
    named = {"z_loss": {"mild": {"weight": 1e-5}, "usual": {}}}
    assert labels(named) == ["z_loss mild", "z_loss usual"]
    listed = {"z_loss": [{"weight": 1e-5}, {}]}
    assert weights(listed) == weights(named) == [1e-5, 1e-4]
    assert labels(listed) == ["z_loss weight=1e-05", "z_loss weight=0.0001"]


def test_one_dose_is_called_by_its_intervention_however_it_is_written():
    for item in ("z_loss", {"z_loss": {"weight": [0.5]}}, {"z_loss": [{}]}):
        assert labels(item) == ["z_loss"]
        assert not several(menu_of([item]))


def test_an_override_sets_every_dose_and_a_list_makes_several():
    item = {"z_loss": {"weight": [1e-5, 1e-4]}}
    assert weights(item, {"with.z_loss.weight": 0.5}) == [0.5]
    assert weights("z_loss", {"with.z_loss.weight": [1, 2]}) == [1.0, 2.0]
    named = menu_of([{"gating": {"wide": {"per": "elementwise"}, "usual": {"per": "head"}}}])
    edited = with_edits(named, {"with.gating.init": "normal"})["gating"]
    assert list(edited.labelled) == ["gating wide", "gating usual"]
    assert [dose.init for dose in edited.doses] == ["normal", "normal"]


def test_the_first_dose_stands_where_one_is_wanted():
    menu = menu_of([{"z_loss": {"weight": [3, 1, 2]}}, "qk_norm"])
    assert firsts(menu)["z_loss"].weight == 3.0
    assert list(several(menu)) == ["z_loss"]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"z_loss": {"weight": []}}, "with.z_loss.weight=[] names no dose; list one or more"),
        ({"z_loss": {"weight": [1, 1.0]}}, "with.z_loss: the doses 1 and 2 are the same"),
        ({"z_loss": {"a": {}, "b": {"weight": 1e-4}}}, "the doses a and b are the same"),
        ({"z_loss": {"weight": [1, "x"]}}, "with.z_loss.weight='x' must be a number"),
        ({"z_loss": {"a": {"wieght": 1}}}, "unknown key 'with.z_loss.a.wieght'. Did you mean"),
        ({"z_loss": {"a/b": {}, "c": {"weight": 1}}}, "'a/b' cannot name a dose"),
        ({"z_loss": {"weight": list(range(65))}}, "with.z_loss names 65 doses"),
        ({"z_loss": {"wieght": [1, 2]}}, "unknown key 'with.z_loss.wieght'. Did you mean"),
        ({"z_loss": []}, "with.z_loss names 0 doses"),
    ],
)
def test_what_is_no_dose_is_named_with_its_cure(item, said):
    with pytest.raises(UserError) as refusal:
        menu_of([item])
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_idea_that_stands_there_twice_is_told_of_lists():
    with pytest.raises(UserError, match="names 'z_loss' twice; keep one, or write its doses"):
        menu_of(["z_loss", {"z_loss": {"weight": 1.0}}])
