"""Warm-up, stable, decay: exact corners, no step, no step back, nothing below the floor."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.ablations.interventions.wsd import WSD
from ablab.core.parts.schedule import Cosine

SHAPES = ["1-sqrt", "linear", "cosine", "power"]
FORMULA = {
    "1-sqrt": lambda u: 1 - math.sqrt(u),
    "linear": lambda u: 1 - u,
    "cosine": lambda u: math.cos(math.pi * u / 2) ** 2,
    "power": lambda u: (1 - u) ** 1.2,
}
RUNS = settings(max_examples=60)


@st.composite
def runs(draw):
    """Warm-up W and decay D with W <= T - D, so that the corners are steps of their own."""
    warmup = draw(st.integers(1, 300))
    stable = draw(st.integers(0, 2000))
    decay = draw(st.integers(1, 1000))
    steps = warmup + stable + decay
    return (
        warmup,
        steps,
        decay,
        WSD(decay / steps, draw(st.sampled_from(SHAPES)), 1.2, draw(st.floats(0, 1)), warmup),
    )


@RUNS
@given(runs())
def test_corners(run):
    """Full rate at the end of the warm-up and at the first step of the decay, the floor behind the last step."""
    warmup, steps, decay, wsd = run
    assert abs(wsd.multiplier(1, steps) - 1 / warmup) < 1e-12
    # sqrt of 1e-16 is 1e-8.
    assert wsd.multiplier(warmup, steps) == pytest.approx(
        1, abs=1e-6 if wsd.shape == "1-sqrt" else 1e-12
    )
    assert wsd.multiplier(steps - decay + 1, steps) == pytest.approx(
        1, abs=1e-6 if wsd.shape == "1-sqrt" else 1e-12
    )
    last = FORMULA[wsd.shape](1 - 1 / decay)
    expected = wsd.floor + (1 - wsd.floor) * last
    assert wsd.multiplier(steps, steps) == pytest.approx(expected, abs=1e-9)
    assert abs(wsd.multiplier(steps + 1, steps) - wsd.floor) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [20, 1000, 13_560])
def test_corners_to_1e12_at_the_fractions_that_people_write(shape, fraction, steps):
    wsd = WSD(fraction, shape, floor=0.07, warmup_steps=2)
    decay = round(fraction * steps)
    first = max(steps - decay + 1, 2)  # of the decay, behind the warm-up
    assert fraction == 1.0 or abs(wsd.multiplier(first, steps) - 1) < 1e-12
    assert fraction == 1.0 or abs(wsd.multiplier(2, steps) - 1) < 1e-12
    expected = 0.07 + 0.93 * FORMULA[shape](1 - 1 / decay)
    assert abs(wsd.multiplier(steps, steps) - expected) < 1e-12
    assert abs(wsd.multiplier(1, steps) - 0.5) < 1e-12


@RUNS
@given(runs(), st.floats(0, 1))
def test_each_shape_follows_its_formula(run, part):
    warmup, steps, decay, wsd = run
    before = round(part * (decay - 1))  # steps of the decay that lie behind
    t = steps - decay + before + 1
    expected = wsd.floor + (1 - wsd.floor) * FORMULA[wsd.shape](before / decay)
    assert wsd.multiplier(t, steps) == pytest.approx(
        expected, abs=1e-6 if wsd.shape == "1-sqrt" else 1e-12
    )


@RUNS
@given(runs())
def test_it_rises_then_holds_then_falls(run):
    warmup, steps, decay, wsd = run
    curve = [wsd.multiplier(t, steps) for t in range(1, steps + 1)]
    assert all(
        after > before
        for before, after in zip(curve[: warmup - 1], curve[1:warmup], strict=True)
    )
    assert all(abs(value - 1) < 1e-6 for value in curve[warmup - 1 : steps - decay + 1])
    assert curve[-1] > wsd.floor or wsd.floor == 1
    assert all(
        after <= before + 1e-12
        for before, after in zip(curve[warmup - 1 :], curve[warmup:], strict=False)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_continuous_where_the_pieces_meet(shape):
    """At a million steps neighbours differ by less than the steepest step: 1 - sqrt falls by sqrt(1/D) at first."""
    wsd = WSD(0.2, shape, floor=0.1, warmup_steps=1000)
    steps = 1_000_000
    for t in (1000, 800_000, steps):
        assert (
            abs(wsd.multiplier(t, steps) - wsd.multiplier(t - 1, steps))
            <= 200_000**-0.5 + 1e-12
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_past_the_end_the_floor_holds(shape, floor):
    wsd = WSD(0.25, shape, floor=floor, warmup_steps=2)
    assert wsd.multiplier(40, 40) > floor
    assert [wsd.multiplier(t, 40) for t in (41, 80, 10_000)] == [
        pytest.approx(floor, abs=1e-12)
    ] * 3


def test_with_a_linear_fall_it_is_the_schedule_of_nanochat():
    """Its formula, iteration from 0: (it + 1) / warmup, 1, then (iterations - it) / warmdown; floor 0."""
    warmup, steps, warmdown = 40, 1000, 650
    wsd = WSD(warmdown / steps, "linear", floor=0.0, warmup_steps=warmup)
    for iteration in range(steps):
        rise = (iteration + 1) / warmup
        fall = (steps - iteration) / warmdown
        expected = min(rise, 1.0, fall)
        assert abs(wsd.multiplier(iteration + 1, steps) - expected) < 1e-12


def test_a_decay_over_the_whole_run_and_a_warmup_into_the_decay_stay_in_range():
    for wsd in (
        WSD(1.0, warmup_steps=0),
        WSD(0.9, warmup_steps=30),
        WSD(0.001, warmup_steps=40),
    ):
        curve = [wsd.multiplier(t, 40) for t in range(1, 41)]
        assert all(0 < value <= 1 for value in curve)
    assert WSD(1.0, warmup_steps=0).multiplier(40, 40) == pytest.approx(1 - (39 / 40) ** 0.5)
    assert WSD(0.001, warmup_steps=40).multiplier(40, 40) == 1  # a fall of less than a step


def test_the_default_is_the_best_of_imu1(tiny):
    """20 % and 1 - sqrt; the warm-up is that of the schedule it replaces, unless it brings its own."""
    assert tiny(["wsd"]).schedule == WSD(0.2, "1-sqrt", 1.2, 0.0, 3)
    assert tiny([{"wsd": {"warmup_steps": 0}}]).schedule.warmup_steps == 0
    assert tiny().schedule == Cosine(3, 0.1)


def test_the_run_follows_it(tiny, token_folder, tmp_path):
    """Not the cosine that it replaces: the logged rates of twelve steps."""
    from ablab.core.runtime.runtime import Runtime
    from ablab.core.store.record import Record
    from ablab.core.train.run import run

    recipe = tiny([{"wsd": {"decay_fraction": 0.5, "shape": "linear"}}], optim__lr=0.004)
    record = Record(tmp_path)
    run(
        recipe,
        Runtime(device="cpu", compile=False, log_every=1, evaluations=1),
        token_folder,
        record,
    )
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [line["optim/lr"] / 0.004 for line in record.metrics()] == pytest.approx(
        expected, abs=1e-12
    )


def test_idle_steps_come_before_the_warm_up():
    idle = WSD(0.0, warmup_steps=4, idle_steps=3)
    rates = [idle.multiplier(t, 12) for t in range(1, 13)]
    assert rates == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
