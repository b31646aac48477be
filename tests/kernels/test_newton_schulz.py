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
SMALL = {16: (16, 16, 4, 2), 2**31: (32, 32, 4, 2)}  # several tiles to a side of a small matrix
RANGES = {
    "kj5": (0.68, 1.14),
    "polar5": (0.85, 1.15),
    "polar7": (0.91, 1.09),
    "you5": (0.97, 1.04),
}  # where [0.01, 1] lands
IN_FP32 = {2**31: (64, 32, 4, 2)}  # on the GPU: fp32 tiles fill shared memory sooner


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def matrices_with(singular_values, rows, columns, seed=0):
    """[1, rows, columns], fp32."""
    u, _, vt = torch.linalg.svd(randn(rows, columns, seed=seed).double(), full_matrices=False)
    return ((u * singular_values) @ vt)[None].float()


def error(measured, expected):
    """Relative Frobenius error."""
    return ((measured.cpu().double() - expected.cpu()).norm() / expected.norm().cpu()).item()


# ---- the symmetric product ----


@triton.jit
def decode(rows, columns, side):
    row, column = _tile_of(tl.program_id(0), side)
    tl.store(rows + tl.program_id(0), row)
    tl.store(columns + tl.program_id(0), column)


@pytest.mark.parametrize("side", range(1, 14))
def test_every_tile_on_or_below_the_diagonal_has_one_index(side):
    count = side * (side + 1) // 2
    rows, columns = torch.full((2, count), -1, dtype=torch.int32, device=DEVICE)
    decode[(count,)](rows, columns, side)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (row, column) for row in range(side) for column in range(row + 1)
    ]


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
@example(
    count=2, rows=64, columns=32, alpha=1.0, beta=2.5, diagonal=1.5, seed=0
)  # nothing to mask
def test_products_equal_fp64_and_are_symmetric_to_the_bit(
    count, rows, columns, alpha, beta, diagonal, seed
):
    x, y = randn(count, rows, columns, seed=seed), randn(count, rows, rows, seed=seed + 1)
    added = (0.0, None) if beta is None else (beta, y + y.mT)
    expected = alpha * torch.einsum("nik,njk->nij", x.double(), x.double()) + (
        added[0] * added[1].double() if beta else 0
    )
    expected = expected + diagonal * torch.eye(rows, device=DEVICE)
    product = symmetric(x, alpha, *added, diagonal, tiles=SMALL)
    assert error(product, expected) < 2e-6 and torch.equal(product, product.mT)
    assert error(plain_symmetric(x.double(), alpha, *added, diagonal), expected) < 1e-7


def test_a_square_in_fp16_is_symmetric_to_the_bit_and_as_exact_as_a_plain_one():
    gram = symmetric(randn(2, 70, 90).half() / 10, tiles=SMALL)
    square = symmetric(gram, 0.5, -1.0, gram, tiles=SMALL)
    expected = 0.5 * gram.double() @ gram.double() - gram.double()
    assert torch.equal(square, square.mT) and square.dtype == torch.float16
    assert error(square, expected) <= 1.1 * error(
        plain_symmetric(gram, 0.5, -1.0, gram), expected
    )


def test_a_scale_multiplies_each_product_and_enters_newton_schulz_as_if_the_matrices_held_it():
    x, scale = randn(3, 20, 50), torch.tensor([1.0, 0.25, 8.0], device=DEVICE)
    assert torch.equal(
        symmetric(x, scale=scale, tiles=SMALL), scale[:, None, None] * symmetric(x, tiles=SMALL)
    )
    triples = COEFFICIENTS["polar7"][1]
    held = iterate(x * (scale * 1e-2)[:, None, None], triples, tiles=SMALL)
    assert error(iterate(x, triples, scale * 1e-2, SMALL), held.double()) < 1e-5


@pytest.mark.parametrize("view", ["transposed", "split", "every second", "expanded"])
def test_any_strides_give_the_product_of_a_copy(view):
    x = randn(3, 40, 60)
    x = {
        "transposed": x.mT,
        "split": x.split((12, 28), dim=-2)[1],
        "every second": x[::2, ::2, ::2],
        "expanded": x[:1].expand(3, 40, 60),
    }[view]
    assert (
        error(symmetric(x, tiles=SMALL), symmetric(x.contiguous(), tiles=SMALL).double()) < 1e-6
    )


def test_an_empty_batch_gives_an_empty_batch():
    assert symmetric(randn(0, 4, 6)).shape == (0, 4, 4)


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    x = randn(2, 20, 30)
    for y in (None, symmetric(x, tiles=SMALL)):
        torch.library.opcheck(kernel._symmetric, (x, y, randn(2), 1.0, 0.5, 2.0, *SMALL[16]))


# ---- Newton-Schulz ----


@pytest.mark.parametrize(
    ("coefficients", "shape"),
    list(zip(COEFFICIENTS, [(4, 30, 60), (4, 60, 30), (2, 40, 40), (4, 30, 60)], strict=True)),
)
def test_in_fp16_results_are_as_close_to_fp64_as_plain_products(coefficients, shape):
    matrices = randn(*shape)
    expected = newton_schulz(matrices.double(), coefficients, torch.float64)
    ours, plain = (
        orthogonalise(matrices, *COEFFICIENTS[coefficients], torch.float16, SMALL),
        newton_schulz(matrices, coefficients, torch.float16),
    )
    assert ours.dtype == torch.float32 and ours.shape == shape
    assert error(ours, expected) <= 1.1 * error(
        plain, expected
    )  # 0.3 to 0.7 times, seen over seeds


@pytest.mark.parametrize(
    "shape", [(2, 20, 45), (2, 45, 20), (1, 33, 33), (3, 1, 9), (3, 9, 1)], ids=str
)
def test_in_fp32_results_equal_fp64(shape):
    matrices = randn(*shape)
    ours = orthogonalise(matrices, *COEFFICIENTS["polar7"], torch.float32, SMALL)
    # A vector's one singular value is exactly 1, where the first polynomial multiplies a rounding by up to 1,700.
    bound = 1e-4 if 1 in shape[1:] else 1e-5
    assert error(ours, newton_schulz(matrices.double(), "polar7", torch.float64)) < bound


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_singular_values_land_in_the_range_of_the_coefficients(coefficients):
    matrices = matrices_with(
        torch.logspace(0, -1, 40, dtype=torch.float64, device=DEVICE), 40, 70
    )  # over the norm: from 0.27 to 0.027
    result = orthogonalise(matrices, *COEFFICIENTS[coefficients], torch.float32, SMALL)
    values, (low, high) = torch.linalg.svdvals(result.double()), RANGES[coefficients]
    assert low <= values.min() and values.max() <= high
    assert error(result, polar_factor(matrices.double())) < max(1 - low, high - 1)


def test_a_view_of_split_rows_gives_the_result_of_a_copy():
    for piece in randn(2, 50, 24).split((16, 34), dim=-2):
        ours, copied = (
            orthogonalise(each, *COEFFICIENTS["polar7"], torch.float32, SMALL)
            for each in (piece, piece.contiguous())
        )
        assert error(ours, copied.double()) < 1e-5


def test_zero_matrices_stay_zero():
    assert (
        orthogonalise(
            torch.zeros(2, 8, 12, device=DEVICE), *COEFFICIENTS["kj5"], torch.float32, SMALL
        )
        == 0
    ).all()


def test_compiled_as_one_graph_it_computes_the_same():
    function = lambda matrices: orthogonalise(
        matrices, *COEFFICIENTS["you5"], torch.float32, SMALL
    )  # noqa: E731
    matrices = randn(2, 40, 20)
    assert (
        error(
            torch.compile(function, fullgraph=True, backend="aot_eager")(matrices),
            function(matrices).double(),
        )
        < 1e-6
    )


def test_tiles_are_powers_of_two_that_a_matrix_unit_takes():
    for block, depth, warps, _ in TILES.values():
        assert all(
            size >= 16 and size & (size - 1) == 0 for size in (block, depth)
        ) and warps in (1, 2, 4, 8, 16)
    assert max(TILES) >= 2**31  # every number of rows finds one


# ---- on the GPU ----


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(
        "shape", [(3, 768, 2048), (8, 64, 768), (2, 129, 777), (1, 1, 16)], ids=str
    )
    def test_a_bf16_product_is_symmetric_to_the_bit_and_as_exact_as_a_plain_one(self, shape):
        x = randn(*shape, seed=torch.seed() % 2**31).bfloat16() / shape[-1] ** 0.5
        gram = symmetric(x)
        square = symmetric(gram, 0.5, -1.5, gram, 2.0)
        for ours, plain, truth in (
            (gram, plain_symmetric(x), plain_symmetric(x.double())),
            (
                square,
                plain_symmetric(gram, 0.5, -1.5, gram, 2.0),
                plain_symmetric(gram.double(), 0.5, -1.5, gram.double(), 2.0),
            ),
        ):
            assert torch.equal(ours, ours.mT) and error(ours, truth) <= min(
                max(1.1 * error(plain, truth), 2e-3), 5e-3
            )
        assert torch.equal(square, symmetric(gram, 0.5, -1.5, gram, 2.0))

    @pytest.mark.parametrize("coefficients", COEFFICIENTS)
    @pytest.mark.parametrize(
        "shape", [(2, 768, 2048), (2, 768, 256), (6, 64, 768), (1, 131, 517)], ids=str
    )
    def test_bf16_results_are_as_close_to_fp64_as_plain_products(self, coefficients, shape):
        matrices = randn(*shape, seed=torch.seed() % 2**31)
        expected = newton_schulz(matrices.double(), coefficients, torch.float64)
        ours, plain = (
            function(torch.bfloat16)
            for function in (
                lambda dtype: orthogonalise(matrices, *COEFFICIENTS[coefficients], dtype),
                lambda dtype: newton_schulz(matrices, coefficients, dtype),
            )
        )
        assert error(ours, expected) <= 1.1 * error(plain, expected)
        values, within = torch.linalg.svdvals(ours.double()), torch.linalg.svdvals(expected)
        assert values.min() > within.min() - 0.05 and values.max() < within.max() + 0.05

    def test_fp32_products_use_no_shorter_numbers(self):
        x = randn(2, 100, 300, seed=torch.seed() % 2**31)
        assert error(symmetric(x, tiles=IN_FP32), plain_symmetric(x.double())) < 1e-6

    def test_a_compiled_graph_gives_the_same(self):
        matrices = randn(2, 256, 512)
        function = lambda matrices: orthogonalise(
            matrices, *COEFFICIENTS["polar7"], torch.bfloat16
        )  # noqa: E731
        assert (
            error(
                torch.compile(function, fullgraph=True)(matrices), function(matrices).double()
            )
            < 1e-2
        )
