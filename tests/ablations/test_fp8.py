"""Products in 8-bit floats: the numbers of a formula in fp64, in the chosen maps alone, in training alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.ablations.interventions.fp8 import FP8
from ablab.core.errors import UserError
from ablab.core.language.declare import linear
from ablab.core.model.layers import LinearMap, plain_product
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.plan import plan_of
from ablab.core.recipe.load import assign
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer
from ablab.kernels import fp8

# Bits after the point, exponent of the smallest normal number, largest.
FORMATS = {
    "e4m3": (3, -6, 448.0),
    "e5m2": (2, -14, 57344.0),
}
every_format = pytest.mark.parametrize("form", FORMATS)


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def rounded(x, form):
    """fp64 -> the nearest number of the format, ties to the even one; below the smallest normal one steps are equal."""
    bits, lowest, largest = FORMATS[form]
    magnitude = np.maximum(np.abs(x), 1e-300)
    exponent = np.maximum(np.floor(np.log2(magnitude)), lowest)
    step = 2.0 ** (exponent - bits)
    return np.clip(np.rint(x / step) * step, -largest, largest)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dequantised(x, form):
    q, scale = fp8.quantise(x, form)
    return q.double() * scale.double()


def error(ours, exact):
    """Relative to the norm."""
    true = exact.double()
    return ((ours.double() - true).norm() / true.norm()).item()


def products(x, weight, g, gradient="e5m2", linear=fp8.fp8_linear):
    """y, dx and dW for the gradient g of y."""
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    y = linear(x, weight, gradient)
    y.backward(g)
    return y.detach(), x.grad, weight.grad


# ---- the numbers ----


@every_format
@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), spread=st.floats(0, 12), size=st.integers(-60, 60))
def test_quantised_numbers_are_those_of_the_formula_in_fp64(form, seed, spread, size):
    """Magnitudes from the largest down through the subnormal numbers to 0.

    A quotient within fp32 rounding of a tie may fall on either side.
    """
    exponent = size - spread * drawn(500, seed=seed + 1).abs()
    x = drawn(500, seed=seed) * 2.0**exponent
    q, scale = fp8.quantise(x, form)
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    assert q.dtype == fp8.DTYPES[form]
    _, _, largest = FORMATS[form]
    exact = fp64(x)
    quotient = exact / (np.abs(exact).max() / largest)
    low = rounded(quotient * (1 - 3e-7), form)
    high = rounded(quotient * (1 + 3e-7), form)
    got = fp64(q)
    assert ((got == low) | (got == high)).all()
    assert (low != high).mean() < 0.01
    assert np.abs(got).max() == largest


def test_hand_examples_round_as_the_formats_say():
    """The largest number is the first, so the scale is 1.

    Ties go to the even neighbour, 17 to 16, 19 to 20; 2^-10 is half of e4m3's smallest.
    """
    examples = [448.0, 17.0, 19.0, 18.1, -3.3, 2.0**-9, 2.0**-10, 1.6 * 2.0**-10]
    q, scale = fp8.quantise(torch.tensor(examples), "e4m3")
    assert scale.item() == 1
    assert q.tolist() == [448, 16, 20, 18, -3.25, 2.0**-9, 0, 2.0**-9]
    q, scale = fp8.quantise(
        torch.tensor([57344.0, 9.0, 11.0, -3.3, 2.0**-16, 2.0**-17]), "e5m2"
    )
    assert scale.item() == 1
    assert q.tolist() == [57344, 8, 12, -3.5, 2.0**-16, 0]


@pytest.mark.parametrize("gradient", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (24, 32, 48),
        (7, 5, 3),
        (1, 17, 31),
    ],
)
def test_the_three_products_are_those_of_the_dequantised_operands(shape, dtype, gradient):
    rows, k, n = shape
    x = drawn(rows, k, dtype=dtype)
    weight = drawn(n, k, seed=1)
    g = drawn(rows, n, seed=2, dtype=dtype)
    y, dx, dw = products(x, weight, g, gradient)
    x8 = dequantised(x, "e4m3")
    w8 = dequantised(weight, "e4m3")
    g8 = dequantised(g, gradient)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    near = 1e-6 if dtype == torch.float32 else 2.0**-8  # rounded once
    assert error(y, x8 @ w8.T) < near
    assert error(dx, g8 @ w8) < near
    assert error(dw, g8.T @ x8) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_gradient_of_the_weights_is_of_the_numbers_before_they_were_cast(dtype):
    x = drawn(24, 32, dtype=dtype)
    weight = drawn(48, 32, seed=1)
    g = drawn(24, 48, seed=2, dtype=dtype)
    narrow = products(x, weight, g)

    def wide_linear(x, weight, gradient):
        return fp8.fp8_linear(x, weight, gradient, "wide")

    y, dx, dw = products(x, weight, g, linear=wide_linear)
    assert torch.equal(y, narrow[0]) and torch.equal(dx, narrow[1])
    assert dw.dtype == torch.float32
    near = 1e-6 if dtype == torch.float32 else 2.0**-8  # rounded once
    assert error(dw, g.double().T @ x.double()) < near < error(narrow[2], dw)


def test_against_exact_products_the_error_is_that_of_three_bits_and_of_two():
    """Of gaussians, relative to the norm: 2.6 % an operand in e4m3, twice that in e5m2; squares add."""
    x = drawn(256, 256)
    weight = drawn(256, 256, seed=1)
    g = drawn(256, 256, seed=2)
    exact = (
        x.double() @ weight.double().T,
        g.double() @ weight.double(),
        g.double().T @ x.double(),
    )
    for gradient, ranges in {
        "e5m2": [
            (0.03, 0.045),
            (0.05, 0.07),
            (0.05, 0.07),
        ],
        "e4m3": [(0.03, 0.045)] * 3,
    }.items():
        for ours, true, (low, high) in zip(
            products(x, weight, g, gradient), exact, ranges, strict=True
        ):
            assert low < error(ours, true) < high


@pytest.mark.parametrize("which", range(3))
def test_zeros_give_zeros_and_what_is_not_finite_shows(which):
    tensors = [drawn(16, 16, seed=seed) for seed in range(3)]
    tensors[which] = torch.zeros(16, 16)
    # y reads x and W; dx reads W and g; dW reads x and g.
    read_by = ((0, 2), (0, 1), (1, 2))[which]
    assert all(
        value.isfinite().all() and value.any() == (i not in read_by)
        for i, value in enumerate(products(*tensors))
    )
    for bad in (torch.inf, torch.nan):
        tensors[which][3, 4] = bad
        assert all(
            value.isnan().any() == (i in read_by) for i, value in enumerate(products(*tensors))
        )


def test_tiny_numbers_keep_their_precision():
    """Gradients of a mean over many tokens: 1e-20 is quantised as 1 is."""
    x = drawn(32, 32)
    weight = drawn(32, 32, seed=1)
    g = drawn(32, 32, seed=2)
    small = products(x, weight, 1e-20 * g)
    plain = products(x, weight, g)
    for ours, theirs in zip(small[1:], plain[1:], strict=True):
        assert error(1e20 * ours, theirs) < 0.01


def test_leading_axes_and_strides_do_not_matter():
    x = drawn(4, 6, 32)
    weight = drawn(48, 32, seed=1)
    g = drawn(4, 6, 48, seed=2)
    y, dx, dw = products(x, weight, g)
    flat = products(x.flatten(0, 1), weight, g.flatten(0, 1))
    assert torch.equal(y, flat[0].view(4, 6, 48))
    assert torch.equal(dx, flat[1].view(4, 6, 32))
    assert torch.equal(dw, flat[2])
    turned = products(
        x.transpose(0, 2).contiguous().transpose(0, 2),
        weight.t().contiguous().t(),
        g.transpose(0, 2).contiguous().transpose(0, 2),
    )
    assert all(
        error(ours, theirs) < 1e-6 for ours, theirs in zip(turned, (y, dx, dw), strict=True)
    )


# ---- matrix units ----


@pytest.fixture
def units(monkeypatch):
    """The path of the matrix units on any device; each call is checked against what a GPU asks of it.

    Returns the formats seen.
    """
    seen = []
    multiply = torch._scaled_mm

    def checked(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert all(side % 16 == 0 for side in (*a.shape, *b.shape))
        assert (scale_a.dtype, scale_a.shape, scale_b.dtype, scale_b.shape) == (
            torch.float32,
            (),
            torch.float32,
            (),
        )
        seen.append((a.dtype, b.dtype, out_dtype, use_fast_accum))
        return multiply(
            a,
            b,
            scale_a=scale_a,
            scale_b=scale_b,
            out_dtype=out_dtype,
            use_fast_accum=use_fast_accum,
        )

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    monkeypatch.setattr(fp8, "multiplies", lambda device: True)
    return seen


@pytest.mark.parametrize("gradient", FORMATS)
def test_the_path_of_the_matrix_units_gets_the_layouts_that_it_asks_for_and_equals_the_emulation(
    units, gradient
):
    x = drawn(2, 16, 48, dtype=torch.bfloat16)
    weight = drawn(64, 48, seed=1)
    g = drawn(2, 16, 64, seed=2, dtype=torch.bfloat16)
    ours = products(x, weight, g, gradient)
    e4m3 = torch.float8_e4m3fn
    bf16 = torch.bfloat16
    assert units == [
        (e4m3, e4m3, bf16, True),
        *((fp8.DTYPES[gradient], e4m3, dtype, False) for dtype in (bf16, torch.float32)),
    ]
    emulation = products(
        x,
        weight,
        g,
        gradient,
        lambda x, *rest: fp8._Linear.apply(x.flatten(0, 1), *rest, False).view(2, 16, 64),
    )
    assert all(error(one, other) < 2.0**-8 for one, other in zip(ours, emulation, strict=True))


def test_a_side_that_is_no_multiple_of_16_is_emulated(units):
    for odd in itertools.product((16, 8), repeat=3):
        rows, k, n = odd
        units.clear()
        products(drawn(rows, k), drawn(n, k), drawn(rows, n))
        assert len(units) == (3 if odd == (16, 16, 16) else 0)


def test_a_cpu_emulates():
    assert not fp8.multiplies(torch.device("cpu"))


# ---- in a model ----


def multiplying(recipe, build):
    return {
        name
        for name, module in build(recipe).named_modules()
        if isinstance(module, LinearMap) and module.product is not plain_product
    }


@pytest.mark.parametrize("ffn", [[], ["relu2"]])
def test_only_the_chosen_maps_multiply_so(tiny, build, ffn):
    inner = {"up", "down"} if ffn else {"gate_up", "down"}
    places = {
        "ffn": {f"blocks.{layer}.ffn.inner.{name}" for layer in range(3) for name in inner},
        "readout": {"readout"},
        "qkv": {f"blocks.{layer}.attention.qkv" for layer in range(3)},
        "out": {f"blocks.{layer}.attention.out" for layer in range(3)},
    }
    chosen = {
        "ffn": "ffn",
        "readout": "readout",
        "both": "ffn readout",
        "attention": "qkv out",
        "all": "ffn qkv out readout",
    }
    for where, named in chosen.items():
        expected = set().union(*(places[place] for place in named.split()))
        assert multiplying(tiny([*ffn, "gating", {"fp8": {"where": where}}]), build) == expected


@pytest.mark.parametrize("path", ["blocks.0.attention.on_heads.mine.out", "objective.mine.qkv"])
def test_a_map_of_a_stage_is_no_projection_of_the_attention_whatever_its_name(path):
    assert FP8(where="all").product(path, linear(16, 16)) is None


def test_the_rest_of_the_model_computes_the_same_bits(tiny, build, batch):
    """fp8 in the feed-forward leaves the readout of the same features alone; in the readout, the features."""
    plain, ffn, readout = (
        build(tiny(one), stirred=0.1)
        for one in (
            [],
            ["fp8"],
            [{"fp8": {"where": "readout"}}],
        )
    )
    tokens = batch(tiny())[:, :-1]
    features = plain.features(tokens)
    assert torch.equal(ffn.logits(features), plain.logits(features))
    assert not torch.equal(ffn.features(tokens), features)
    assert torch.equal(readout.features(tokens), features)
    assert not torch.equal(readout.logits(features), plain.logits(features))


def test_evaluation_multiplies_plainly(tiny, build, batch):
    plain, both = (build(tiny(one), stirred=0.1) for one in ([], [{"fp8": {"where": "both"}}]))
    tokens = batch(tiny())[:, :-1]
    with torch.no_grad():
        assert torch.equal(both(tokens), plain(tokens))
    # Six products in a row, 4 % each, on activations that silu and products sharpen.
    assert 0.01 < error(both(tokens), plain(tokens)) < 0.2


def test_gradients_of_the_model_are_near_the_plain_ones_and_the_dose_shows_in_all(
    tiny, build, batch
):
    found = []
    for treatment in (
        [],
        *([{"fp8": {"where": "both", "gradient": form}}] for form in FORMATS),
    ):
        model = build(tiny(treatment), stirred=0.1)
        of_rows(model, heads_of(model)[0])(batch(tiny()))[0].backward()
        found.append([value.grad for value in model.parameters()])
    precise, wide = (
        [error(*pair) for pair in zip(ours, found[0], strict=True)] for ours in found[1:]
    )
    assert all(0.01 < size < 0.3 for size in precise + wide)
    assert all(one != other for one, other in zip(precise, wide, strict=True))


@pytest.mark.parametrize("gradient", FORMATS)
def test_twenty_steps_follow_the_plain_run(tiny, token_folder, gradient):
    """Margin: a tenth of what the plain run learns in these steps."""

    def curve(treatment):
        trainer = Trainer(
            tiny(treatment, budget__tokens=20 * 64, optim__lr=0.01),
            Runtime(device="cpu"),
            token_folder,
        )
        losses = []
        for _ in range(20):
            trainer.advance()
            losses.append(trainer.close_window())
        return np.array([*losses, trainer.evaluate()["val/loss"]])

    plain = curve([])
    ours = curve([{"fp8": {"where": "both", "gradient": gradient}}])
    learnt = plain[0] - plain[-1]
    assert learnt > 0.2
    assert 0 < np.abs(ours - plain).max() < 0.1 * learnt


@pytest.mark.parametrize("recompute", [0, 2])
def test_a_model_compiles_as_one_graph_to_the_same_bits(tiny, build, batch, recompute):
    recipe = tiny([{"fp8": {"where": "both"}}], model__layers=2)
    seen = []
    model = build(recipe, recompute=recompute)
    for compiled in (
        lambda f: f,
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
    ):
        loss, _ = compiled(of_rows(model, heads_of(model)[0]))(batch(recipe))
        loss.backward()
        seen.append([loss.detach(), *(value.grad for value in model.parameters())])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_a_tied_head_has_no_readout_to_act_on(tiny):
    for where in ("readout", "both"):
        with pytest.raises(UserError) as refusal:
            tiny([{"fp8": {"where": where}}], model__tied=True)
        assert (
            str(refusal.value)
            == f"fp8.where={where} has no readout to act on: the head is tied; "
            "use fp8.where=ffn, or set model.tied=false"
        )
    tiny(["fp8"], model__tied=True)


def test_two_parts_that_multiply_one_map_are_refused(tiny):
    for gradient in FORMATS:
        twice = assign(
            tiny(), "model.products", [{"kind": "fp8"}, {"kind": "fp8", "gradient": gradient}]
        )
        with pytest.raises(
            UserError,
            match=r"model.products: fp8 and fp8 each multiply blocks.0.ffn.inner.gate_up; keep one of them",
        ):
            plan_of(twice)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnAGPU:
    @pytest.mark.parametrize("gradient", FORMATS)
    @pytest.mark.parametrize(
        ("k", "n"),
        [(768, 4096), (2048, 768), (768, 32_000)],
        ids=["gate_up", "down", "readout"],
    )
    def test_the_matrix_units_equal_the_emulation_within_bf16_rounding(self, k, n, gradient):
        """96 rows of 384 tokens.  y: 2e-3 is bf16's rounding, the rest the short accumulators."""
        rows = 96 * 384 if n < 32_000 else 8 * 384  # the emulation holds the logits in fp32
        fresh = torch.Generator("cuda")
        fresh.seed()

        def draw(*shape):
            return torch.randn(shape, device="cuda", generator=fresh)

        x = draw(rows, k).bfloat16()
        weight = draw(n, k) * k**-0.5
        g = draw(rows, n).bfloat16() / rows
        assert fp8.multiplies(x.device)
        ours = products(x, weight, g, gradient)
        emulation = products(
            x, weight, g, gradient, lambda *given: fp8._Linear.apply(*given, False)
        )
        for one, other, bound in zip(ours, emulation, (5e-3, 5e-3, 1e-3), strict=True):
            assert one.dtype == other.dtype
            assert error(one, other) < bound
        exact = x.float() @ weight.T
        assert error(ours[0], exact) <= 1.1 * error(emulation[0], exact)

    @pytest.mark.parametrize("where", ["ffn", "readout", "both"])
    def test_compiled_steps_follow_the_emulation(self, tiny, token_folder, monkeypatch, where):
        """Other roundings of bf16 flip those to 8 bits.

        Of one formula, activations in bf16 and in fp32 lie 0.036 apart; two seeds 0.7.
        """
        recipe = tiny(
            [{"fp8": {"where": where}}],
            model__width=64,
            model__attention__head_dim=16,
            budget__tokens=40 * 64,
        )

        def curve(native, compiled):
            with monkeypatch.context() as patch:
                if not native:
                    patch.setattr(fp8, "multiplies", lambda device: False)
                trainer = Trainer(
                    recipe, Runtime(device="cuda", dtype="bf16", compile=compiled), token_folder
                )
                return [(trainer.advance(), trainer.close_window())[1] for _ in range(40)]

        assert (
            max(abs(a - b) for a, b in zip(curve(True, True), curve(False, False), strict=True))
            < 0.1
        )

    def test_the_step_holds_eight_bit_products_and_repeats_its_bits(self, tiny, token_folder):
        recipe = tiny(
            [{"fp8": {"where": "both"}}], model__width=64, model__attention__head_dim=16
        )
        trainers = [
            Trainer(recipe, Runtime(device="cuda", dtype="bf16", compile=False), token_folder)
            for _ in range(2)
        ]
        with torch.profiler.profile() as profile:
            trainers[0].advance()
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["aten::_scaled_mm"] == 3 * (2 * 3 + 1)
        trainers[1].advance()
        assert trainers[0].digest() == trainers[1].digest()
