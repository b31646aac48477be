"""The SwiGLU kernel against fp64, in Triton's interpreter without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import swiglu as kernel
from ablab.kernels.swiglu import reference, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(function, packed, dy):
    packed = packed.detach().clone().requires_grad_()
    y = function(packed)
    return y.detach(), *torch.autograd.grad(y, packed, dy.to(y.dtype))


def drawn(shape, dtype, seed=0, spread=3.0):
    draw = torch.Generator(DEVICE).manual_seed(seed)
    return (
        spread * torch.randn(*shape[:-1], n, generator=draw, device=DEVICE).to(dtype)
        for n in (2 * shape[-1], shape[-1])
    )


def errors(found, wanted):
    return [
        ((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)
    ]


def test_the_reference_is_silu_of_one_half_times_the_other():
    x = torch.tensor([[0.5, -2.0, 3.0, 4.0]], dtype=torch.float64)
    wanted = [
        0.5 / (1 + torch.tensor(-0.5).double().exp()) * 3.0,
        -2.0 / (1 + torch.tensor(2.0).double().exp()) * 4.0,
    ]
    assert torch.allclose(reference(x), torch.stack(wanted)[None], rtol=1e-12)


@settings(max_examples=15)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    width=st.integers(1, 70),
    seed=st.integers(0, 9),
    block=st.sampled_from([16, 64, 128]),
)
def test_output_and_gradient_equal_fp64(rows, width, seed, block):
    packed, dy = drawn((*rows, width), torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK", block)
        found = both(swiglu, packed, dy)
    assert max(errors(found, both(reference, packed.double(), dy))) < 1e-6


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_in_16_bits_it_errs_no_more_than_plain_torch(dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter truncates to bf16 where a GPU rounds")
    packed, dy = drawn((37, 200), dtype)
    wanted = both(reference, packed.double(), dy)
    assert all(
        ours <= theirs
        for ours, theirs in zip(
            errors(both(swiglu, packed, dy), wanted),
            errors(both(reference, packed, dy), wanted),
            strict=True,
        )
    )


def test_huge_gates_give_no_nan():
    packed = torch.tensor([[1e4, -1e4, 2.0, 3.0]], device=DEVICE)
    assert both(swiglu, packed, torch.ones(1, 2, device=DEVICE))[0].tolist() == [[2e4, 0.0]]
    assert both(swiglu, packed, torch.ones(1, 2, device=DEVICE))[1].isfinite().all()


def test_strided_and_empty_inputs_are_served():
    packed, dy = drawn((6, 5, 8), torch.float32)
    for one, other in zip(
        both(lambda x: swiglu(x.transpose(0, 1)), packed, dy.transpose(0, 1)),
        both(lambda x: reference(x.transpose(0, 1)), packed, dy.transpose(0, 1)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert swiglu(packed[:0]).shape == (0, 5, 8)


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    packed, _ = drawn((3, 20), torch.float32)
    torch.library.opcheck(kernel._swiglu, (packed.requires_grad_(),))


def test_an_odd_width_is_refused():
    with pytest.raises(
        ValueError,
        match=r"packed is torch.float32 \[2, 7\]; the SwiGLU kernel takes an even width",
    ):
        swiglu(torch.zeros(2, 7, device=DEVICE))
