"""The feed-forward by quack-kernels: its algebra without them, its kernels on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from ablab import kernels
from ablab.kernels import swiglu_epilogue as kernel
from ablab.kernels.swiglu_epilogue import (
    alternating,
    feed_forward,
    one_after_the_other,
    refusal,
)

H100 = (9, 0)


def drawn(rows, width, hidden, device="cpu", dtype=torch.float32):
    """x, gate_up, down and dy."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape, size=1.0):
        return size * torch.randn(shape, generator=draw, device=device)

    x = normal(*rows, width).to(dtype)
    gate_up = normal(2 * hidden, width, size=width**-0.5)
    down = normal(width, hidden, size=hidden**-0.5)
    return x, gate_up, down, normal(*rows, width).to(dtype)


def results(function, x, gate_up, down, dy):
    """y, dx and the gradients of both weights."""
    leaves = [one.detach().clone().requires_grad_() for one in (x, gate_up, down)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def by_the_formula(x, gate_up, down):
    gate, up = F.linear(x, gate_up.to(x.dtype)).chunk(2, dim=-1)
    return F.linear(gate * torch.sigmoid(gate) * up, down.to(x.dtype))


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


class InTorch:
    """What kernels/swiglu_quack.py offers, without quack."""

    @staticmethod
    def product_then_swiglu(x, weight, packed, hidden):
        torch.mm(x, weight.t(), out=packed)
        hidden.copy_(F.silu(packed[:, ::2]) * packed[:, 1::2])

    @staticmethod
    def product_then_gradient(dy, weight, packed, gradient):
        gate, up = packed[:, ::2], packed[:, 1::2]
        share = gate.sigmoid()
        slope = share * (1 + gate * (1 - share))
        d_hidden = dy @ weight
        gradient[:, ::2] = d_hidden * up * slope
        gradient[:, 1::2] = d_hidden * gate * share


@pytest.fixture
def epilogues_in_torch(monkeypatch):
    monkeypatch.setattr(kernels, "swiglu_quack", InTorch, raising=False)


def test_the_feed_forward_and_its_gradients_are_those_of_the_formula(epilogues_in_torch):
    given = [one.double() for one in drawn((3, 5), 8, 16)]
    found = results(feed_forward, *given)
    for one, exact in zip(found, results(by_the_formula, *given), strict=True):
        assert one.shape == exact.shape
        assert torch.allclose(one, exact, rtol=1e-12, atol=1e-12)


def test_it_compiles_as_one_graph_to_the_same_bits(epilogues_in_torch):
    given = drawn((3, 5), 8, 16)
    whole = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    for one, other in zip(results(feed_forward, *given), results(whole, *given), strict=True):
        assert torch.equal(one, other)


def test_pytorch_finds_the_operators_registered_as_they_behave(epilogues_in_torch):
    x, gate_up, down, dy = drawn((6,), 8, 16)
    first = alternating(gate_up)
    packed, _ = kernel._product_then_swiglu(x, first)
    torch.library.opcheck(kernel._product_then_swiglu, (x, first))
    torch.library.opcheck(kernel._product_then_gradient, (dy, down, packed))


def test_weights_of_another_dtype_get_gradients_of_theirs(epilogues_in_torch):
    x, gate_up, down, dy = drawn((4,), 8, 16)
    found = results(feed_forward, x.double(), gate_up, down, dy.double())
    assert [one.dtype for one in found] == [torch.float64] * 2 + [torch.float32] * 2


def test_each_gate_stands_before_its_own_up_and_goes_back_to_its_place():
    gate = torch.arange(3.0)[:, None] * torch.ones(1, 2)
    weight = torch.cat((gate, gate + 10))
    mixed = alternating(weight)
    assert mixed[:, 0].tolist() == [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]
    assert torch.equal(one_after_the_other(mixed), weight)


@pytest.mark.parametrize(
    ("dtype", "sides", "capability", "said"),
    [
        ("bf16", (64, 128), H100, ""),
        (
            "bf16",
            (64, 128),
            (8, 0),
            "quack's tiles are chosen for GPUs of compute capability 9.0",
        ),
        (
            "bf16",
            (64, 128),
            None,
            "quack's tiles are chosen for GPUs of compute capability 9.0",
        ),
        ("fp32", (64, 128), H100, "dtype=fp32: its products take bf16"),
        (
            "bf16",
            (64, 100, 84),
            H100,
            "its products take sides in multiples of 8, and the feed-forward has 84",
        ),
    ],
    ids=str,
)
def test_what_they_do_not_serve_is_named(monkeypatch, dtype, sides, capability, said):
    monkeypatch.setattr(kernel, "LIBRARY", "msgspec")  # one that is installed
    assert refusal(dtype, sides, capability) == said


def test_a_library_that_stands_elsewhere_is_refused_for_it_would_refuse_our_epilogues(
    monkeypatch, tmp_path
):
    (tmp_path / "astray.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernel, "LIBRARY", "astray")
    assert refusal("bf16", (64, 128), H100).startswith("astray is not in site-packages")


# ---- on a GPU ----


@pytest.fixture
def on_an_h100():
    said = refusal("bf16", (64, 128), H100)
    if said:
        pytest.skip(said)
    if torch.cuda.get_device_capability() != H100:
        pytest.skip("the tiles are chosen for an H100 or H200")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(129,), (3, 250)], ids=str)
@pytest.mark.parametrize("width, hidden", [(64, 128), (768, 2048), (200, 264)])
def test_in_bf16_they_err_no_more_than_plain_torch(on_an_h100, rows, width, hidden):
    given = drawn(rows, width, hidden, "cuda", torch.bfloat16)
    exact = results(by_the_formula, *(one.double() for one in given))
    ours = results(feed_forward, *given)
    theirs = results(by_the_formula, *given)
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert error(one, true) <= 1.05 * error(other, true)


@pytest.mark.gpu
def test_one_row_is_served(on_an_h100):
    given = drawn((1,), 64, 128, "cuda", torch.bfloat16)
    exact = results(by_the_formula, *(one.double() for one in given))
    for one, true in zip(results(feed_forward, *given), exact, strict=True):
        assert error(one, true) < 0.015


@pytest.mark.gpu
def test_the_same_bits_come_again(on_an_h100):
    given = drawn((4096,), 768, 2048, "cuda", torch.bfloat16)
    once = results(feed_forward, *given)
    again = results(feed_forward, *given)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@pytest.mark.gpu
def test_compiled_and_in_a_recorded_graph_the_bits_are_the_same(on_an_h100):
    given = drawn((512,), 768, 2048, "cuda", torch.bfloat16)
    eager = results(feed_forward, *given)
    whole = results(torch.compile(feed_forward, fullgraph=True), *given)
    assert torch.equal(eager[0], whole[0])
    x, gate_up, down, _ = given
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = feed_forward(x, gate_up, down)
    graph.replay()
    assert torch.equal(y, eager[0])


@pytest.mark.gpu
def test_no_rows_give_no_rows(on_an_h100):
    given = drawn((0,), 64, 128, "cuda", torch.bfloat16)
    assert [tuple(one.shape) for one in results(feed_forward, *given)] == [
        (0, 64),
        (0, 64),
        (256, 64),
        (64, 128),
    ]
