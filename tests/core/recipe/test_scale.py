"""A shorter run keeps every ratio, and says what it could not keep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import plain, run_id
from ablab.core.recipe.scale import inexact, scaled

RISING = {"muon": {"warmup_from": 0.8, "warmup_steps": 400}}
FALLING = {"wsd": {"warmup_steps": 200, "idle_steps": 100, "decay_fraction": 0.3}}
AVERAGED = {"ema": {"horizon": 800}}
LONG = {"budget__tokens": 4000 * 64}


@pytest.fixture(scope="module")
def long(tiny):
    """4,000 steps."""
    return tiny([RISING, "normuon", FALLING, AVERAGED, {"mup": {"base_width": 16}}], **LONG)


@given(share=st.sampled_from([1 / 2, 1 / 4, 1 / 20, 1 / 100]))
def test_tokens_and_steps_shrink_alike_and_nothing_else_changes(long, share):
    short = scaled(long, share)
    momentum = short.optim.chains["hidden"].steps[0]
    assert short.steps == 4000 * share
    assert short.budget.tokens == long.budget.tokens * share
    assert momentum.warmup_steps == 400 * share
    assert (short.schedule.warmup_steps, short.schedule.idle_steps) == (
        200 * share,
        100 * share,
    )
    assert short.after_step[0].horizon == 800 * share
    assert short.schedule.decay_fraction == 0.3
    same = (short.model, short.data, short.objective, short.parametrization, short.seed)
    assert same == (long.model, long.data, long.objective, long.parametrization, long.seed)
    assert inexact(long, share) == []


@given(t=st.integers(1, 1000))
def test_the_schedule_keeps_its_shape(long, t):
    """Step 4 t of the long run, which the short one takes as its t-th, differs by the steps within the four."""
    short = scaled(long, 1 / 4)
    ours = short.schedule.multiplier(t, short.steps)
    around = [long.schedule.multiplier(4 * t - back, long.steps) for back in range(4)]
    assert min(around) - 1e-12 <= ours <= max(around) + 1e-12


def test_the_whole_is_the_very_recipe(long):
    assert scaled(long, 1.0) is long and run_id(scaled(long, 0.5)) != run_id(long)


def test_what_is_rounded_is_said(long):
    assert inexact(long, 3 / 800) == [
        "optim.chains.hidden.steps.momentum.warmup_steps=400 becomes 2, not 1.5",
        "schedule.warmup_steps=200 becomes 1, not 0.75",
        "schedule.idle_steps=100 becomes 1, not 0.375",
    ]
    rounded = [line for line in inexact(long, 1 / 3000) if "steps become" in line]
    assert rounded == ["4,000 steps become 1, not 1.33333"]


def test_nothing_counted_is_left_at_zero_or_made_from_zero(tiny):
    still = tiny([{"wsd": {"warmup_steps": 0}}], **LONG)
    assert plain(scaled(still, 1 / 100).schedule) == plain(still.schedule)
    assert scaled(tiny(**LONG), 1 / 1000).schedule.warmup_steps == 1


def test_too_short_is_one_line(long):
    with pytest.raises(UserError, match=r"budget.tokens=26 is less than one step of"):
        scaled(long, 1e-4)
