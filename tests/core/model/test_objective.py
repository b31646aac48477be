"""Cross-entropy, penalties and bits per byte against fp64 sums and hand examples."""

import math

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.z_loss import ZLoss
from ablab.core.data.tokens import Tokens
from ablab.core.model.layers import StageModule
from ablab.core.model.objective import losses, token_losses
from ablab.core.train.evaluate import held_out_loss

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp64(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def fp64_losses(logits, targets):
    """-log softmax by its definition."""
    z = fp64(logits)
    odds = np.exp(z - z.max(-1, keepdims=True))
    odds /= odds.sum(-1, keepdims=True)
    chosen = np.take_along_axis(odds, targets.numpy()[..., None], -1)
    return -np.log(chosen[..., 0])


def one_hot(targets):
    return torch.nn.functional.one_hot(targets, 50)


def objective_of(*parts):
    """(logits, targets) -> (loss to descend, cross-entropy to report), by stages that read nothing but logits."""
    stages = [StageModule(part.build(where=None)) for part in parts]
    return lambda logits, targets: losses(logits, logits, targets, lambda x: x, stages)


@pytest.fixture
def case():
    """Logits [4,6,50] of size 3, targets [4,6]."""
    draw = torch.Generator().manual_seed(1)
    return 3 * randn(4, 6, 50), torch.randint(50, (4, 6), generator=draw)


def test_cross_entropy_is_minus_the_log_of_the_targets_probability(case):
    nats = token_losses(*case)
    assert nats.shape == (4, 6)
    assert np.abs(fp64(nats) - fp64_losses(*case)).max() < 1e-5


def test_bf16_logits_are_summed_in_fp32(case):
    """Rounding losses near 4 to bf16 would move each by up to 1/64."""
    logits, targets = case[0].bfloat16(), case[1]
    expected = fp64_losses(logits, targets)
    nats = token_losses(logits, targets)
    assert nats.dtype == torch.float32
    assert np.abs(fp64(nats) - expected).max() < 1e-5
    descend, report = objective_of(ZLoss(1e-4))(logits, targets)
    assert descend.dtype == report.dtype == torch.float32
    assert abs(report.item() / expected.sum() - 1) < 1e-6
    lse = np.log(np.exp(fp64(logits)).sum(-1))
    penalty = 1e-4 * (lse**2).sum()
    # a difference of fp32 numbers near 100
    assert abs((descend - report).item() / penalty - 1) < 1e-3


def test_huge_logits_lose_nothing():
    logits = torch.tensor([[1e4, 0.0, -1e4]] * 2)
    assert token_losses(logits, torch.tensor([0, 2])).tolist() == [0.0, 2e4]


def test_the_gradient_is_softmax_minus_one_hot(case):
    logits, targets = case[0].requires_grad_(), case[1]
    objective_of()(logits, targets)[0].backward()
    expected = logits.detach().double().softmax(-1) - one_hot(targets)
    assert (logits.grad - expected).abs().max() < 1e-6


def test_the_z_loss_gradient_is_two_lambda_lse_times_softmax(case):
    logits, targets = case[0].requires_grad_(), case[1]
    objective_of(ZLoss(0.3))(logits, targets)[0].backward()
    z = logits.detach().double()
    factor = 1 + 2 * 0.3 * z.logsumexp(-1, keepdim=True)
    expected = z.softmax(-1) * factor - one_hot(targets)
    assert (logits.grad - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_reported_cross_entropy_never_contains_a_penalty(case):
    half = ZLoss(0.5)
    cases = [(), (ZLoss(0.0),), (half,), (half, half)]
    found = [objective_of(*parts)(*case) for parts in cases]
    descends, reports = zip(*found, strict=True)
    assert all(torch.equal(report, reports[0]) for report in reports)
    assert not reports[0].requires_grad
    assert torch.equal(descends[0], descends[1])
    assert torch.equal(descends[0], reports[0])
    squares = case[0].double().logsumexp(-1).square().sum().item()
    once, twice = descends[2] - descends[0], descends[3] - descends[0]
    assert abs(once.item() / (0.5 * squares) - 1) < 1e-5
    assert abs(twice.item() / squares - 1) < 1e-5


# ---- held-out loss and bits per byte ----


def nats_by(logits_of):
    """tokens [rows,T+1] -> nats [rows,T], of a model that gives logits."""

    def nats(block):
        inputs, targets = block[:, :-1], block[:, 1:]
        return token_losses(logits_of(inputs), targets)

    return nats


class Rows:
    """Held-out rows of one source, all alike."""

    sources = ("the only one",)

    def __init__(self, row: torch.Tensor, count: int, sizes: torch.Tensor):
        self.row = row
        self.count = count
        self.token_bytes = sizes
        self.context = len(row) - 1

    def held_out_rows(self) -> int:
        return self.count

    def held_out_spans(self, rows: int):
        return (
            (0, first, min(rows, self.count - first)) for first in range(0, self.count, rows)
        )

    def held_out_batch(self, first: int, count: int) -> torch.Tensor:
        return self.row.expand(count, -1)


def scored(nats, sizes, rows=1) -> dict[str, float]:
    """Held-out metrics of one row whose i-th target costs nats[i] and stands for sizes[i] bytes."""
    vocab = len(nats) + 1
    tokens = Rows(torch.arange(vocab), 1, torch.tensor([7, *sizes]))
    target = -torch.tensor(nats, dtype=torch.float64)
    others = ((1 - target.exp()) / (vocab - 1)).log()
    logits = others[:, None].repeat(1, vocab)
    logits[torch.arange(len(nats)), torch.arange(1, vocab)] = target
    model = nats_by(lambda x: logits.expand(len(x), -1, -1))
    return held_out_loss(model, tokens, rows, CPU).scores


def test_bits_per_byte_hand_example():
    """Nats 8, 1, 1, 1 over 1, 5, 5, 5 bytes: 11 / (16 ln 2) = 0.9919.  Weighting nats by bytes would say 2.07."""
    for rows in (1, 4):
        scores = scored([8.0, 1.0, 1.0, 1.0], sizes=[1, 5, 5, 5], rows=rows)
        assert abs(scores["loss"] - 11 / 4) < 1e-6
        assert abs(scores["bits_per_byte"] - 0.9919) < 5e-5
        assert abs(scores["bits_per_byte"] - 11 / (16 * math.log(2))) < 1e-6


def test_special_tokens_count_in_neither_sum_of_bits_per_byte_but_in_the_loss():
    scores = scored([8.0, 1.0, 1.0, 1.0, 20.0], sizes=[1, 5, 5, 5, 0])
    assert abs(scores["bits_per_byte"] - 0.9919) < 5e-5
    assert abs(scores["loss"] - 31 / 5) < 1e-5


def test_bits_per_byte_of_the_same_text_does_not_depend_on_the_tokenizer():
    """A uniform byte model: 8 bits a byte, in tokens of one byte or of many."""
    for sizes in ([1] * 12, [3, 4, 5], [12]):
        nats = [size * math.log(256) for size in sizes]
        assert abs(scored(nats, sizes)["bits_per_byte"] - 8) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 4, 20, 64])
def test_held_out_metrics_count_every_row_once_however_they_are_batched(
    tiny, token_folder, rows
):
    """20 rows of 16: 3 leaves 2 over, 64 is padded by repetition.  Logits depend on the token, so every row differs."""
    tokens = Tokens(tiny(), token_folder)
    table = 2 * randn(64, 64)
    scores, every = held_out_loss(nats_by(lambda x: table[x]), tokens, rows, CPU)
    ids = np.fromfile(token_folder / "val.bin", "<u2").astype(np.int64)
    # Of the 24 windows of its 400 tokens, all but 5, 11, 17 and 23: 1.2 from one to the next, rounded down.
    starts = [16 * window for window in range(24) if window % 6 != 5]
    inputs = torch.from_numpy(np.concatenate([ids[start : start + 16] for start in starts]))
    targets = torch.from_numpy(
        np.concatenate([ids[start + 1 : start + 17] for start in starts])
    )
    nats = fp64_losses(table[inputs], targets)
    size = np.load(token_folder / "token_bytes.npy")[targets]
    text = size > 0
    assert not text.all()
    # the loss counts all tokens, bits per byte only those of text
    bits_per_byte = nats[text].sum() / math.log(2) / size.sum()
    assert abs(scores["loss"] - nats.mean()) < 1e-6
    assert abs(scores["bits_per_byte"] - bits_per_byte) < 1e-6
    assert every.shape == (20, 16)
    assert np.abs(every.flatten().double().numpy() / nats - 1).max() < 2**-10


def test_held_out_losses_are_summed_in_fp64():
    """A million losses near 4: sums in fp32 would lose the seventh digit, in bf16 the second."""
    length, rows = 50_001, 21
    row = torch.zeros(length + 1, dtype=torch.int64)
    tokens = Rows(row, rows, torch.ones(2, dtype=torch.int64))
    logits = torch.tensor([0.0, math.log(math.exp(4.000001) - 1)])
    zero = torch.zeros(1, dtype=torch.int64)
    one = token_losses(logits[None], zero).item()
    model = nats_by(lambda x: logits.expand(*x.shape, 2))
    scores, _ = held_out_loss(model, tokens, 3, CPU)
    assert abs(scores["loss"] - one) < 1e-10
    assert abs(scores["bits_per_byte"] - one / math.log(2)) < 1e-10
