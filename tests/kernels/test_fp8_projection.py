"""A map in 8 bits whose operands are cast in both layouts, in Triton's interpreter without a GPU."""

from dataclasses import replace

import pytest
import torch

from ablab.kernels import fp8, fp8_cast
from ablab.kernels.fp8_projection import fp8_projection, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_format = pytest.mark.parametrize("form", ["e5m2", "e4m3"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small tensors have several, and parts of one."""
    for name in ("TILE", "PEAK"):
        tile = replace(getattr(fp8_cast, name), rows=32, columns=32, warps=4)
        monkeypatch.setattr(fp8_cast, name, tile)


def drawn(rows=40, k=48, n=80, dtype=torch.float32):
    """x, W and the gradient of y; tokens differ in their gradient's size by factors of e."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, device=DEVICE)

    g = normal(rows, n) * normal(rows, 1).exp()
    return normal(rows, k).to(dtype), normal(n, k), g.to(dtype)


def results(function, x, weight, g, form):
    """y, dx and dW."""
    x = x.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    y = function(x, weight, form)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


def error(ours, exact):
    """Relative to the norm."""
    true = exact.double()
    return ((ours.double() - true).norm() / true.norm()).item()


def dequantised(x, form):
    q, scale = fp8.quantise(x, form)
    return q.double() * scale.double()


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_three_products_are_those_of_the_dequantised_operands(form, dtype):
    """A quotient within fp32 rounding of a tie may fall on either side: one number in a thousand moves by 6 %."""
    x, weight, g = drawn(dtype=dtype)
    y, dx, dw = results(fp8_projection, x, weight, g, form)
    x8 = dequantised(x, "e4m3")
    w8 = dequantised(weight, "e4m3")
    g8 = dequantised(g, form)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    assert error(y, x8 @ w8.T) < 5e-3
    assert error(dx, g8 @ w8) < 5e-3
    assert error(dw, g8.T @ x8) < 5e-3


@each_format
def test_it_errs_as_a_map_does_that_casts_and_turns_apart(form):
    given_all = drawn(rows=64)
    x, weight, g = (one.double() for one in given_all)
    exact = [x @ weight.T, g @ weight, g.T @ x]
    found = results(fp8_projection, *given_all, form)
    theirs = results(reference, *given_all, form)
    for one, other, true in zip(found, theirs, exact, strict=True):
        assert error(one, true) < 1.05 * error(other, true)


@each_format
def test_leading_axes_and_strides_do_not_matter(form):
    x, weight, g = drawn()
    in_fours = (4, 10, -1)
    strided = x.t().contiguous().t()
    flat = results(fp8_projection, x, weight, g, form)
    folded = results(fp8_projection, x.view(in_fours), weight, g.view(in_fours), form)
    turned = results(fp8_projection, strided, weight, g, form)
    for one, other, third in zip(flat, folded, turned, strict=True):
        assert torch.equal(one, other.view(one.shape))
        assert torch.equal(one, third)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@each_format
def test_matrix_units_follow_the_emulation(form, monkeypatch):
    """Their short accumulators leave more than the rounding to bf16, 0.0017, where many tokens are summed."""
    given_all = drawn(rows=8 * 384, k=768, n=2304, dtype=torch.bfloat16)
    native = results(fp8_projection, *given_all, form)
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "multiplies", lambda device: False)
        emulation = results(fp8_projection, *given_all, form)
    for one, other in zip(native, emulation, strict=True):
        assert error(one, other) < 1e-2
