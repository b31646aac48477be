"""Scores, their errors over items and differences on the same items, beside formulas of their own."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.store.evaluation import (
    Evaluation,
    Part,
    evaluations_of,
    minus,
    path_of,
    read,
    scores_of,
    write,
)
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, Result

right_or_wrong = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=30)


def evaluation(parts, mean="centered", weights="w", bundle="b") -> Evaluation:
    return Evaluation("core", "eval/core", mean, parts, bundle, weights)


@given(right_or_wrong, st.floats(0, 0.9))
def test_a_task_is_centered_between_guessing_and_all_right(values, baseline):
    part = Part("t", values, baseline=baseline)
    share = sum(values) / len(values)
    assert part.score == pytest.approx(share)
    assert part.centered == pytest.approx((share - baseline) / (1 - baseline))


def test_right_and_wrong_have_the_interval_of_agresti_and_coull():
    """Their example of 0 of 10: (0, 0.3445) for a 95 % interval with z^2 taken as 4."""
    none = Part("t", [0.0] * 10)
    low, high = none.interval
    share = 2 / 14
    assert low == 0.0
    assert high == pytest.approx(share + 1.959964 * math.sqrt(share * (1 - share) / 14))
    all_right = Part("t", [1.0] * 10)
    assert all_right.interval == pytest.approx((1 - high, 1.0))


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 9)), min_size=2, max_size=20))
def test_bits_over_bytes_have_the_error_of_a_ratio(items):
    """Cochran 1977, eq. 6.13 with n / (n - 1):  var = n / (n - 1) * sum (bits - ratio * bytes)^2 / (sum bytes)^2."""
    bits, sizes = ([*values] for values in zip(*items, strict=True))
    part = Part("t", bits, sizes)
    ratio = sum(bits) / sum(sizes)
    squares = sum((one - ratio * size) ** 2 for one, size in items)
    n = len(items)
    if not part.is_right_or_wrong:
        error = math.sqrt(n / (n - 1) * squares) / sum(sizes)
        assert part.error == pytest.approx(error, abs=1e-12)
    assert part.score == pytest.approx(ratio)
    assert math.fsum(part.pulls) == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
def test_a_difference_on_the_same_items_is_that_of_paired_values(pairs):
    own, their = ([*values] for values in zip(*pairs, strict=True))
    found = minus(Part("t", own), Part("t", their))
    deltas = [a - b for a, b in pairs]
    mean = sum(deltas) / len(deltas)
    variance = sum((one - mean) ** 2 for one in deltas) / (len(deltas) - 1)
    assert found.value == pytest.approx(mean, abs=1e-12)
    assert found.error == pytest.approx(math.sqrt(variance / len(deltas)), abs=1e-9)


def test_the_mean_over_tasks_adds_their_variances():
    draw = random.Random(3)
    parts = [
        Part(f"t{i}", [float(draw.random() < 0.6) for _ in range(20)], baseline=i / 4)
        for i in range(3)
    ]
    (mean,) = evaluation(parts).headlines.values()
    assert mean.value == pytest.approx(sum(part.centered for part in parts) / 3)
    variance = sum((part.error / (1 - part.baseline)) ** 2 for part in parts) / 9
    assert mean.error == pytest.approx(math.sqrt(variance))
    assert mean.items == 60


def test_what_both_get_right_moves_no_difference_of_theirs():
    own = evaluation([Part("t", [1.0, 1.0, 0.0, 1.0], baseline=0.5), Part("u", [0.0, 1.0])])
    assert own.minus(own)["eval/core"].error == 0.0
    other = evaluation([Part("t", [1.0, 1.0, 0.0, 0.0], baseline=0.5), Part("u", [0.0, 1.0])])
    delta = own.minus(other)["eval/core"]
    assert delta.value == pytest.approx(0.25 / 0.5 / 2)
    alone = math.hypot(own.headlines["eval/core"].error, other.headlines["eval/core"].error)
    assert 0 < delta.error < alone
    assert not own.minus(evaluation(other.parts, bundle="another"))


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "0123456789abcdef")


def ended(**more) -> Result:
    return Result("0123456789abcdef", FINISHED, 1, 1, **more)


def test_evaluations_of_other_weights_say_nothing_of_a_run(record):
    parts = [Part("t", [1.0, 0.0])]
    write(record.folder, evaluation(parts))
    assert list(evaluations_of(record, ended(weights="w"))) == [evaluation(parts)]
    assert scores_of(record, ended(weights="w")) == {"eval/core": 0.5}
    assert scores_of(record, ended(weights="w", metrics={"eval/core": 0.4})) == {}
    assert scores_of(record, ended(weights="v", evaluated="w")) == {"eval/core": 0.5}
    assert scores_of(record, ended(weights="w", evaluated="v")) == {}


BROKEN = {
    "no parts": evaluation([]),
    "no items": evaluation([Part("t", [])]),
    "3 items and 2 sizes": evaluation([Part("t", [1.0] * 3, [1, 2])]),
    "of no size": evaluation([Part("t", [1.0], [0])]),
    "beyond all measure": evaluation([Part("t", [1e300])]),
    "the baseline 1.0": evaluation([Part("t", [1.0], baseline=1.0)]),
}


@pytest.mark.parametrize("flaw", BROKEN)
def test_what_no_evaluation_leaves_is_damaged(record, flaw):
    path = write(record.folder, BROKEN[flaw])
    with pytest.raises(UserError) as refusal:
        read(path)
    assert f"{path} is damaged" in str(refusal.value) and flaw in str(refusal.value)
    assert scores_of(record, ended(weights="w")) == {}
    assert path == path_of(record.folder, "core")
