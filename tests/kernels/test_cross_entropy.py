"""The in-place cross-entropy and the readout fused with it, against fp64 sums written out by hand."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ablab.kernels import linear_cross_entropy as fused
from ablab.kernels.cross_entropy import CAPS, Reading, cross_entropy_
from ablab.kernels.linear_cross_entropy import linear_cross_entropy, reference, serves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
examples = settings(max_examples=12)
objectives = st.fixed_dictionaries(
    {
        "multiplier": st.sampled_from([1.0, 0.25, 3.0]),
        "cap": st.sampled_from([2.0, 15.0]),
        "cap_form": st.sampled_from(CAPS),
        "z_weight": st.sampled_from([0.0, 1e-4, 0.5]),
    }
)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    targets: Tensor

    @property
    def logits(self):
        return self.x @ self.weight.T


class Outcome(NamedTuple):
    loss: Tensor
    nats: Tensor
    dx: Tensor
    dw: Tensor


def draw(rows, width, vocab, seed, dtype=torch.float32, spread=1.0):
    """Logits have a standard deviation of `spread`."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=draw)
    weight = torch.randn(vocab, width, generator=draw) * spread / width**0.5
    targets = torch.randint(vocab, (rows,), generator=draw)
    x = x.to(DEVICE, dtype)
    weight = weight.to(DEVICE, dtype)
    return Inputs(x, weight, targets.to(DEVICE))


def squashed_by_hand(x, cap, cap_form):
    """The soft cap and its slope."""
    if cap_form == "none":
        return x, np.ones_like(x)
    share = x / cap
    if cap_form == "tanh":
        return cap * np.tanh(share), np.cosh(share) ** -2
    return x / np.sqrt(1 + share**2), (1 + share**2) ** -1.5


def by_hand(logits, targets, multiplier=1.0, cap=0.0, cap_form="none", z_weight=0.0):
    """nats, lse, d(nats + z_weight lse^2)/dlogits in fp64."""
    x = multiplier * logits.detach().cpu().double().numpy()
    z, slope = squashed_by_hand(x, cap, cap_form)
    top = z.max(-1, keepdims=True)
    total = np.exp(z - top).sum(-1, keepdims=True)
    lse = np.log(total) + top
    odds = np.exp(z - lse)
    columns = np.arange(x.shape[1])
    hit = columns == targets.cpu().numpy()[:, None]
    pull = odds - hit + 2 * z_weight * lse * odds
    lse = lse[:, 0]
    nats = lse - (z * hit).sum(-1)
    return nats, lse, pull * slope * multiplier


def error(measured, expected):
    """Relative Frobenius error."""
    expected = torch.as_tensor(expected)
    difference = measured.detach().cpu().double() - expected
    return (difference.norm() / expected.norm()).item()


def gradients(function, inputs, upstream, **objective):
    """With `upstream` arriving as a 0-D tensor."""
    x = inputs.x.detach().clone().requires_grad_()
    weight = inputs.weight.detach().clone().requires_grad_()
    loss, nats = function(x, weight, inputs.targets, **objective)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=loss.device))
    return Outcome(loss, nats, x.grad, weight.grad)


def by_hand_through_the_readout(inputs, upstream, z_weight=0.0, **objective):
    x = inputs.x.detach().cpu().double()
    weight = inputs.weight.detach().cpu().double()
    logits = x @ weight.T
    nats, lse, g = by_hand(logits, inputs.targets, z_weight=z_weight, **objective)
    g = torch.from_numpy(g) * upstream
    loss = (nats + z_weight * lse**2).sum()
    return Outcome(loss, nats.sum(), g @ weight, g.T @ x)


def near(number, other):
    difference = abs(number.item() - other.item())
    return difference < 1e-5 * (1 + abs(other.item()))


def furthest(measured, expected):
    return np.abs(measured.double().cpu().numpy() - expected).max()


# ---- the row kernel ----


@examples
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(2, 300),
    block=st.sampled_from([64, 128, 512]),
    held=st.booleans(),
    objective=objectives,
    seed=st.integers(0, 99),
)
def test_rows_of_one_block_and_of_many_held_or_read_twice_equal_the_sums_by_hand(
    rows, vocab, block, held, objective, seed
):
    reading = Reading(held and objective["cap_form"] == "none", block, warps=1)
    inputs = draw(rows, 8, vocab, seed, spread=4.0)
    logits = inputs.logits
    wanted_nats, wanted_lse, gradient = by_hand(logits, inputs.targets, **objective)
    nats, lse = cross_entropy_(logits, inputs.targets, **objective, scale=0.5, reading=reading)
    assert nats.dtype == lse.dtype == torch.float32
    assert furthest(nats, wanted_nats) < 2e-5
    assert furthest(lse, wanted_lse) < 2e-5
    steepest = max(1, np.abs(gradient).max())
    assert furthest(logits, 0.5 * gradient) < 2e-6 * steepest


def test_without_a_gradient_the_logits_stay():
    inputs = draw(3, 8, 50, 0)
    logits = inputs.logits
    before = logits.clone()
    nats, _ = cross_entropy_(logits, inputs.targets, gradient=False)
    assert torch.equal(logits, before)
    assert nats.isfinite().all()


def padded(logits, value):
    """A [4, 64] of `value` with logits [4, 50] in its first columns."""
    buffer = torch.full((4, 64), value, device=DEVICE)
    buffer[:, :50] = logits
    return buffer


def test_only_the_vocabulary_of_a_padded_row_is_written():
    inputs = draw(4, 8, 50, 0)
    buffer = padded(inputs.logits, 7.0)
    cross_entropy_(buffer[:, :50], inputs.targets)
    assert (buffer[:, 50:] == 7).all()
    # Softmax minus one-hot adds to 0.
    assert buffer[:, :50].sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("held", [True, False], ids=["held", "read twice"])
@pytest.mark.parametrize("block", [16, 64])
def test_what_stands_in_the_padding_changes_nothing(block, held):
    inputs = draw(4, 8, 50, 0)
    buffer = padded(inputs.logits, float("nan"))
    there = buffer[:, :50]
    alone = there.clone()
    reading = Reading(held, block, 4)
    nats, lse = cross_entropy_(there, inputs.targets, padded=True, reading=reading)
    wanted_nats, wanted_lse = cross_entropy_(alone, inputs.targets)
    assert (nats - wanted_nats).abs().max() < 1e-5
    assert (lse - wanted_lse).abs().max() < 1e-5
    assert (there - alone).abs().max() < 1e-6


def test_targets_may_be_a_column_of_something():
    inputs = draw(4, 8, 50, 0)
    table = torch.stack((inputs.targets, torch.zeros_like(inputs.targets)), dim=1)
    by_column, _ = cross_entropy_(inputs.logits, table[:, 0])
    wanted, _ = cross_entropy_(inputs.logits, inputs.targets)
    assert torch.equal(by_column, wanted)


@pytest.mark.parametrize("block", [2, 128])
@pytest.mark.parametrize(
    ("form", "cap", "worst", "held"),
    [
        ("none", 0.0, 2e4, True),
        ("none", 0.0, 2e4, False),
        ("tanh", 15.0, 30.0, False),
        ("rational", 15.0, 30.0, False),
    ],
)
def test_huge_logits_lose_nothing(form, cap, worst, held, block):
    logits = torch.tensor([[1e4, 0.0, -1e4]] * 2, device=DEVICE)
    targets = torch.tensor([0, 2], device=DEVICE)
    reading = Reading(held, block, 4)
    nats, _ = cross_entropy_(logits, targets, cap=cap, cap_form=form, reading=reading)
    assert logits.isfinite().all()
    assert furthest(nats, np.array([0.0, worst])) < 1e-3


@pytest.mark.parametrize("held", [True, False], ids=["held", "read twice"])
def test_a_nan_logit_makes_its_row_nan_and_no_other(held):
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[1, 3] = float("nan")
    targets = torch.tensor([0, 0], device=DEVICE)
    nats, _ = cross_entropy_(logits, targets, reading=Reading(held, 128, 4))
    assert nats.isnan().tolist() == [False, True]


# ---- the readout and the loss as one ----


@examples
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 24),
    vocab=st.integers(2, 150),
    chunk=st.sampled_from([0, 1, 7, 16, 64]),
    objective=objectives,
    seed=st.integers(0, 99),
)
def test_loss_nats_and_both_gradients_equal_the_sums_by_hand(
    rows, width, vocab, chunk, objective, seed
):
    inputs = draw(rows, width, vocab, seed, spread=2.0)
    wanted = by_hand_through_the_readout(inputs, 0.3, **objective)
    found = gradients(linear_cross_entropy, inputs, 0.3, **objective, chunk=chunk)
    assert found.loss.dtype == found.nats.dtype == torch.float32
    assert not found.nats.requires_grad
    assert abs(found.loss.item() / wanted.loss - 1) < 1e-5
    assert near(found.nats, wanted.nats)
    assert error(found.dx, wanted.dx) < 1e-5
    assert error(found.dw, wanted.dw) < 1e-5
    with torch.no_grad():
        loss, nats = linear_cross_entropy(*inputs, **objective, chunk=chunk)
    assert near(loss, found.loss)
    assert near(nats, found.nats)


@examples
@given(objective=objectives, seed=st.integers(0, 99))
def test_the_reference_equals_the_sums_by_hand(objective, seed):
    single = draw(6, 8, 30, seed)
    inputs = Inputs(single.x.double(), single.weight.double(), single.targets)
    found = gradients(reference, inputs, 0.3, **objective)
    wanted = by_hand_through_the_readout(inputs, 0.3, **objective)
    for measured, expected in zip(found, wanted, strict=True):
        assert error(measured, expected) < 1e-12


@pytest.mark.parametrize("cap_form", CAPS)
@pytest.mark.parametrize("chunk", [0, 16])
def test_in_fp16_it_is_as_exact_as_plain_torch(chunk, cap_form):
    """Not in bf16: to that, the interpreter truncates where a GPU rounds."""
    inputs = draw(60, 32, 100, 3, torch.float16, spread=3.0)
    compare_with_plain_torch(inputs, chunk, cap_form, gradient=1e-2)


def compare_with_plain_torch(inputs, chunk, cap_form, gradient):
    """gradient: the largest error that one may have."""
    objective = {"multiplier": 0.5, "cap": 5.0, "cap_form": cap_form, "z_weight": 1e-3}
    truth = by_hand_through_the_readout(inputs, 1 / 37, **objective)
    ours = gradients(linear_cross_entropy, inputs, 1 / 37, **objective, chunk=chunk)
    plain = gradients(reference, inputs, 1 / 37, **objective, chunk=chunk)
    # One number each: no ratio of errors.
    assert error(ours.loss, truth.loss) < 1e-3
    assert error(ours.nats, truth.nats) < 1e-3
    allowed = min(1.1 * error(plain.dx, truth.dx), gradient)
    assert error(ours.dx, truth.dx) <= allowed
    allowed = min(1.1 * error(plain.dw, truth.dw), gradient)
    assert error(ours.dw, truth.dw) <= allowed
    assert ours.dx.dtype == inputs.x.dtype == ours.dw.dtype


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [0, 5])
def test_results_repeat_to_the_bit(chunk):
    inputs = draw(13, 16, 70, 1)
    first = gradients(linear_cross_entropy, inputs, 0.3, chunk=chunk)
    second = gradients(linear_cross_entropy, inputs, 0.3, chunk=chunk)
    assert same_bits(first, second)


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_frozen_activation_gets_no_gradient_and_the_weight_gets_its_own(chunk):
    inputs = draw(13, 16, 70, 1)
    wanted = gradients(linear_cross_entropy, inputs, 1.0, chunk=chunk)
    inputs.weight.requires_grad_()
    loss, _ = linear_cross_entropy(*inputs, chunk=chunk)
    loss.backward()
    assert torch.equal(inputs.weight.grad, wanted.dw)
    assert inputs.x.grad is None


@pytest.mark.parametrize("chunk", [0, 5])
def test_a_frozen_weight_gets_no_gradient_and_the_activations_get_their_own(chunk):
    inputs = draw(13, 16, 70, 1)
    wanted = gradients(linear_cross_entropy, inputs, 1.0, chunk=chunk)
    inputs.x.requires_grad_()
    loss, _ = linear_cross_entropy(*inputs, chunk=chunk)
    loss.backward()
    assert torch.equal(inputs.x.grad, wanted.dx)
    assert inputs.weight.grad is None


def test_no_rows_cost_nothing_and_pull_at_nothing():
    found = gradients(linear_cross_entropy, draw(0, 16, 70, 1), 1.0)
    assert found.loss == found.nats == 0
    assert found.dx.shape == (0, 16)
    assert not found.dw.any()


def test_no_chunked_step_holds_logits_of_all_rows(monkeypatch):
    sizes = []
    allocate = fused._padded

    def noted(rows, vocab, like):
        sizes.append(rows)
        return allocate(rows, vocab, like)

    monkeypatch.setattr(fused, "_padded", noted)
    x, weight, targets = draw(13, 8, 70, 1)
    loss, _ = linear_cross_entropy(x.requires_grad_(), weight, targets, chunk=4)
    assert sizes == [4]
    kept = [tuple(saved.shape) for saved in loss.grad_fn.saved_tensors]
    assert kept == [(13, 8), (70, 8)]


@pytest.mark.parametrize("chunk", [6, 4], ids=["whole", "chunked"])
def test_pytorch_finds_the_operator_with_gradients_registered_as_it_behaves(chunk):
    x, weight, targets = draw(6, 8, 70, 0)
    learned = (x.requires_grad_(), weight.requires_grad_())
    given_ = (*learned, targets, 0.5, 5.0, "tanh", 1e-3, chunk)
    torch.library.opcheck(fused._with_gradients, given_)


def test_pytorch_finds_the_operator_without_gradients_registered_as_it_behaves():
    inputs = draw(6, 8, 70, 0)
    torch.library.opcheck(fused._value, (*inputs, 0.5, 5.0, "tanh", 4))


@pytest.mark.parametrize(
    ("limit", "chunk"),
    [
        (13 * 70 * 4, 13),
        (13 * 70 * 4 - 1, 7),
        (5 * 70 * 4, 5),
        (1, 1),
    ],
)
def test_without_a_number_there_are_as_few_equal_chunks_as_the_limit_allows(
    monkeypatch, limit, chunk
):
    """limit: bytes of 13 rows of 70 logits in fp32."""
    asked = []

    def one_piece(rows, chunk):
        asked.append(chunk)
        return [slice(0, rows)]

    def whole(rows, vocab, like):
        return like.new_empty(13, vocab)

    monkeypatch.setattr(fused, "LOGITS", limit)
    monkeypatch.setattr(fused, "_chunks", one_piece)
    monkeypatch.setattr(fused, "_padded", whole)
    linear_cross_entropy(*draw(13, 8, 70, 1))
    assert asked == [chunk]


@pytest.mark.parametrize("chunk", [0, 4])
def test_compiled_as_one_graph_it_computes_the_same_bits(chunk):
    inputs = draw(6, 8, 70, 0)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    objective = {"multiplier": 0.5, "cap": 5.0, "cap_form": "rational", "z_weight": 1e-3}
    graph = gradients(compiled, inputs, 0.3, **objective, chunk=chunk)
    eager = gradients(linear_cross_entropy, inputs, 0.3, **objective, chunk=chunk)
    assert same_bits(graph, eager)


def test_serves_says_why_not():
    cuda = torch.device("cuda")
    cpu = torch.device("cpu")
    assert serves(torch.bfloat16, cuda) == ""
    assert serves(torch.float32, cuda, 15.0, "tanh") == ""
    assert "float64" in serves(torch.float64, cuda)
    assert "cpu" in serves(torch.float32, cpu)
    assert "'soft'" in serves(torch.float16, cuda, 1.0, "soft")
    assert "cap > 0" in serves(torch.float16, cuda, 0.0, "tanh")


# ---- on the GPU ----


def any_seed():
    return torch.seed() % 2**31


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("cap_form", CAPS)
    @pytest.mark.parametrize("chunk", [0, 128])
    @pytest.mark.parametrize("vocab", [1000, 32_000, 50_257])
    def test_in_bf16_it_is_as_exact_as_plain_torch(self, vocab, chunk, cap_form):
        inputs = draw(301, 256, vocab, any_seed(), torch.bfloat16, spread=3.0)
        compare_with_plain_torch(inputs, chunk, cap_form, gradient=1e-2)

    @pytest.mark.parametrize("chunk", [0, 300])
    def test_results_repeat_to_the_bit_and_compiled_ones_agree(self, chunk):
        inputs = draw(1111, 256, 32_000, any_seed(), torch.bfloat16)
        compiled = torch.compile(linear_cross_entropy, fullgraph=True)
        once = gradients(linear_cross_entropy, inputs, 0.3, chunk=chunk)
        again = gradients(linear_cross_entropy, inputs, 0.3, chunk=chunk)
        graph = gradients(compiled, inputs, 0.3, chunk=chunk)
        assert same_bits(once, again)
        for ours, eager in zip(graph, once, strict=True):
            assert error(ours, eager.detach().cpu().double()) < 5e-3

    def test_chunks_need_a_fraction_of_the_memory(self):
        """4,096 x 32,000 logits in bf16 are 250 MiB; 512 rows are 31, and dW in fp32 is 31 more."""
        inputs = draw(4096, 256, 32_000, 0, torch.bfloat16)
        peaks = []
        for chunk in (4096, 512):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients(linear_cross_entropy, inputs, 1.0, chunk=chunk)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[0] > 250 * 2**20
        assert peaks[1] < 0.7 * peaks[0]
