"""Both scorers give each continuation the likelihood of a forward of its own, whatever stands beside it."""

import math

import pytest
import torch

from ablab.core.interop.score import AblabScorer, Row, TransformersScorer
from ablab.core.interop.speaking import Speaker
from ablab.core.interop.text import Words

ROWS = [
    Row((3,), (4, 5)),
    Row((1, 2, 3, 4, 5, 6, 7), (8,)),
    Row((9, 9), (1, 2, 3, 4)),
    Row((5, 6, 7), ()),
]


class NoWords(Words):
    """Ids alone are scored here."""

    def __init__(self):
        self.end = 0


@pytest.fixture
def scorers(tiny, exported):
    """Ours and transformers', of one model."""
    ours, theirs = exported(tiny(["gating", "smear", "sandwich_norm"]))

    class NoTokenizer:
        bos_token_id = None
        eos_token_id = 0

    speaker = Speaker(ours, NoWords(), frozenset())
    return {
        "ablab": AblabScorer(speaker, batch=3),
        "transformers": TransformersScorer(theirs, NoTokenizer(), batch=3),
    }


def alone(model, row: Row) -> list[float]:
    """Nats of each scored token by the definition: one forward for each of them, in fp64 from the logits on."""
    nats = []
    for place, token in enumerate(row.scored):
        before = [*row.given, *row.scored[:place]]
        logits = model(torch.tensor([before]))[0, -1].double()
        nats.append((logits.logsumexp(-1) - logits[token]).item())
    return nats


@pytest.mark.parametrize("side", ["ablab", "transformers"])
def test_each_row_is_scored_as_if_it_were_alone(scorers, side):
    model = scorers["ablab"].model
    with torch.no_grad():
        found = scorers[side].scores(ROWS)
        for row, score in zip(ROWS, found, strict=True):
            assert score.nats == pytest.approx(alone(model, row), rel=1e-4)
            assert score.log_likelihood == pytest.approx(-math.fsum(score.nats))
    assert found[3].greedy and found[3].log_likelihood == 0


@pytest.mark.parametrize("side", ["ablab", "transformers"])
def test_what_the_model_would_write_is_greedy(scorers, side):
    model = scorers["ablab"].model
    row = [3, 4]
    with torch.no_grad():
        for _ in range(5):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    written = tuple(row[2:])
    another = (*written[:-1], (written[-1] + 1) % 64)
    rows = [Row((3, 4), written), Row((3, 4), another)]
    score, other = scorers[side].scores(rows)
    assert score.greedy
    assert other.likeliest == (True, True, True, True, False) and not other.greedy


@pytest.mark.parametrize("side", ["ablab", "transformers"])
def test_of_a_long_row_the_last_tokens_are_read(scorers, side):
    scorer = scorers[side]
    long = tuple(range(1, 31))
    cut, whole = scorer.scores([Row(long[-15:], (40, 41)), Row(long, (40, 41))])
    assert scorer.context == 16 and scorer.first == 0
    assert cut.nats == pytest.approx(whole.nats, rel=1e-5)


def test_nothing_given_and_too_much_to_score_are_refused(scorers, refused):
    scorer = scorers["ablab"]
    refused(lambda: scorer.scores([Row((), (1,))]), "needs a token that is given")
    refused(lambda: scorer.scores([Row((1,), (1,) * 17)]), "17 tokens to score exceed")
    refused(lambda: TransformersScorer.of("/nowhere/at all"), "transformers cannot load")
