"""The SwiGLU kernel against fp64, in Triton's interpreter without a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import swiglu as kernel
from ablab.kernels.swiglu import reference, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(function, packed, dy):
    """Output and gradient."""
    packed = packed.detach().clone().requires_grad_()
    y = function(packed)
    (gradient,) = torch.autograd.grad(y, packed, dy.to(y.dtype))
    return y.detach(), gradient


def drawn(rows, width, dtype, seed=0, spread=3.0):
    """packed [*rows, 2 width], dy [*rows, width]."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    packed = torch.randn(*rows, 2 * width, generator=draw, device=DEVICE)
    dy = torch.randn(*rows, width, generator=draw, device=DEVICE)
    return spread * packed.to(dtype), spread * dy.to(dtype)


def errors(found, wanted):
    """Relative, of output and gradient."""
    pairs = zip(found, wanted, strict=True)
    return [float((x.double() - exact).norm() / exact.norm()) for x, exact in pairs]


def test_the_reference_is_silu_of_one_half_times_the_other():
    gates_then_ups = torch.tensor([[0.5, -2.0, 3.0, 4.0]], dtype=torch.float64)
    first = 0.5 / (1 + math.exp(-0.5)) * 3.0
    second = -2.0 / (1 + math.exp(2.0)) * 4.0
    (found,) = reference(gates_then_ups).tolist()
    assert found == pytest.approx([first, second], rel=1e-12)


@settings(max_examples=15)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    width=st.integers(1, 70),
    seed=st.integers(0, 9),
    block=st.sampled_from([16, 64, 128]),
)
def test_output_and_gradient_equal_fp64(rows, width, seed, block):
    packed, dy = drawn(rows, width, torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK", block)
        found = both(swiglu, packed, dy)
    wanted = both(reference, packed.double(), dy)
    assert max(errors(found, wanted)) < 1e-6


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_in_16_bits_it_errs_no_more_than_plain_torch(dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter truncates to bf16 where a GPU rounds")
    packed, dy = drawn((37,), 200, dtype)
    wanted = both(reference, packed.double(), dy)
    ours = errors(both(swiglu, packed, dy), wanted)
    theirs = errors(both(reference, packed, dy), wanted)
    assert ours[0] <= theirs[0]
    assert ours[1] <= theirs[1]


def test_huge_gates_give_no_nan():
    packed = torch.tensor([[1e4, -1e4, 2.0, 3.0]], device=DEVICE)
    y, gradient = both(swiglu, packed, torch.ones(1, 2, device=DEVICE))
    assert y.tolist() == [[2e4, 0.0]]
    assert gradient.isfinite().all()


def test_strided_inputs_are_served():
    packed, dy = drawn((6, 5), 8, torch.float32)
    turned = dy.transpose(0, 1)
    found = both(lambda x: swiglu(x.transpose(0, 1)), packed, turned)
    wanted = both(lambda x: reference(x.transpose(0, 1)), packed, turned)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_rows():
    packed, _ = drawn((6, 5), 8, torch.float32)
    assert swiglu(packed[:0]).shape == (0, 5, 8)


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    packed, _ = drawn((3,), 20, torch.float32)
    torch.library.opcheck(kernel._swiglu, (packed.requires_grad_(),))


def test_an_odd_width_is_refused():
    said = r"packed is torch.float32 \[2, 7\]; the SwiGLU kernel takes an even width"
    with pytest.raises(ValueError, match=said):
        swiglu(torch.zeros(2, 7, device=DEVICE))
