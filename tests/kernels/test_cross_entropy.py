"""The in-place cross-entropy and the readout fused with it, against fp64 sums written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import linear_cross_entropy as fused
from ablab.kernels.cross_entropy import CAPS, cross_entropy_
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


def draw(rows, width, vocab, seed, dtype=torch.float32, spread=1.0):
    """x, weight, targets; logits have a standard deviation of `spread`."""
    draw = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randn(rows, width, generator=draw),
        torch.randn(vocab, width, generator=draw) * spread / width**0.5,
    )
    targets = torch.randint(vocab, (rows,), generator=draw)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def by_hand(logits, targets, multiplier=1.0, cap=0.0, cap_form="none", z_weight=0.0):
    """nats, lse, d(nats + z_weight lse^2)/dlogits in fp64."""
    x = multiplier * logits.detach().cpu().double().numpy()
    z, slope = {
        "none": lambda: (x, np.ones_like(x)),
        "tanh": lambda: (cap * np.tanh(x / cap), np.cosh(x / cap) ** -2),
        "rational": lambda: (x / np.sqrt(1 + (x / cap) ** 2), (1 + (x / cap) ** 2) ** -1.5),
    }[cap_form]()
    lse = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    odds, hit = (
        np.exp(z - lse[:, None]),
        np.arange(x.shape[1]) == targets.cpu().numpy()[:, None],
    )
    gradient = (odds - hit + 2 * z_weight * lse[:, None] * odds) * slope * multiplier
    return lse - (z * hit).sum(-1), lse, gradient


def error(measured, expected):
    """Relative Frobenius error."""
    expected = torch.as_tensor(expected)
    return ((measured.detach().cpu().double() - expected).norm() / expected.norm()).item()


def gradients(function, inputs, upstream, **objective):
    """loss, nats, dx, dW, with `upstream` arriving as a 0-D tensor."""
    x, weight = (value.detach().clone().requires_grad_() for value in inputs[:2])
    loss, nats = function(x, weight, inputs[2], **objective)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=loss.device))
    return loss, nats, x.grad, weight.grad


def by_hand_through_the_readout(inputs, upstream, z_weight=0.0, **objective):
    x, weight = (value.detach().cpu().double() for value in inputs[:2])
    nats, lse, g = by_hand(x @ weight.T, inputs[2], z_weight=z_weight, **objective)
    g = torch.from_numpy(g) * upstream
    return (nats + z_weight * lse**2).sum(), nats.sum(), g @ weight, g.T @ x


# ---- the row kernel ----


@examples
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(2, 300),
    block=st.sampled_from([128, 512]),
    objective=objectives,
    seed=st.integers(0, 99),
)
def test_rows_of_one_block_and_of_many_both_equal_the_sums_by_hand(
    rows, vocab, block, objective, seed
):
    x, weight, targets = draw(rows, 8, vocab, seed, spread=4.0)
    logits = x @ weight.T
    nats, lse, gradient = by_hand(logits, targets, **objective)
    measured = cross_entropy_(logits, targets, **objective, scale=0.5, block=block)
    assert measured[0].dtype == measured[1].dtype == torch.float32
    assert (
        np.abs(measured[0].double().cpu().numpy() - nats).max() < 2e-5
        and np.abs(measured[1].double().cpu().numpy() - lse).max() < 2e-5
    )
    assert (logits.double().cpu() - 0.5 * torch.from_numpy(gradient)).abs().max() < 2e-6 * max(
        1, np.abs(gradient).max()
    )


def test_without_a_gradient_the_logits_stay():
    x, weight, targets = draw(3, 8, 50, 0)
    logits = x @ weight.T
    before = logits.clone()
    nats, _ = cross_entropy_(logits, targets, gradient=False)
    assert torch.equal(logits, before) and nats.isfinite().all()


def test_only_the_vocabulary_of_a_padded_row_is_written():
    x, weight, targets = draw(4, 8, 50, 0)
    buffer = torch.full((4, 64), 7.0, device=DEVICE)
    buffer[:, :50] = x @ weight.T
    cross_entropy_(buffer[:, :50], targets)
    assert (buffer[:, 50:] == 7).all() and buffer[:, :50].sum(
        -1
    ).abs().max() < 1e-6  # softmax minus one-hot adds to 0


def test_what_stands_in_the_padding_changes_nothing():
    x, weight, targets = draw(4, 8, 50, 0)
    for block in (16, 64):
        buffer = torch.full((4, 64), float("nan"), device=DEVICE)
        buffer[:, :50] = x @ weight.T
        logits = buffer[:, :50].clone()
        for ours, alone in zip(
            cross_entropy_(buffer[:, :50], targets, padded=True, block=block),
            cross_entropy_(logits, targets),
            strict=True,
        ):
            assert (ours - alone).abs().max() < 1e-5
        assert (buffer[:, :50] - logits).abs().max() < 1e-6


def test_targets_may_be_a_column_of_something():
    x, weight, targets = draw(4, 8, 50, 0)
    column = torch.stack((targets, torch.zeros_like(targets)), dim=1)[:, 0]
    assert torch.equal(
        cross_entropy_(x @ weight.T, column)[0], cross_entropy_(x @ weight.T, targets)[0]
    )


def test_huge_logits_lose_nothing():
    for form, cap, worst in (
        ("none", 0.0, 2e4),
        ("tanh", 15.0, 30.0),
        ("rational", 15.0, 30.0),
    ):
        for block in (2, 128):
            logits = torch.tensor([[1e4, 0.0, -1e4]] * 2, device=DEVICE)
            nats, _ = cross_entropy_(
                logits, torch.tensor([0, 2], device=DEVICE), cap=cap, cap_form=form, block=block
            )
            assert (
                logits.isfinite().all()
                and (nats.cpu() - torch.tensor([0.0, worst])).abs().max() < 1e-3
            )


def test_a_nan_logit_makes_its_row_nan_and_no_other():
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[1, 3] = float("nan")
    nats, _ = cross_entropy_(logits, torch.tensor([0, 0], device=DEVICE))
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
    loss, nats, dx, dw = by_hand_through_the_readout(inputs, 0.3, **objective)
    measured = gradients(linear_cross_entropy, inputs, 0.3, **objective, chunk=chunk)
    assert (
        measured[0].dtype == measured[1].dtype == torch.float32
        and not measured[1].requires_grad
    )
    assert abs(measured[0].item() / loss - 1) < 1e-5 and abs(
        measured[1].item() - nats
    ) < 1e-5 * (1 + nats)
    assert max(error(measured[2], dx), error(measured[3], dw)) < 1e-5
    with torch.no_grad():
        value = linear_cross_entropy(*inputs, **objective, chunk=chunk)
    assert all(
        abs(a.item() - b.item()) < 1e-5 * (1 + abs(b.item()))
        for a, b in zip(value, measured, strict=False)
    )


@examples
@given(objective=objectives, seed=st.integers(0, 99))
def test_the_reference_equals_the_sums_by_hand(objective, seed):
    inputs = [
        value.double() if value.is_floating_point() else value for value in draw(6, 8, 30, seed)
    ]
    for measured, expected in zip(
        gradients(reference, inputs, 0.3, **objective),
        by_hand_through_the_readout(inputs, 0.3, **objective),
        strict=True,
    ):
        assert error(measured, expected) < 1e-12


@pytest.mark.parametrize("cap_form", CAPS)
@pytest.mark.parametrize("chunk", [0, 16])
def test_in_fp16_it_is_as_exact_as_plain_torch(chunk, cap_form):
    """Not in bf16: to that, the interpreter truncates where a GPU rounds."""
    compare_with_plain_torch(
        draw(60, 32, 100, 3, torch.float16, spread=3.0), chunk, cap_form, gradient=1e-2
    )


def compare_with_plain_torch(inputs, chunk, cap_form, gradient):
    objective = {"multiplier": 0.5, "cap": 5.0, "cap_form": cap_form, "z_weight": 1e-3}
    expected = by_hand_through_the_readout(inputs, 1 / 37, **objective)
    ours, plain = (
        gradients(function, inputs, 1 / 37, **objective, chunk=chunk)
        for function in (linear_cross_entropy, reference)
    )
    assert (
        error(ours[0], expected[0]) < 1e-3 and error(ours[1], expected[1]) < 1e-3
    )  # one number each: no ratio of errors
    for name, truth, one, other in zip(
        ("dx", "dW"), expected[2:], ours[2:], plain[2:], strict=True
    ):
        assert error(one, truth) <= min(1.1 * error(other, truth), gradient), name
    assert ours[2].dtype == inputs[0].dtype == ours[3].dtype


@pytest.mark.parametrize("chunk", [0, 5])
def test_results_repeat_to_the_bit(chunk):
    inputs = draw(13, 16, 70, 1)
    for first, second in zip(
        *(gradients(linear_cross_entropy, inputs, 0.3, chunk=chunk) for _ in range(2)),
        strict=True,
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_frozen_input_gets_no_gradient_and_the_other_gets_its_own(frozen, chunk):
    x, weight, targets = draw(13, 16, 70, 1)
    _, _, dx, dw = gradients(linear_cross_entropy, (x, weight, targets), 1.0, chunk=chunk)
    (weight if frozen == "x" else x).requires_grad_()
    linear_cross_entropy(x, weight, targets, chunk=chunk)[0].backward()
    assert (
        torch.equal(weight.grad, dw) and x.grad is None
        if frozen == "x"
        else torch.equal(x.grad, dx) and weight.grad is None
    )


def test_no_rows_cost_nothing_and_pull_at_nothing():
    loss, nats, dx, dw = gradients(linear_cross_entropy, draw(0, 16, 70, 1), 1.0)
    assert loss == nats == 0 and dx.shape == (0, 16) and not dw.any()


def test_no_chunked_step_holds_logits_of_all_rows(monkeypatch):
    sizes, padded = [], fused._padded
    monkeypatch.setattr(
        fused,
        "_padded",
        lambda rows, vocab, like: sizes.append(rows) or padded(rows, vocab, like),
    )
    x, weight, targets = draw(13, 8, 70, 1)
    loss, _ = linear_cross_entropy(x.requires_grad_(), weight, targets, chunk=4)
    assert sizes == [4] and [tuple(saved.shape) for saved in loss.grad_fn.saved_tensors] == [
        (13, 8),
        (70, 8),
    ]


@pytest.mark.parametrize(
    ("operator", "chunk"),
    [(fused._value, 4), (fused._with_gradients, 6), (fused._with_gradients, 4)],
    ids=["value", "whole", "chunked"],
)
def test_pytorch_finds_the_operators_registered_as_they_behave(operator, chunk):
    x, weight, targets = draw(6, 8, 70, 0)
    trained = operator is not fused._value
    weights = (1e-3,) if trained else ()
    torch.library.opcheck(
        operator,
        (
            x.requires_grad_(trained),
            weight.requires_grad_(trained),
            targets,
            0.5,
            5.0,
            "tanh",
            *weights,
            chunk,
        ),
    )


def test_without_a_number_there_are_as_few_equal_chunks_as_the_limit_allows(monkeypatch):
    asked = []
    monkeypatch.setattr(
        fused, "_chunks", lambda rows, chunk: asked.append(chunk) or [slice(0, rows)]
    )
    for limit, chunk in ((13 * 70 * 4, 13), (13 * 70 * 4 - 1, 7), (5 * 70 * 4, 5), (1, 1)):
        monkeypatch.setattr(fused, "LOGITS", limit)
        monkeypatch.setattr(
            fused, "_padded", lambda rows, vocab, like: like.new_empty(13, vocab)
        )
        linear_cross_entropy(*draw(13, 8, 70, 1))
        assert asked.pop() == chunk


@pytest.mark.parametrize("chunk", [0, 4])
def test_compiled_as_one_graph_it_computes_the_same_bits(chunk):
    inputs = draw(6, 8, 70, 0)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    objective = {
        "multiplier": 0.5,
        "cap": 5.0,
        "cap_form": "rational",
        "z_weight": 1e-3,
        "chunk": chunk,
    }
    for one, other in zip(
        *(
            gradients(function, inputs, 0.3, **objective)
            for function in (compiled, linear_cross_entropy)
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_serves_says_why_not():
    cuda = torch.device("cuda")
    assert serves(torch.bfloat16, cuda) == serves(torch.float32, cuda, 15.0, "tanh") == ""
    assert "float64" in serves(torch.float64, cuda) and "cpu" in serves(
        torch.float32, torch.device("cpu")
    )
    assert "'soft'" in serves(torch.float16, cuda, 1.0, "soft") and "cap > 0" in serves(
        torch.float16, cuda, 0.0, "tanh"
    )


# ---- on the GPU ----


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("cap_form", CAPS)
    @pytest.mark.parametrize("chunk", [0, 128])
    @pytest.mark.parametrize("vocab", [1000, 32_000, 50_257])
    def test_in_bf16_it_is_as_exact_as_plain_torch(self, vocab, chunk, cap_form):
        inputs = draw(301, 256, vocab, torch.seed() % 2**31, torch.bfloat16, spread=3.0)
        compare_with_plain_torch(inputs, chunk, cap_form, gradient=1e-2)

    @pytest.mark.parametrize("chunk", [0, 300])
    def test_results_repeat_to_the_bit_and_compiled_ones_agree(self, chunk):
        inputs = draw(1111, 256, 32_000, torch.seed() % 2**31, torch.bfloat16)
        compiled = torch.compile(linear_cross_entropy, fullgraph=True)
        once, again, graph = (
            gradients(function, inputs, 0.3, chunk=chunk)
            for function in (linear_cross_entropy, linear_cross_entropy, compiled)
        )
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert all(
            error(a, b.detach().cpu().double()) < 5e-3 for a, b in zip(graph, once, strict=True)
        )

    def test_chunks_need_a_fraction_of_the_memory(self):
        """4,096 x 32,000 logits in bf16 are 250 MiB; 512 rows are 31, and dW in fp32 is 31 more."""
        inputs = draw(4096, 256, 32_000, 0, torch.bfloat16)
        peaks = []
        for chunk in (4096, 512):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients(linear_cross_entropy, inputs, 1.0, chunk=chunk)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[0] > 250 * 2**20 and peaks[1] < 0.7 * peaks[0]
