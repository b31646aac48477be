"""The readout fused with cross-entropy in 8-bit floats, against fp64 sums over the numbers as they were cast."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ablab.kernels import fp8, fp8_cross_entropy
from ablab.kernels import fp8_linear_cross_entropy as fused
from ablab.kernels.cross_entropy import CAPS, Reading, cross_entropy_
from ablab.kernels.fp8_cross_entropy import Objective, fp8_gradient, turned
from ablab.kernels.fp8_linear_cross_entropy import flaw, fp8_linear_cross_entropy, reference
from ablab.kernels.linear_cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a norm: a logit that differs by a rounding may move a few numbers to the next of their format.
FLIPS = 2e-3
PLAIN = Objective()
objectives = st.builds(
    Objective,
    multiplier=st.sampled_from([1.0, 0.3, 4.0]),
    cap=st.sampled_from([2.0, 15.0]),
    cap_form=st.sampled_from(CAPS),
    z_weight=st.sampled_from([0.0, 1e-4, 0.5]),
)
forms = st.sampled_from(sorted(fp8.DTYPES))


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    targets: Tensor


class Outcome(NamedTuple):
    loss: Tensor
    nats: Tensor
    dx: Tensor
    dw: Tensor


def drawn(rows, width, vocab, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=draw)
    weight = 2 * torch.randn(vocab, width, generator=draw) / width**0.5
    targets = torch.randint(vocab, (rows,), generator=draw)
    return Inputs(x.to(DEVICE, dtype), weight.to(DEVICE), targets.to(DEVICE))


def outcome(inputs, objective=PLAIN, upstream=1.0, **how):
    x = inputs.x.detach().clone().requires_grad_()
    weight = inputs.weight.detach().clone().requires_grad_()
    loss, nats = fp8_linear_cross_entropy(x, weight, inputs.targets, *objective, **how)
    loss.backward(torch.tensor(upstream, device=DEVICE))
    return Outcome(loss.detach(), nats, x.grad, weight.grad)


def by_hand(logits, targets, objective):
    """nats, logsumexp and dloss/dlogits in fp64."""
    x = objective.multiplier * logits.double()
    share = x / (objective.cap or 1.0)
    z, slope = {
        "none": (x, torch.ones_like(x)),
        "tanh": (objective.cap * share.tanh(), share.cosh() ** -2),
        "rational": (x * (1 + share**2) ** -0.5, (1 + share**2) ** -1.5),
    }[objective.cap_form]
    lse = z.exp().sum(-1).log()
    odds = (z - lse[:, None]).exp()
    hit = torch.arange(x.shape[1], device=x.device) == targets[:, None]
    pull = odds * (1 + 2 * objective.z_weight * lse[:, None]) - hit.double()
    return lse - z[hit], lse, pull * slope * objective.multiplier


def dequantised(x):
    numbers, scale = fp8.quantise(x, "e4m3")
    return numbers.double() * scale.double()


def error(measured, exact):
    """Relative to the norm."""
    return ((measured.double() - exact).norm() / exact.norm()).item()


# ---- the gradient in 8 bits ----


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(2, 200),
    block=st.sampled_from([128, 256]),
    held=st.booleans(),
    objective=objectives,
    form=forms,
    seed=st.integers(0, 99),
)
def test_the_gradient_is_the_one_by_hand_rounded_to_the_format(
    rows, vocab, block, held, objective, form, seed
):
    """A number within fp32 rounding of a tie may fall on either side."""
    x, weight, targets = drawn(rows, 4, vocab, seed)
    logits = 3 * x @ weight.T
    nats, lse, exact = by_hand(logits, targets, objective)
    before = logits.clone()
    reading = Reading(held and objective.cap_form == "none", block, 4)
    with pytest.MonkeyPatch.context() as patch:
        rows_by = partial(cross_entropy_, reading=reading)
        patch.setattr(fp8_cross_entropy, "cross_entropy_", rows_by)
        found = fp8_gradient(logits, targets, objective, form)
    assert torch.equal(logits, before)
    assert (found.nats - nats).abs().max() < 2e-5
    assert (found.lses - lse).abs().max() < 2e-5
    units = exact / objective.unit(form, vocab)
    near = 1e-5 * units.abs() + 1e-5 * units.abs().max()
    low = (units - near).to(fp8.DTYPES[form]).double()
    high = (units + near).to(fp8.DTYPES[form]).double()
    numbers = found.numbers.double()
    assert ((low <= numbers) & (numbers <= high)).all()
    assert torch.equal(turned(found.numbers).double(), numbers.T)


@pytest.mark.parametrize("shape", [(256, 384), (130, 40)], ids=str)
def test_every_byte_of_whole_tiles_and_of_parts_is_turned_round(shape):
    draw = torch.Generator(DEVICE).manual_seed(0)
    raw = torch.randint(256, shape, generator=draw, device=DEVICE).to(torch.uint8)
    found = turned(raw.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert found.is_contiguous() and torch.equal(found, raw.T)


@settings(deadline=None)
@given(
    objective=objectives,
    form=forms,
    spread=st.floats(0, 90),
    vocab=st.integers(2, 50),
    seed=st.integers(0, 99),
)
def test_no_gradient_is_beyond_the_largest_number_and_a_scale_half_as_large_would_let_one_be(
    objective, form, spread, vocab, seed
):
    draw = torch.Generator().manual_seed(seed)
    logits = spread / objective.multiplier * (2 * torch.rand(3, vocab, generator=draw) - 1)
    targets = torch.randint(vocab, (3,), generator=draw)
    _, _, g = by_hand(logits, targets, objective)
    largest = torch.finfo(fp8.DTYPES[form]).max
    unit = objective.unit(form, vocab)
    assert g.abs().max() / unit <= largest
    capped = objective.cap_form != "none"
    furthest = objective.cap + math.log(vocab) if capped else 100.0
    bound = objective.multiplier * (1 + 2 * objective.z_weight * furthest)
    assert bound / unit <= largest < 2 * bound / unit


# ---- the readout and the loss as one ----


@settings(max_examples=3, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.sampled_from([16, 48]),
    vocab=st.sampled_from([32, 144]),
    chunk=st.sampled_from([0, 16]),
    objective=objectives,
    form=forms,
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_the_numbers_as_they_were_cast(
    rows, width, vocab, chunk, objective, form, seed
):
    inputs = drawn(rows, width, vocab, seed)
    x8 = dequantised(inputs.x)
    w8 = dequantised(inputs.weight)
    logits = (x8 @ w8.T).float()
    nats, lse, g = by_hand(logits, inputs.targets, objective)
    g8 = fp8_gradient(logits, inputs.targets, objective, form).numbers.double()
    g8 *= objective.unit(form, vocab)
    found = outcome(inputs, objective, 0.3, gradient=form, chunk=chunk)
    assert error(found.nats, nats.sum()) < 1e-5
    loss = nats + objective.z_weight * lse**2
    assert error(found.loss, loss.sum()) < 1e-5
    assert error(found.dx, 0.3 * g8 @ w8) < FLIPS
    assert error(found.dw, 0.3 * g8.T @ x8) < FLIPS
    wide = outcome(inputs, objective, 0.3, gradient=form, chunk=chunk, weight_gradient="wide")
    assert torch.equal(wide.dx, found.dx)
    assert error(wide.dw, 0.3 * g.T @ inputs.x.double()) < 1e-5


@pytest.mark.parametrize("weight_gradient", ["fp8", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_equals_plain_torch_on_the_same_operands(dtype, weight_gradient):
    """In fp16 for bf16, to which the interpreter truncates."""
    inputs = drawn(48, 32, 96, 1, dtype)
    objective = Objective(0.5, 5.0, "tanh", 1e-3)
    found = outcome(inputs, objective, weight_gradient=weight_gradient)
    wanted = reference(*inputs, objective, weight_gradient=weight_gradient)
    assert error(found.nats, wanted.nats.sum().double()) < 1e-5
    assert error(found.dx, wanted.dx.double()) < FLIPS
    assert error(found.dw, wanted.dw.double()) < FLIPS
    assert (found.dx.dtype, found.dw.dtype) == (dtype, torch.float32)


def test_how_many_rows_are_in_memory_changes_no_scale():
    inputs = drawn(20, 32, 64, 0)
    inputs.x[3] *= 10
    whole = outcome(inputs)
    for chunk in (1, 16):
        found = outcome(inputs, chunk=chunk)
        assert error(found.loss, whole.loss.double()) < 1e-6
        assert error(found.dx, whole.dx.double()) < FLIPS
        assert error(found.dw, whole.dw.double()) < FLIPS


@pytest.mark.parametrize("weight_gradient", ["fp8", "wide"])
def test_results_repeat_to_the_bit(weight_gradient):
    inputs = drawn(19, 32, 64, 1)
    first = outcome(inputs, chunk=16, weight_gradient=weight_gradient)
    second = outcome(inputs, chunk=16, weight_gradient=weight_gradient)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_where_no_gradient_is_wanted_the_numbers_are_the_plain_ones():
    inputs = drawn(9, 32, 64, 2)
    with torch.no_grad():
        loss, nats = fp8_linear_cross_entropy(*inputs, z_weight=1e-3)
        wanted = linear_cross_entropy(*inputs, z_weight=1e-3)
    assert torch.equal(loss, wanted[0])
    assert torch.equal(nats, wanted[1])


def test_no_rows_pull_at_nothing():
    found = outcome(drawn(0, 16, 32, 0))
    assert found.loss == found.nats == 0
    assert not found.dw.any()


def test_what_is_not_finite_shows():
    inputs = drawn(20, 16, 32, 0)
    inputs.x[3, 4] = torch.nan
    assert outcome(inputs).loss.isnan()
    assert outcome(inputs).dw.isnan().any()


def test_the_matrix_units_get_what_they_ask_for(monkeypatch):
    inputs = drawn(37, 32, 64, 1)
    emulation = outcome(inputs, chunk=16)
    seen = []
    multiply = torch._scaled_mm

    def checked(a, b, **how):
        assert a.is_contiguous() and b.t().is_contiguous()
        assert all(side % 16 == 0 for side in (*a.shape, *b.shape))
        seen.append((a.dtype, how["use_fast_accum"]))
        return multiply(a, b, **how)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    monkeypatch.setattr(fp8, "multiplies", lambda device: True)
    found = outcome(inputs, chunk=16)
    piece = [(torch.float8_e4m3fn, True), *[(torch.float8_e5m2, False)] * 2]
    assert seen == 3 * piece
    assert all(error(a, b.double()) < FLIPS for a, b in zip(found, emulation, strict=True))


def test_of_the_logits_a_piece_is_in_memory_and_three_bytes_of_each(monkeypatch):
    """fp32 here: five."""
    held = []
    cast = fused.fp8_gradient

    def noted(logits, *rest, **how):
        held.append(len(logits))
        return cast(logits, *rest, **how)

    monkeypatch.setattr(fused, "fp8_gradient", noted)
    monkeypatch.setattr(fused, "LOGITS", 32 * 64 * 5)
    outcome(drawn(70, 32, 64, 0))
    assert held == [32, 32, 16]


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    x, weight, targets = drawn(6, 16, 32, 0)
    casts = (*fused._cast(x), *fused._cast(weight))
    learned = (x.requires_grad_(), weight.requires_grad_())
    objective = Objective(0.5, 5.0, "tanh", 1e-3)
    given_ = (*learned, targets, *casts, *objective, "e5m2", "fp8", 16)
    # Not test_schema: it compares inputs by a product, which torch does not have in 8 bits.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused._with_gradients, given_, test_utils=checks)


def test_a_side_that_is_no_multiple_of_16_is_named():
    assert flaw(32_000, 768) == ""
    said = "8-bit products need sides of multiples of 16, and the vocabulary is 50257"
    assert flaw(50_257, 768) == said
    assert "the width is 776" in flaw(32_000, 776)
