"""Schedules: corners, shapes, and no step outside the run that falls off the curve."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.parts.schedule import Constant, Cosine

RUNS = settings(max_examples=60)
# (warm-up, steps), warm-up < steps
lengths = st.tuples(st.integers(1, 500), st.integers(1, 5000)).map(
    lambda pair: (pair[0], sum(pair))
)


@RUNS
@given(lengths, st.floats(0, 1))
def test_cosine_peaks_after_the_warmup_and_ends_one_step_above_its_floor(run, floor):
    """(1 + cos(pi - a)) / 2 = sin(a / 2)^2, a = pi / falling steps."""
    warmup, steps = run
    cosine = Cosine(warmup, floor)
    assert cosine.multiplier(warmup, steps) == cosine.multiplier(warmup + 1, steps) == 1.0
    last = floor + (1 - floor) * math.sin(math.pi / 2 / (steps - warmup)) ** 2
    assert abs(cosine.multiplier(steps, steps) - last) < 1e-12
    assert abs(cosine.multiplier(steps + 1, steps) - floor) < 1e-12
    assert abs(cosine.multiplier(1, steps) - 1 / warmup) < 1e-12


@RUNS
@given(lengths, st.floats(0, 1), st.floats(0, 1))
def test_cosine_is_half_a_cosine_of_the_part_done(run, floor, part):
    warmup, steps = run
    before = round(part * (steps - warmup - 1))  # falling steps that lie behind
    t = warmup + before + 1
    angle = math.pi * before / (steps - warmup)
    expected = floor + (1 - floor) * math.cos(angle / 2) ** 2  # (1 + cos a) / 2
    assert abs(Cosine(warmup, floor).multiplier(t, steps) - expected) < 1e-12


@RUNS
@given(lengths, st.floats(0, 1))
def test_cosine_rises_linearly_then_only_falls_and_never_leaves_its_range(run, floor):
    warmup, steps = run
    cosine = Cosine(warmup, floor)
    curve = [cosine.multiplier(t, steps) for t in range(1, min(steps, 1500) + 1)]
    for t, value in enumerate(curve[:warmup], 1):
        assert abs(value - t / warmup) < 1e-12
    for before, after in itertools.pairwise(curve[warmup - 1 :]):
        assert after <= before + 1e-15
    assert all(0 < value <= 1 for value in curve)


@RUNS
@given(lengths)
def test_without_a_floor_the_last_step_still_moves(run):
    """Else a run of n steps would train n - 1, and its last batch for nothing."""
    warmup, steps = run
    assert Cosine(warmup, floor=0.0).multiplier(steps, steps) > 0
    assert Cosine(steps, floor=0.0).multiplier(steps, steps) == 1


@pytest.mark.parametrize("schedule", [Cosine(10, 0.25), Cosine(0, 0.25), Cosine(40, 0.25)])
def test_past_the_end_the_floor_holds(schedule):
    assert schedule.multiplier(40, 40) > 0.25
    for t in (41, 42, 60, 90, 10_000):
        assert abs(schedule.multiplier(t, 40) - 0.25) < 1e-12


def test_without_a_warmup_the_first_step_is_at_full_rate_and_nothing_is_divided_by_zero():
    assert Constant().multiplier(1, 10) == 1.0
    assert Cosine(0, 0.0).multiplier(1, 10) == 1.0
    expected = (1 + math.cos(math.pi / 10)) / 2
    assert abs(Cosine(0, 0.0).multiplier(2, 10) - expected) < 1e-12
    assert Cosine(5, 0.1).multiplier(5, 5) == 1.0  # a run that is all warm-up


def test_constant_is_the_warmup_and_then_one():
    schedule = Constant(4)
    assert [schedule.multiplier(t, 6) for t in range(1, 5)] == [0.25, 0.5, 0.75, 1]
    assert [schedule.multiplier(t, 6) for t in range(5, 9)] == [1] * 4


def test_a_warmup_longer_than_the_run_is_refused_with_both_numbers(tiny):
    with pytest.raises(UserError, match=r"schedule.warmup_steps=13 exceeds the run's 12 steps"):
        tiny(schedule__warmup_steps=13)
