"""Orthogonalisation: spectra, symmetries and fused matrices, against SVDs and scalar polynomials in fp64."""

import numpy as np
import pytest
import torch

from ablab.core.language.declare import Param
from ablab.core.parts.transforms import COEFFICIENTS, newton_schulz, polar_factor

RANGES = {
    "kj5": (0.68, 1.14),
    "polar5": (0.86, 1.14),
    "polar7": (0.915, 1.084),
    "you5": (0.98, 1.03),
}  # as core/parts/transforms.py says
MARGIN = 0.005


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp64(tensor) -> np.ndarray:
    return tensor.double().numpy()


def spectrum_of(matrix) -> np.ndarray:
    return np.linalg.svd(fp64(matrix), compute_uv=False)


def polar_by_svd(matrix: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def iterated(x: np.ndarray, triples) -> np.ndarray:
    """The polynomials on numbers."""
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


def orthogonal(size, seed=0) -> np.ndarray:
    normal = np.random.default_rng(seed).standard_normal((size, size))
    return np.linalg.qr(normal)[0]


def with_spectrum(rows, columns, seed=0):
    """A matrix whose smallest singular value is 0.012 of its Frobenius norm, the others log-spaced above; and U, V."""
    rank = min(rows, columns)
    s = np.exp(np.linspace(0, np.log(0.02), rank))
    s[-1] = 0.0121 * np.linalg.norm(s)
    s = np.sort(s)[::-1]
    u = orthogonal(rows, seed)[:, :rank]
    v = orthogonal(columns, seed + 1)[:, :rank]
    return torch.from_numpy(u * s @ v.T).float(), u, s, v


every_set = pytest.mark.parametrize("coefficients", RANGES)


def every_shape(*shapes: str):
    """`24x40`: 24 rows, 40 columns."""
    sizes = [tuple(map(int, shape.split("x"))) for shape in shapes]
    return pytest.mark.parametrize("shape", sizes, ids=shapes)


@every_set
@every_shape("24x40", "40x24", "24x24")
def test_newton_schulz_lands_in_its_stated_range_and_follows_its_polynomial(
    coefficients, shape
):
    matrix, u, s, v = with_spectrum(*shape)
    assert s.min() >= 0.01 * np.linalg.norm(s)
    out = newton_schulz(matrix, coefficients, torch.float32)
    low, high = RANGES[coefficients]
    spectrum = spectrum_of(out)
    assert low - MARGIN < spectrum.min()
    assert spectrum.max() < high + MARGIN
    divisor, triples = COEFFICIENTS[coefficients]
    expected = iterated(s / np.linalg.norm(s) / divisor, triples)
    # the singular vectors stay, each value moves by itself
    error = u.T @ fp64(out) @ v - np.diag(expected)
    assert np.abs(error).max() < 2e-4


@every_set
def test_the_stated_range_is_that_of_the_whole_interval(coefficients):
    """The ends are reached within 0.01, so the comment neither flatters nor slanders.

    polar7 holds from 0.001 already.
    """
    divisor, triples = COEFFICIENTS[coefficients]
    smallest = 0.001 if coefficients == "polar7" else 0.01
    x = iterated(np.linspace(smallest, 1, 200_001) / divisor, triples)
    low, high = RANGES[coefficients]
    assert low - MARGIN < x.min() < low + 0.01
    assert high - 0.01 < x.max() < high + MARGIN


def test_a_batch_is_orthogonalised_matrix_by_matrix():
    """Each matrix by its own norm: one norm over the bank would leave the small one unlifted."""
    large, *_ = with_spectrum(16, 24, seed=1)
    other, *_ = with_spectrum(16, 24, seed=3)
    pair = torch.stack([large, 1e-3 * other])
    together = newton_schulz(pair, "polar7", torch.float32)
    for i in range(2):
        alone = newton_schulz(pair[i : i + 1], "polar7", torch.float32)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-5)
    assert spectrum_of(together[1]).min() > 0.9


@every_set
def test_bf16_products_cost_less_than_two_percent(coefficients):
    matrix, *_ = with_spectrum(32, 48)
    exact, rounded = (
        spectrum_of(newton_schulz(matrix, coefficients, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    low, high = RANGES[coefficients]
    assert low - 0.025 < rounded.min()
    assert rounded.max() < high + 0.025
    assert not np.array_equal(exact, rounded)


def test_exact_is_the_polar_factor_of_the_svd():
    matrix = randn(3, 12, 20)
    expected = polar_by_svd(fp64(matrix))
    assert np.abs(fp64(polar_factor(matrix)) - expected).max() < 1e-5


# ---- as a step of a chain ----


def moved(tiny, drive, start, gradient, **dose):
    """The change that Muon makes in one step: no momentum yet, learning rate 1, no decay."""
    recipe = tiny(
        [{"muon": {"lr": 1.0, **dose}}],
        schedule="constant",
        optim__clip=None,
        optim__lr=1.0,
        optim__chains__hidden__steps=["adam"],
    )
    seen, _ = drive(recipe, start, [gradient])
    return {name: seen[0][name] - seen[1][name] for name in start}


def one(shape, **more):
    return {"w": (Param(shape, "hidden", **more), torch.zeros(shape))}


@pytest.fixture
def update(tiny, drive):
    """(gradient, dose of muon) -> the change of one hidden matrix."""

    def of(gradient, **dose):
        start = one(tuple(gradient.shape))
        return moved(tiny, drive, start, {"w": gradient}, **dose)["w"]

    return of


def rms(x) -> float:
    return x.square().mean().sqrt().item()


SETS = [*RANGES, "exact"]


@pytest.mark.parametrize("ns", ["you5", "exact"])
@every_shape("24x60", "60x24", "12x96")
def test_the_rms_of_an_orthogonal_update_is_one_over_root_of_the_longer_side(update, ns, shape):
    gradient, *_ = with_spectrum(*shape)
    root = max(shape) ** 0.5
    flat = update(gradient, ns=ns, scale="rms") / (0.2 * root)
    assert abs(rms(flat) * root - 1) < 0.03


@every_shape("32x8", "8x32", "16x16")
def test_scales_are_those_of_the_papers(update, shape):
    """RMS of an exactly orthogonal matrix is 1/sqrt(max(o, i)); every scale multiplies it."""
    rows, columns = shape
    flat = 1 / max(shape) ** 0.5
    expected = {
        "spectral": (rows / columns) ** 0.5,
        "keller": max(1, rows / columns) ** 0.5,
        "rms": 0.2 * max(rows, columns) ** 0.5,
    }
    gradient, *_ = with_spectrum(*shape)
    for scale, factor in expected.items():
        size = rms(update(gradient, ns="exact", scale=scale))
        assert abs(size / (flat * factor) - 1) < 1e-4, scale


@pytest.mark.parametrize("ns", SETS)
@every_shape("12x20", "20x12")
def test_rotating_the_gradient_rotates_the_update(update, ns, shape):
    gradient, *_ = with_spectrum(*shape)
    left, right = (torch.from_numpy(orthogonal(size, seed=7)).float() for size in shape)
    expected = left @ update(gradient, ns=ns) @ right
    rotated = update(left @ gradient @ right, ns=ns)
    assert (rotated - expected).abs().max() < 5e-4


@pytest.mark.parametrize("ns", SETS)
def test_the_size_of_the_gradient_does_not_matter_and_its_sign_does(update, ns):
    gradient, *_ = with_spectrum(12, 20)
    plain = update(gradient, ns=ns)
    assert plain.abs().max() > 0.1
    # the norm's 1e-7 shrinks a momentum of norm 1e-3 by 1e-4, and polar7 multiplies that by 20
    for size in (1000.0, 0.01):
        assert (update(size * gradient, ns=ns) - plain).abs().max() < 4e-3
    by_powers = [update(2.0**power * gradient, ns="kj5") for power in (10, 12)]
    assert torch.equal(*by_powers)
    negative = update(-gradient, ns=ns)
    assert torch.equal(negative, -plain) or ns == "exact"
    assert (negative + plain).abs().max() < 1e-5


# ---- fused matrices ----


@pytest.mark.parametrize("blocks", ["8, 8, 8", "16, 8, 8", "12, 12"])
@pytest.mark.parametrize("treatment", [[], ["normuon"]])
@pytest.mark.parametrize("scale", ["keller", "rms"])
def test_blocks_of_a_fused_matrix_move_as_separate_parameters(
    tiny, drive, blocks, treatment, scale
):
    """Bit for bit, over steps with momentum, decay and row normalisation.

    Shape factors and norms are those of each block.
    """
    sizes = tuple(map(int, blocks.split(",")))
    rows = sum(sizes)
    listed = [{"muon": {"scale": scale}}, *treatment]
    recipe = tiny(listed, schedule="constant", optim__clip=None)
    weight = randn(rows, 10)
    gradients = [randn(rows, 10, seed=t) for t in range(1, 4)]

    def in_parts(matrix):
        return {f"w{i}": piece for i, piece in enumerate(matrix.split(sizes))}

    whole = {"w": (Param((rows, 10), "hidden", blocks=sizes), weight)}
    parts = {
        name: (Param(tuple(piece.shape), "hidden"), piece)
        for name, piece in in_parts(weight).items()
    }
    fused, _ = drive(recipe, whole, [{"w": gradient} for gradient in gradients])
    apart, _ = drive(recipe, parts, [in_parts(gradient) for gradient in gradients])
    joined = torch.cat([apart[3][name] for name in parts])
    assert torch.equal(fused[3]["w"], joined)


def test_split_heads_moves_each_head_apart_and_joint_moves_all_as_one(tiny, drive):
    gradient = randn(32, 12)
    start = one((32, 12), blocks=(16, 8, 8), head=4)
    rows_of = {"joint": (32,), "blocks": (16, 8, 8), "heads": (4,) * 8}
    by = {}
    for split, rows in rows_of.items():
        found = moved(tiny, drive, start, {"w": gradient}, split=split, ns="exact")
        by[split] = fp64(found["w"])
        pieces = np.split(fp64(gradient), np.cumsum(rows)[:-1])
        keller = [max(1, len(piece) / 12) ** 0.5 for piece in pieces]
        flat = [polar_by_svd(piece) for piece in pieces]
        expected = [f * scale for f, scale in zip(flat, keller, strict=True)]
        assert np.abs(by[split] - np.concatenate(expected)).max() < 1e-5, split
    assert np.abs(by["joint"] - by["blocks"]).max() > 1e-2
    assert np.abs(by["blocks"] - by["heads"]).max() > 1e-2


def test_the_model_declares_its_fused_matrices(tiny, build):
    """q, k, v and gate, up are apart under muon; heads are those of q, k and v; out and down are one matrix each."""
    block = build(tiny(model__attention__group=2)).blocks[0]
    maps = (
        block.attention.qkv,
        block.ffn.inner.gate_up,
        block.attention.out,
        block.ffn.inner.down,
    )
    qkv, gate_up, out, down = (one.weight.declared for one in maps)
    assert (qkv.blocks, qkv.head) == ((32, 16, 16), 8)
    assert (gate_up.blocks, gate_up.head) == ((64, 64), 0)
    assert out.blocks == down.blocks == ()


def test_a_zero_gradient_gives_a_zero_update(update):
    """Not NaN: a matrix may be cut off from the loss for a step."""
    for ns in RANGES:
        assert not update(torch.zeros(6, 8), ns=ns).any()
