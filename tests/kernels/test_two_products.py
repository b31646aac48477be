"""Two products of one input against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import two_products as kernel
from ablab.kernels.two_products import reference, two_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(rows, width, first, second, dtype=torch.float32, seed=0):
    """x and both matrices; upstream gradients of both products."""
    draw = torch.Generator(DEVICE).manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=draw, device=DEVICE).to(dtype)

    inputs = [random(*rows, width), random(first, width), random(second, width)]
    return inputs, [random(*rows, first), random(*rows, second)]


def answers(function, inputs, upstream, dtype):
    """Both products, and the gradients of what they multiply."""
    own = [value.detach().to(dtype, copy=True).requires_grad_() for value in inputs]
    results = function(*own)
    given = [gradient.to(dtype) for gradient in upstream]
    gradients = torch.autograd.grad(results, own, given)
    return [value.detach() for value in (*results, *gradients)]


def errors(found, wanted):
    return [relative(one, exact) for one, exact in zip(found, wanted, strict=True)]


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@settings(max_examples=10)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    width=st.integers(1, 20),
    first=st.integers(1, 20),
    second=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_products_and_gradients_equal_fp64(rows, width, first, second, seed):
    inputs, upstream = drawn(rows, width, first, second, seed=seed)
    found = answers(two_products, inputs, upstream, torch.float32)
    wanted = answers(reference, inputs, upstream, torch.float64)
    assert max(errors(found, wanted)) < 1e-5


def test_in_bf16_it_errs_no_more_than_two_plain_products():
    inputs, upstream = drawn((64,), 48, 96, 16, torch.bfloat16)
    wanted = answers(reference, inputs, upstream, torch.float64)
    ours = errors(answers(two_products, inputs, upstream, torch.bfloat16), wanted)
    theirs = errors(answers(reference, inputs, upstream, torch.bfloat16), wanted)
    assert all(one <= 1.01 * other for one, other in zip(ours, theirs, strict=True))


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    (x, first, second), _ = drawn((3,), 8, 5, 2)
    given = [value.requires_grad_() for value in (x, first, second)]
    torch.library.opcheck(kernel._two_products, given)


@pytest.mark.parametrize("rows", [(0,), (0, 3)])
def test_no_rows_give_no_rows(rows):
    (x, first, second), _ = drawn(rows, 4, 3, 2)
    y, z = two_products(x, first, second)
    assert y.shape == (*rows, 3) and z.shape == (*rows, 2)
