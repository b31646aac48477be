"""What a stage may ask of the one before, settled before anything trains."""

import pytest

from ablab.core.errors import UserError
from ablab.core.model.heritage import Wish, following
from ablab.core.recipe.recipe import run_id
from ablab.core.recipe.stage import Handover


def test_a_child_is_named_by_its_parent_and_counts_on(tiny):
    first = tiny()
    second = following(first, tiny(optim__lr=0.01), Wish())
    third = following(second, tiny(optim__lr=0.02), Wish(("steps",)))
    assert second.init == Handover(run_id(first), takes=("optimizer",), steps=12, windows=48)
    assert third.init == Handover(run_id(second), steps=24, windows=96)
    assert len({run_id(one) for one in (tiny(optim__lr=0.01), second)}) == 2


def test_windows_go_on_where_the_data_do(tiny):
    """Twelve steps of four rows of 16 tokens are 768 tokens."""
    parent = tiny()
    longer = following(parent, tiny(data__context=32, data__batch=2), Wish())
    shorter = following(longer, tiny(data__context=20), Wish())
    other = following(parent, tiny(data__name="other"), Wish())
    assert longer.init.windows == 768 / 32
    assert shorter.init.windows == -(-2 * 768 // 20)
    assert other.init.windows == 0


@pytest.mark.parametrize(
    ("before", "now", "wish", "said"),
    [
        (
            {},
            {"model__width": 64},
            Wish(),
            r"embedding.table is \[64, 64\] here and \[64, 32\] in",
        ),
        (
            {},
            {"model__layers": 4},
            Wish(),
            r"blocks.3.attention.norm.gain is \[32\] here and absent",
        ),
        (
            {"model__tied": True},
            {},
            Wish(),
            "readout.weight is .* here and absent in the stage before",
        ),
        (
            {},
            {"treatment": ["muon"]},
            Wish(),
            "optim.chains.hidden keeps state as momentum here and as adam",
        ),
        ({}, {}, Wish(("optimizer",)), "optimizer without steps would correct"),
        (
            {},
            {},
            Wish(read="evaluated"),
            "read: evaluated asks for an average, and the stage before has",
        ),
        ({}, {}, Wish(("steps", "average")), "has no average|and this one have none"),
        (
            {},
            {"treatment": ["ema"]},
            Wish(("steps", "average")),
            "the stage before has no ema like",
        ),
    ],
)
def test_what_the_parent_cannot_give_is_refused_in_one_line(tiny, before, now, wish, said):
    with pytest.raises(UserError, match=said) as refusal:
        following(tiny(**before), tiny(**now), wish)
    assert len(str(refusal.value)) <= 300


def test_another_optimizer_may_begin_anew(tiny):
    child = following(tiny(), tiny(["muon"]), Wish(()))
    assert child.init.takes == () and child.init.steps == 0
