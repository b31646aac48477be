import pytest

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import measure
from ablab.analysis.pages.answer import answer

FULL = [3.000, 3.001, 3.002]
HIGHER = [3.020, 3.022, 3.021]
LOWER = [2.980, 2.982, 2.981]
UNTOLD = [3.0005, 3.0008, 3.0030]


def said(lab, **cells) -> str:
    lab.cell("full", FULL, None)
    for name, values in cells.items():
        lab.cell(name.replace("minus_", "- ").replace("plus_", "+ "), values)
    return answer(measure(frame.load(lab.write(), "loo"), "val/loss"), "val/loss")


def test_an_arm_that_gets_worse_without_an_ingredient_says_that_it_helps(lab):
    assert said(lab, minus_muon=HIGHER, minus_wsd=UNTOLD) == (
        "`muon` helps (by 0.0200 nats/token); nothing is shown to hurt; "
        "3 seeds cannot tell for `wsd`."
    )


def test_an_arm_that_gets_worse_with_an_ingredient_says_that_it_hurts(lab):
    assert said(lab, plus_fp8=HIGHER).startswith("`fp8` hurts (by 0.0200 nats/token); nothing")


def test_an_arm_that_names_no_ingredient_is_better_or_worse_itself(lab):
    assert said(lab, base=HIGHER) == "`base` is worse (by 0.0200 nats/token)."


def test_several_are_counted_and_their_sizes_are_a_range(lab):
    cells = {f"minus_part{i}": [value + 0.01 * i for value in HIGHER] for i in range(8)}
    assert said(lab, **cells).startswith("8 ingredients help (by 0.0200 to 0.0900 nats/token)")


def test_an_inert_arm_and_one_without_a_run_are_named(lab):
    sentence = said(lab, minus_dead=FULL, minus_lost=["diverged"] * 3)
    assert sentence == (
        "Nothing is shown to make a difference; `dead` changes nothing at all; "
        "no run of `lost` finished."
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [(FULL, "Nothing is compared here: `full` 3.0010 nats/token."), (["missing"], "No run")],
)
def test_an_experiment_of_one_cell_says_its_value(lab, values, words):
    lab.cell("full", values, None)
    assert answer(measure(frame.load(lab.write(), "loo"), "val/loss"), "val/loss").startswith(
        words
    )
