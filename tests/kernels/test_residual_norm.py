"""The kernel of sums and their norms against fp64, in Triton's interpreter without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import residual_norm as kernel
from ablab.kernels.residual_norm import Tile, reference, residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def drawn(rows, width, dtype=torch.float32, seed=0):
    """x, y [*rows, width], gain [width]; upstream gradients of the sum and of its norm."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    many = torch.randn(4, *rows, width, generator=draw, device=DEVICE)
    x, y, of_total, of_normed = many.to(dtype)
    gain = 1 + 0.3 * torch.randn(width, generator=draw, device=DEVICE)
    return (3 * x, y, gain), (of_total, of_normed)


def answers(function, inputs, upstream, factor, wide=False):
    """The sum, its norm, and the gradients of x, y and gain."""
    own = [value.double() if wide else value for value in inputs]
    own = [value.detach().clone().requires_grad_() for value in own]
    factor = factor.double() if wide and factor is not None else factor
    results = function(*own, EPS, factor)
    given = [gradient.to(results[0].dtype) for gradient in upstream]
    gradients = torch.autograd.grad(results, own, given)
    return [value.detach() for value in (*results, *gradients)]


def errors(found, wanted):
    """Relative, one by one."""
    return [relative(one, exact) for one, exact in zip(found, wanted, strict=True)]


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def formula(x, y, gain, eps, factor):
    """Written apart from the reference: of one row at a time."""
    total = x + y
    roots = torch.stack([(row @ row / row.numel() + eps).sqrt() for row in total])
    scale = gain if factor is None else gain * factor
    return total, total / roots[:, None] * scale


@pytest.mark.parametrize("factor", [None, 0.7])
def test_the_reference_is_the_sum_and_its_root_mean_square_norm(factor):
    inputs, upstream = drawn((5,), 12)
    factor = None if factor is None else torch.tensor([factor], device=DEVICE)
    found = answers(reference, inputs, upstream, factor, wide=True)
    wanted = answers(formula, inputs, upstream, factor, wide=True)
    assert max(errors(found, wanted)) < 1e-12


@settings(max_examples=12)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    width=st.integers(1, 70),
    factor=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 9),
    at_once=st.sampled_from([1, 2, 4]),
    programs=st.sampled_from([1, 3, 16]),
)
def test_sum_norm_and_gradients_equal_fp64(rows, width, factor, seed, at_once, programs):
    inputs, upstream = drawn(rows, width, seed=seed)
    factor = None if factor is None else torch.tensor([factor], device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "FORWARD", Tile(at_once, 4))
        patch.setattr(kernel, "BACKWARD", Tile(at_once, 4))
        patch.setattr(kernel, "PROGRAMS", programs)
        found = answers(residual_norm, inputs, upstream, factor)
    wanted = answers(reference, inputs, upstream, factor, wide=True)
    assert max(errors(found, wanted)) < 2e-6


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_in_16_bits_it_errs_no_more_than_plain_torch(dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter truncates to bf16 where a GPU rounds")
    inputs, upstream = drawn((37,), 200, dtype)
    factor = torch.tensor([0.7], device=DEVICE)
    wanted = answers(reference, inputs, upstream, factor, wide=True)
    ours = errors(answers(residual_norm, inputs, upstream, factor), wanted)
    theirs = errors(answers(reference, inputs, upstream, factor), wanted)
    assert all(one <= 1.1 * other for one, other in zip(ours, theirs, strict=True))


def test_the_same_inputs_give_the_same_bits():
    inputs, upstream = drawn((40,), 48)
    one = answers(residual_norm, inputs, upstream, None)
    two = answers(residual_norm, inputs, upstream, None)
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


def test_strided_inputs_are_served():
    (x, y, gain), upstream = drawn((6, 5), 8)
    turned = (x.transpose(0, 1), y.transpose(0, 1), gain)
    upstream = [gradient.transpose(0, 1) for gradient in upstream]
    found = answers(residual_norm, turned, upstream, None)
    wanted = answers(reference, turned, upstream, None, wide=True)
    assert max(errors(found, wanted)) < 2e-6


def test_no_rows_give_no_rows():
    (x, y, gain), _ = drawn((6, 5), 8)
    total, normed = residual_norm(x[:0], y[:0], gain, EPS)
    assert total.shape == normed.shape == (0, 5, 8)


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    (x, y, gain), _ = drawn((3,), 20)
    given = [value.requires_grad_() for value in (x, y, gain)]
    torch.library.opcheck(kernel._residual_norm, (*given, EPS, None))


def test_what_it_does_not_take_is_named():
    (x, y, gain), _ = drawn((2,), 8)
    said = r"x and y are torch.float32 \[2, 8\] and torch.float32 \[1, 8\] beside 8 gains"
    with pytest.raises(ValueError, match=said):
        residual_norm(x, y[:1], gain, EPS)
