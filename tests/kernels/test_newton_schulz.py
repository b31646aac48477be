"""Symmetric products and Newton-Schulz against fp64, and against plain products in the same dtype."""

import pytest
import torch
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton import language as tl

from ablab.core.parts.transforms import COEFFICIENTS, newton_schulz, polar_factor
from ablab.kernels import newton_schulz as kernel
from ablab.kernels.newton_schulz import (
    TILES,
    _tile_of,
    iterate,
    orthogonalise,
    plain_symmetric,
    symmetric,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
examples = settings(max_examples=10)
ALL_ROWS = 2**31
# Several tiles to a side of a small matrix.
SMALL = {16: (16, 16, 4, 2), ALL_ROWS: (32, 32, 4, 2)}
# On the GPU: fp32 tiles fill shared memory sooner.
IN_FP32 = {ALL_ROWS: (64, 32, 4, 2)}
RANGES = {  # where [0.01, 1] lands
    "kj5": (0.68, 1.14),
    "polar5": (0.85, 1.15),
    "polar7": (0.91, 1.09),
    "you5": (0.97, 1.04),
}
SHAPES = {
    "kj5": (4, 30, 60),
    "polar5": (4, 60, 30),
    "polar7": (2, 40, 40),
    "you5": (4, 30, 60),
}


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(DEVICE)


def matrices_with(singular_values, rows, columns, seed=0):
    """[1, rows, columns], fp32."""
    random = randn(rows, columns, seed=seed).double()
    u, _, vt = torch.linalg.svd(random, full_matrices=False)
    return ((u * singular_values) @ vt)[None].float()


def error(measured, expected):
    """Relative Frobenius error."""
    expected = expected.cpu()
    difference = measured.cpu().double() - expected
    return (difference.norm() / expected.norm()).item()


def by_kernel(matrices, coefficients, dtype, **tiles):
    return orthogonalise(matrices, *COEFFICIENTS[coefficients], dtype, **tiles)


# ---- the symmetric product ----


@triton.jit
def decode(rows, columns, side):
    row, column = _tile_of(tl.program_id(0), side)
    tl.store(rows + tl.program_id(0), row)
    tl.store(columns + tl.program_id(0), column)


@pytest.mark.parametrize("side", range(1, 14))
def test_every_tile_on_or_below_the_diagonal_has_one_index(side):
    count = side * (side + 1) // 2
    rows = torch.full((count,), -1, dtype=torch.int32, device=DEVICE)
    columns = rows.clone()
    decode[(count,)](rows, columns, side)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (row, column) for row in range(side) for column in range(row + 1)
    ]


nothing_to_mask = example(
    count=2,
    rows=64,
    columns=32,
    alpha=1.0,
    beta=2.5,
    diagonal=1.5,
    seed=0,
)


@examples
@given(
    count=st.integers(1, 3),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    alpha=st.sampled_from([1.0, -0.7]),
    beta=st.sampled_from([None, 2.5]),
    diagonal=st.sampled_from([0.0, -3.0]),
    seed=st.integers(0, 99),
)
@nothing_to_mask
def test_products_equal_fp64_and_are_symmetric_to_the_bit(
    count, rows, columns, alpha, beta, diagonal, seed
):
    x = randn(count, rows, columns, seed=seed)
    wide = x.double()
    expected = alpha * torch.einsum("nik,njk->nij", wide, wide)
    expected += diagonal * torch.eye(rows, device=DEVICE)
    added = (0.0, None)
    if beta:
        y = randn(count, rows, rows, seed=seed + 1)
        added = (beta, y + y.mT)
        expected += beta * (y + y.mT).double()
    product = symmetric(x, alpha, *added, diagonal, tiles=SMALL)
    plain = plain_symmetric(wide, alpha, *added, diagonal)
    assert error(product, expected) < 2e-6
    assert torch.equal(product, product.mT)
    assert error(plain, expected) < 1e-7


def test_a_square_in_fp16_is_symmetric_to_the_bit_and_as_exact_as_a_plain_one():
    gram = symmetric(randn(2, 70, 90).half() / 10, tiles=SMALL)
    square = symmetric(gram, 0.5, -1.0, gram, tiles=SMALL)
    plain = plain_symmetric(gram, 0.5, -1.0, gram)
    wide = gram.double()
    expected = 0.5 * wide @ wide - wide
    assert torch.equal(square, square.mT)
    assert square.dtype == torch.float16
    assert error(square, expected) <= 1.1 * error(plain, expected)


SCALE = torch.tensor([1.0, 0.25, 8.0], device=DEVICE)


def test_a_scale_multiplies_each_product():
    x = randn(3, 20, 50)
    alone = symmetric(x, tiles=SMALL)
    scaled = symmetric(x, scale=SCALE, tiles=SMALL)
    assert torch.equal(scaled, SCALE[:, None, None] * alone)


def test_a_scale_enters_newton_schulz_as_if_the_matrices_held_it():
    x = randn(3, 20, 50)
    scale = SCALE * 1e-2
    _, triples = COEFFICIENTS["polar7"]
    held = iterate(x * scale[:, None, None], triples, tiles=SMALL)
    entering = iterate(x, triples, scale, SMALL)
    assert error(entering, held.double()) < 1e-5


@pytest.mark.parametrize("view", ["transposed", "split", "every second", "expanded"])
def test_any_strides_give_the_product_of_a_copy(view):
    x = randn(3, 40, 60)
    views = {
        "transposed": x.mT,
        "split": x.split((12, 28), dim=-2)[1],
        "every second": x[::2, ::2, ::2],
        "expanded": x[:1].expand(3, 40, 60),
    }
    viewed = symmetric(views[view], tiles=SMALL)
    copied = symmetric(views[view].contiguous(), tiles=SMALL)
    assert error(viewed, copied.double()) < 1e-6


def test_an_empty_batch_gives_an_empty_batch():
    assert symmetric(randn(0, 4, 6)).shape == (0, 4, 4)


@pytest.mark.parametrize("added", [False, True])
def test_pytorch_finds_the_operator_registered_as_it_behaves(added):
    x = randn(2, 20, 30)
    y = symmetric(x, tiles=SMALL) if added else None
    given_ = (x, y, randn(2), 1.0, 0.5, 2.0, *SMALL[16])
    torch.library.opcheck(kernel._symmetric, given_)


# ---- Newton-Schulz ----


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_in_fp16_results_are_as_close_to_fp64_as_plain_products(coefficients):
    shape = SHAPES[coefficients]
    matrices = randn(*shape)
    expected = newton_schulz(matrices.double(), coefficients, torch.float64)
    ours = by_kernel(matrices, coefficients, torch.float16, tiles=SMALL)
    plain = newton_schulz(matrices, coefficients, torch.float16)
    assert ours.dtype == torch.float32
    assert ours.shape == shape
    # 0.3 to 0.7 times, seen over seeds.
    assert error(ours, expected) <= 1.1 * error(plain, expected)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 20, 45),
        (2, 45, 20),
        (1, 33, 33),
        (3, 1, 9),
        (3, 9, 1),
    ],
    ids=str,
)
def test_in_fp32_results_equal_fp64(shape):
    matrices = randn(*shape)
    ours = by_kernel(matrices, "polar7", torch.float32, tiles=SMALL)
    exact = newton_schulz(matrices.double(), "polar7", torch.float64)
    # A vector's one singular value is exactly 1, where the first polynomial multiplies a rounding by up to 1,700.
    bound = 1e-4 if 1 in shape[1:] else 1e-5
    assert error(ours, exact) < bound


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_singular_values_land_in_the_range_of_the_coefficients(coefficients):
    """Over the norm they start from 0.27 to 0.027."""
    start = torch.logspace(0, -1, 40, dtype=torch.float64, device=DEVICE)
    matrices = matrices_with(start, 40, 70)
    result = by_kernel(matrices, coefficients, torch.float32, tiles=SMALL)
    values = torch.linalg.svdvals(result.double())
    low, high = RANGES[coefficients]
    assert low <= values.min()
    assert values.max() <= high
    furthest = max(1 - low, high - 1)
    assert error(result, polar_factor(matrices.double())) < furthest


def test_a_view_of_split_rows_gives_the_result_of_a_copy():
    for piece in randn(2, 50, 24).split((16, 34), dim=-2):
        ours = by_kernel(piece, "polar7", torch.float32, tiles=SMALL)
        copied = by_kernel(piece.contiguous(), "polar7", torch.float32, tiles=SMALL)
        assert error(ours, copied.double()) < 1e-5


def test_zero_matrices_stay_zero():
    zeros = torch.zeros(2, 8, 12, device=DEVICE)
    assert not by_kernel(zeros, "kj5", torch.float32, tiles=SMALL).any()


def test_compiled_as_one_graph_it_computes_the_same():
    def function(matrices):
        return by_kernel(matrices, "you5", torch.float32, tiles=SMALL)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    matrices = randn(2, 40, 20)
    assert error(compiled(matrices), function(matrices).double()) < 1e-6


@pytest.mark.parametrize("tile", TILES.values(), ids=str)
def test_tiles_are_powers_of_two_that_a_matrix_unit_takes(tile):
    block, depth, warps, _ = tile
    for size in (block, depth):
        assert size >= 16
        assert size & (size - 1) == 0
    assert warps in (1, 2, 4, 8, 16)


def test_every_number_of_rows_finds_a_tile():
    assert max(TILES) >= 2**31


# ---- on the GPU ----


def any_seed():
    return torch.seed() % 2**31


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(
        "shape",
        [(3, 768, 2048), (8, 64, 768), (2, 129, 777), (1, 1, 16)],
        ids=str,
    )
    def test_a_bf16_product_is_symmetric_to_the_bit_and_as_exact_as_a_plain_one(self, shape):
        def check(ours, plain, truth):
            assert torch.equal(ours, ours.mT)
            allowed = max(1.1 * error(plain, truth), 2e-3)
            assert error(ours, truth) <= min(allowed, 5e-3)

        x = randn(*shape, seed=any_seed()).bfloat16() / shape[-1] ** 0.5
        gram = symmetric(x)
        check(gram, plain_symmetric(x), plain_symmetric(x.double()))
        square = symmetric(gram, 0.5, -1.5, gram, 2.0)
        wide = gram.double()
        check(
            square,
            plain_symmetric(gram, 0.5, -1.5, gram, 2.0),
            plain_symmetric(wide, 0.5, -1.5, wide, 2.0),
        )
        assert torch.equal(square, symmetric(gram, 0.5, -1.5, gram, 2.0))

    @pytest.mark.parametrize("coefficients", COEFFICIENTS)
    @pytest.mark.parametrize(
        "shape",
        [(2, 768, 2048), (2, 768, 256), (6, 64, 768), (1, 131, 517)],
        ids=str,
    )
    def test_bf16_results_are_as_close_to_fp64_as_plain_products(self, coefficients, shape):
        matrices = randn(*shape, seed=any_seed())
        expected = newton_schulz(matrices.double(), coefficients, torch.float64)
        ours = by_kernel(matrices, coefficients, torch.bfloat16)
        plain = newton_schulz(matrices, coefficients, torch.bfloat16)
        assert error(ours, expected) <= 1.1 * error(plain, expected)
        values = torch.linalg.svdvals(ours.double())
        within = torch.linalg.svdvals(expected)
        assert values.min() > within.min() - 0.05
        assert values.max() < within.max() + 0.05

    def test_fp32_products_use_no_shorter_numbers(self):
        x = randn(2, 100, 300, seed=any_seed())
        assert error(symmetric(x, tiles=IN_FP32), plain_symmetric(x.double())) < 1e-6

    def test_a_compiled_graph_gives_the_same(self):
        def function(matrices):
            return by_kernel(matrices, "polar7", torch.bfloat16)

        matrices = randn(2, 256, 512)
        compiled = torch.compile(function, fullgraph=True)
        assert error(compiled(matrices), function(matrices).double()) < 1e-2
