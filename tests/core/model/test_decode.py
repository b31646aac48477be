"""Which token comes next, and that a batch is many rows side by side."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.model.decode import Sampling, drawn, stream

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]])


def odds(**how) -> list[float]:
    sampling = Sampling(**how)
    return sampling.odds(LOGITS)[0].tolist()


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    expected = softmax([value / temperature for value in LOGITS[0].tolist()])
    assert odds(temperature=temperature) == pytest.approx(expected)


def test_at_temperature_0_the_likeliest_is_certain():
    assert odds(temperature=0.0) == [0, 1, 0, 0, 0]


def test_top_k_keeps_the_likeliest_so_many():
    kept = softmax([3.0, 2.0])
    assert odds(top_k=2) == pytest.approx([0, kept[0], kept[1], 0, 0])
    assert odds(top_k=9) == odds()


def test_top_p_keeps_the_fewest_that_reach_it():
    first, second = softmax([3.0, 2.0])
    shares = sorted(odds(), reverse=True)
    assert odds(top_p=shares[0]) == [0, 1, 0, 0, 0]
    assert odds(top_p=shares[0] + 1e-6) == pytest.approx([0, first, second, 0, 0])
    assert odds(top_p=0.0) == [0, 1, 0, 0, 0]
    assert odds(top_k=2, top_p=first + 1e-6) == pytest.approx([0, first, second, 0, 0])


@pytest.mark.parametrize("how", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5}])
def test_the_cuts_are_those_of_transformers(how):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    warped = process.TemperatureLogitsWarper(0.7)(None, logits)
    if "top_k" in how:
        warped = process.TopKLogitsWarper(how["top_k"])(None, warped)
    if "top_p" in how:
        warped = process.TopPLogitsWarper(how["top_p"])(None, warped)
    ours = Sampling(temperature=0.7, **how).odds(logits)
    torch.testing.assert_close(ours.float(), warped.softmax(-1), rtol=1e-5, atol=1e-7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SOME = st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(any)


@given(SOME, st.integers(0, 50))
def test_what_has_no_probability_is_never_drawn(weights, seed):
    row = torch.tensor([weights], dtype=torch.float64)
    (token,) = drawn(row / row.sum(), [seeded(seed)])
    assert weights[token] > 0


def test_tokens_are_drawn_as_often_as_their_probability_says():
    shares = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)
    draws = [seeded(3)]
    tokens = [drawn(shares, draws)[0] for _ in range(2000)]
    found = torch.tensor(tokens).bincount(minlength=4) / 2000
    # four standard deviations of a share of 2,000 draws are 0.045
    assert ((found - shares[0]).abs() < 0.045).all()
    assert found[1] == 0


@pytest.fixture
def model(tiny, build):
    return build(tiny(["smear", "value_residual"]), stirred=0.2)


def rows_of(model, prompts, count, **how) -> list[list[int]]:
    """What each row says."""
    steps = list(stream(model, prompts, count, **how))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]
GREEDY = Sampling(temperature=0.0)


def test_greedy_rows_take_the_argmax_of_the_full_forward(model):
    found = rows_of(model, PROMPTS, 6, sampling=GREEDY)
    for prompt, new in zip(PROMPTS, found, strict=True):
        row = list(prompt)
        for token in new:
            logits = model(torch.tensor([row]))
            assert token == logits[0, -1].argmax()
            row.append(token)
        assert len(new) == 6


def test_a_row_draws_the_same_beside_others_and_alone(model):
    together = rows_of(model, PROMPTS, 8, seed=5)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = rows_of(model, [prompt], 8, seed=5 + row)
        assert together[row] == alone


def test_a_row_is_over_after_its_end_and_the_others_go_on(model):
    free = rows_of(model, PROMPTS, 8, sampling=GREEDY)
    end = free[0][2]
    stopped = rows_of(model, PROMPTS, 8, sampling=GREEDY, ends=frozenset({end}))
    for whole, cut in zip(free, stopped, strict=True):
        until = whole.index(end) + 1 if end in whole else len(whole)
        assert cut == whole[:until]
    assert len(stopped[0]) <= 3


UNFIT = {
    "no prompt": ([], "a token at least"),
    "an empty one": ([[1], []], "a token at least"),
    "a long one": ([[1], [1] * 9], "9 \\+ 8 tokens"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_prompts_that_do_not_fit_are_refused(model, what):
    prompts, words = UNFIT[what]
    with pytest.raises(UserError, match=words):
        next(stream(model, prompts, 8))
