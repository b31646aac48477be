import math
from dataclasses import replace

import numpy as np
import pytest

from ablab.analysis.effects import frame
from ablab.analysis.effects.sizes import AtSize, at_size, over_sizes
from ablab.analysis.effects.speedup import Speedup
from ablab.core.errors import UserError

UNSEEN = Speedup("- x", "full", "tokens", 1.0, None, None, (), (), False)


def arm(mean: float, spread: float = 0.01, seeds: int = 3) -> Speedup:
    """A speedup whose seeds' logarithms lie around `mean`."""
    logs = tuple(mean + spread * (np.arange(seeds) - (seeds - 1) / 2))
    return replace(UNSEEN, factor=math.exp(mean), logs=logs, seeds=tuple(range(seeds)))


def told(means: dict[int, float], **more) -> str:
    (found,) = over_sizes(
        [AtSize(f"e{size}", size, [arm(mean, **more)]) for size, mean in means.items()]
    )
    return found.direction


def test_sizes_stand_in_rising_order_whatever_was_named_first():
    found = over_sizes([AtSize("large", 400, [arm(0.3)]), AtSize("small", 100, [arm(0.1)])])
    assert list(found[0].by_size) == [100, 400]
    assert found[0].trend.factor == pytest.approx(math.exp(0.1))  # two doublings, 0.2 of log S


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ({100: 0.1, 400: 0.5}, "the effect grows with size"),
        ({100: 0.5, 400: 0.1}, "the effect fades with size"),
        ({100: -0.1, 400: -0.5}, "the effect grows with size"),
        ({100: -0.5, 400: -0.1}, "the effect fades with size"),
        ({100: -0.2, 400: 0.1}, "the effect changes sides with size"),
        ({100: 0.200, 400: 0.201}, "not told apart from 1"),
        ({100: 0.2}, "one size tells no trend"),
    ],
)
def test_a_trend_in_words(means, words):
    assert told(means) == words


def test_one_seed_has_a_trend_and_no_interval():
    assert told({100: 0.1, 400: 0.5}, seeds=1).startswith("two seeds or more")


def test_an_arm_of_one_size_stands_without_a_trend():
    other = replace(arm(0.2), cell="- y")
    found = over_sizes([AtSize("a", 100, [arm(0.1), other]), AtSize("b", 200, [arm(0.1)])])
    assert [(one.cell, one.trend is None) for one in found] == [("- x", False), ("- y", True)]


def test_two_experiments_of_one_size_are_refused_by_name():
    with pytest.raises(UserError, match="'a' and 'b' are of one size, 100 parameters"):
        over_sizes([AtSize("a", 100, [arm(0.1)]), AtSize("b", 100, [arm(0.1)])])


def test_the_size_is_what_a_run_of_the_reference_has_recorded(lab):
    lab.cell("full", [3.0, 3.01], None, points=8)
    lab.cell("- x", [3.1, 3.12], points=8)
    store = lab.write()
    tables = (frame.load(store, "loo"), frame.curves(store, "loo"))
    with pytest.raises(UserError, match="'loo': no run of its reference has recorded"):
        at_size(store, "loo", *tables, "val/loss", "lower")
    lab.size(1234)
    assert at_size(store, "loo", *tables, "val/loss", "lower").parameters == 1234
