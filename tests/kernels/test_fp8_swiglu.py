"""The feed-forward in 8 bits against fp64 of the numbers as they were cast, in Triton's interpreter without a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import fp8, swiglu
from ablab.kernels import fp8_swiglu as kernel
from ablab.kernels.fp8_swiglu import bounds_of, fp8_swiglu, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [(form, weights) for form in ("e5m2", "e4m3") for weights in ("fp8", "wide")]
each_way = pytest.mark.parametrize(("form", "weights"), WAYS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small tensors have several, and parts of one."""
    for name in ("FORWARD", "BACKWARD", "PEAK"):
        monkeypatch.setattr(
            kernel, name, replace(getattr(kernel, name), rows=32, columns=32, warps=4)
        )


def drawn(rows=48, width=32, hidden=80, seed=0, dtype=torch.float32):
    """x, gate_up, down and dy; tokens differ in their gradient's size by factors of e."""
    draw = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, device=DEVICE)

    x = torch.nn.functional.rms_norm(normal(rows, width), (width,))
    gate_up = normal(2 * hidden, width) * width**-0.5
    down = normal(width, hidden) * hidden**-0.5
    dy = normal(rows, width) * normal(rows, 1).exp()
    return x.to(dtype), gate_up, down, dy.to(dtype)


def results(function, x, gate_up, down, dy):
    """y, dx and the gradients of both weights."""
    leaves = [one.detach().clone().requires_grad_() for one in (x, gate_up, down)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(ours, exact):
    """Relative to the norm."""
    true = exact.double()
    return ((ours.double() - true).norm() / true.norm()).item()


def plainly(x, gate_up, down):
    packed = torch.nn.functional.linear(x, gate_up)
    return torch.nn.functional.linear(swiglu.reference(packed), down)


def silus(packed, dh):
    """h, and the gradient of packed, in fp64."""
    wide = packed.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * up
    (gradient,) = torch.autograd.grad(h, wide, dh.double())
    return h.detach(), gradient


class Products:
    """As `fp8.emulated`; remembers what each operand stood for, and what came out."""

    def __init__(self):
        self.operands = []
        self.found = []

    def __call__(self, a, b, a_scale, b_scale, dtype, fast):
        pair = (a.double() * a_scale.double(), b.double() * b_scale.double())
        self.operands.append(pair)
        self.found.append(fp8.emulated(a, b, a_scale, b_scale, dtype, fast))
        return self.found[-1]


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_product_is_that_of_the_right_operands_as_they_were_cast(
    form, weights, dtype, monkeypatch
):
    """Half a step of rounding to 8 bits lies between an operand and what it stands for: 2.7 % of its norm, 5.3 %."""
    x, gate_up, down, dy = drawn(dtype=dtype)
    products = Products()
    monkeypatch.setattr(fp8, "product_of", lambda *matrices: products)

    def ours(*leaves):
        return fp8_swiglu(*leaves, form, weights)

    y, dx, d_gate_up, d_down = results(ours, x, gate_up, down, dy)
    packed, _, dh = products.found[:3]
    h, dp = silus(packed, dh)
    wanted = [(x, gate_up), (h, down), (dy, down.t()), (dp, gate_up.t())]
    if weights == "fp8":
        wanted += [(dp.t(), x.t()), (dy.t(), h.t())]
    e4m3, of_gradients = 0.03, {"e4m3": 0.03, "e5m2": 0.06}[form]
    for place, (cast, meant) in enumerate(zip(products.operands, wanted, strict=True)):
        backward = place >= 2
        assert error(cast[0], meant[0]) < (of_gradients if backward else e4m3)
        assert error(cast[1], meant[1]) < e4m3
    exact = [a @ b.t() for a, b in products.operands]
    if weights == "wide":
        exact += [dp.t() @ x.double(), dy.double().t() @ h]
    near = 1e-6 if dtype == torch.float32 else 2.0**-10  # rounded once
    rounded_too = 1e-6 if dtype == torch.float32 else 2.0**-9  # h and dp were
    assert error(y, exact[1]) < near
    assert error(dx, exact[3]) < near
    assert error(d_gate_up, exact[4]) < (1e-6 if weights == "fp8" else rounded_too)
    assert error(d_down, exact[5]) < (1e-6 if weights == "fp8" else rounded_too)
    assert d_gate_up.dtype == d_down.dtype == torch.float32


@each_way
def test_it_errs_no_more_than_its_maps_do_with_scales_of_their_own(form, weights):
    def ours(*leaves):
        return fp8_swiglu(*leaves, form, weights)

    def apart(*leaves):
        return reference(*leaves, form, weights)

    given_all = drawn(rows=64, width=48, hidden=64)
    found = results(ours, *given_all)
    theirs = results(apart, *given_all)
    exact = results(plainly, *(one.double() for one in given_all))
    for one, other, true in zip(found, theirs, exact, strict=True):
        assert error(one, true) < 1.1 * error(other, true)


@pytest.mark.parametrize("weights", ["fp8", "wide"])
def test_by_a_bound_on_the_rows_that_is_known_beforehand_it_errs_as_by_a_measured_one(weights):
    """Rows of a norm are sqrt(W) times the largest gain at most; gains differ by factors of e."""
    x, *others = drawn(rows=192, width=96, hidden=160)
    gains = torch.linspace(-1.5, 1.5, 96, device=DEVICE).exp()
    given_all = (gains * x, *others)
    bound = 1.01 * 96**0.5 * gains.amax()

    def ours(*leaves):
        return fp8_swiglu(*leaves, weight_gradient=weights, longest=bound)

    def by_measure(*leaves):
        return fp8_swiglu(*leaves, weight_gradient=weights)

    found = results(ours, *given_all)
    theirs = results(by_measure, *given_all)
    exact = results(plainly, *(one.double() for one in given_all))
    for one, other, true in zip(found, theirs, exact, strict=True):
        assert not torch.equal(one, other)
        assert error(one, true) < 1.1 * error(other, true)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**20), spread=st.floats(0, 2))
def test_no_hidden_number_and_no_gradient_exceeds_its_bound(seed, spread):
    """Bounds of the exact operands; by the factors beyond they hold for those that were rounded to 8 bits."""
    x, gate_up, down, dy = (one.double() for one in drawn(seed=seed))
    gate_up = gate_up * (spread * gate_up[:, :1]).exp()
    bounds = bounds_of(x, gate_up, down)
    h, dp = silus(x @ gate_up.t(), dy @ down)
    assert h.abs().amax() * kernel.PRODUCT**2 <= bounds.hidden
    beyond = kernel.PRODUCT * kernel.BACK_PRODUCT
    assert dp.abs().amax() * beyond <= bounds.gradient * dy.abs().amax()


def test_where_rows_lie_along_the_weights_the_bounds_are_reached():
    """Then Cauchy and Schwarz are equal, silu(20) is 20, and silu'(2.4) is at its largest."""
    x = torch.full((1, 4), 2.0, dtype=torch.float64)
    up = torch.full((1, 4), 2.5, dtype=torch.float64)  # u = 20
    down = torch.ones(4, 1, dtype=torch.float64)
    dy = torch.ones(1, 4, dtype=torch.float64)
    for gate, place in ((up, "hidden"), (0.12 * up, "gradient")):
        gate_up = torch.cat((gate, up))
        found = dict(
            zip(("hidden", "gradient"), silus(x @ gate_up.t(), dy @ down), strict=True)
        )
        bound = getattr(bounds_of(x, gate_up, down), place).item()
        beyond = (
            kernel.PRODUCT * {"hidden": kernel.PRODUCT, "gradient": kernel.BACK_PRODUCT}[place]
        )
        assert found[place].abs().amax().item() * beyond == pytest.approx(bound, rel=1e-3)


@each_way
def test_tiny_gradients_keep_their_precision_and_zeros_give_zeros(form, weights):
    def ours(*leaves):
        return fp8_swiglu(*leaves, form, weights)

    x, gate_up, down, dy = drawn()
    plain = results(ours, x, gate_up, down, dy)
    small = results(ours, x, gate_up, down, 1e-20 * dy)
    for one, other in zip(small[1:], plain[1:], strict=True):
        assert error(1e20 * one, other) < 0.01
    nothing = results(ours, x, gate_up, 0 * down, dy)
    assert [bool(one.any()) for one in nothing] == [False, False, False, True]


@each_way
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_shows(form, weights, which):
    def ours(*leaves):
        return fp8_swiglu(*leaves, form, weights)

    for bad in (torch.inf, torch.nan):
        tensors = list(drawn(rows=16, width=16, hidden=16))
        tensors[which][3, 4] = bad
        y, *gradients = results(ours, *tensors)
        assert y.isfinite().all() == (which == 3)
        reads_no_down = which == 2  # dB = dy^T h
        finite = [bool(one.isfinite().all()) for one in gradients]
        assert finite == [False, False, reads_no_down]


@each_way
def test_leading_axes_do_not_matter_nor_strides_and_the_bits_repeat(form, weights):
    """But for a sum of squares in another order."""

    def ours(*leaves):
        return fp8_swiglu(*leaves, form, weights)

    x, gate_up, down, dy = drawn()
    flat = results(ours, x, gate_up, down, dy)
    folded = results(ours, x.view(4, 12, -1), gate_up, down, dy.view(4, 12, -1))
    turned = results(ours, x.t().contiguous().t(), gate_up, down, dy.t().contiguous().t())
    assert folded[0].shape == folded[1].shape == (4, 12, 32)
    for one, other, third in zip(flat, folded, turned, strict=True):
        assert torch.equal(one, other.view(one.shape))
        assert error(one, third) < 0.01


def test_pytorch_finds_the_operators_registered_as_they_behave():
    packed = drawn(rows=5, hidden=4)[0][:, :8].contiguous()
    dh = packed[:, :4].contiguous()
    scale = torch.ones((), device=DEVICE)
    for operator, given_all in {
        kernel._swiglu: (packed, scale),
        kernel._swiglu_rows: (packed, scale),
        kernel._gradient_peaks: (packed, dh),
        kernel._swiglu_backward: (packed, dh, scale, "e5m2"),
        kernel._swiglu_backward_wide: (packed, dh, scale, "e5m2"),
    }.items():
        torch.library.opcheck(
            operator, given_all, test_utils=("test_schema", "test_faketensor")
        )


def test_another_dtype_is_refused():
    x, gate_up, down, _ = drawn()
    with pytest.raises(ValueError, match=r"x is torch.float64; the SwiGLU kernel takes"):
        fp8_swiglu(x.double(), gate_up, down)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@each_way
def test_matrix_units_follow_the_emulation(form, weights, monkeypatch):
    """Other roundings of bf16 flip those to 8 bits."""

    def ours(*leaves):
        return fp8_swiglu(*leaves, form, weights)

    given_all = drawn(rows=8 * 384, width=768, hidden=2048, dtype=torch.bfloat16)
    native = results(ours, *given_all)
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "multiplies", lambda device: False)
        emulation = results(ours, *given_all)
    exact = results(plainly, *(one.double() for one in given_all))
    for one, other, true in zip(native, emulation, exact, strict=True):
        assert error(one, other) < 0.02
        assert error(one, true) < 1.1 * error(other, true)
