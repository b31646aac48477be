"""Micro-steps: schedule and momentum by the iteration at which the weights move, against its own formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablab.ablations.interventions.micro_steps import MicroSteps
from ablab.ablations.interventions.wsd import WSD
from ablab.core.errors import UserError
from ablab.core.parts.transforms import Now


@given(
    count=st.integers(1, 5),
    steps=st.integers(4, 200),
    share=st.sampled_from([0.25, 0.5, 1.0]),
    idle=st.integers(0, 20),
    warmup=st.integers(1, 50),
    floor=st.floats(0, 1),
)
def test_the_rate_is_that_of_the_iteration(count, steps, share, idle, warmup, floor):
    wsd = WSD(share, floor=floor, warmup_steps=warmup, idle_steps=idle)
    schedule = MicroSteps(count, wsd)
    iterations = count * steps
    for t in range(1, steps + 1):
        i = count * t - 1
        u = max((i - (1 - share) * iterations) / (share * iterations), 0.0)
        rise = min(max(i - idle, 0) / warmup, 1.0)
        expected = rise * (floor + (1 - floor) * (1 - math.sqrt(u)))
        assert schedule.multiplier(t, steps) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("behind", [0, 1])
def test_momentum_rises_by_micro_batches(tiny, behind):
    dose = {"warmup_from": 0.5, "momentum": 0.9, "warmup_steps": 8, "warmup_behind": behind}
    recipe = tiny([{"muon": dose}, "wsd", {"micro_steps": {"count": 3}}])
    momentum = recipe.optim.chains["hidden"].steps[0]
    for t in range(1, 6):
        kept = momentum.keep(Now(torch.tensor(float(t)), None, None)).item()
        risen = min(3 * t - behind, 8 - behind) / 8
        assert kept == pytest.approx(0.5 + 0.4 * risen, abs=1e-6)


def test_another_schedule_is_refused(tiny):
    with pytest.raises(UserError, match="micro_steps.base must be a wsd schedule"):
        tiny(["muon", "wsd", {"micro_steps": {"base": "constant"}}])
