"""Casts to 8 bits in both layouts, in Triton's interpreter without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.kernels import fp8, fp8_cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(rows, columns, seed=0):
    draw = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(rows, columns, generator=draw, device=DEVICE)


@settings(max_examples=12)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    form=st.sampled_from(sorted(fp8.DTYPES)),
    size=st.integers(-60, 60),
)
def test_rows_are_torchs_cast_and_columns_the_same_numbers_turned_round(
    rows, columns, form, size
):
    """A quotient within fp32 rounding of a tie may fall on either side."""
    x = drawn(rows, columns) * 2.0**size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_cast, "TILE", fp8_cast.Tile(rows=32, columns=16, warps=4))
        found = fp8_cast.cast(x, form)
    wanted, scale = fp8.quantise(x, form)
    numbers, turned = (layout.numbers.float() for layout in found)
    assert torch.equal(turned, numbers.t())
    assert found.rows.scale == found.columns.scale == scale
    assert (numbers != wanted.float()).float().mean() < 0.01
    assert torch.allclose(numbers, wanted.float(), rtol=0.26, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(40, 1100), (3, 5)])
def test_the_largest_magnitude_is_found_by_tiles_too(rows, columns):
    x = drawn(rows, columns)
    for one, other in zip(fp8_cast.cast_made(x, "e5m2"), fp8_cast.cast(x, "e5m2"), strict=True):
        assert one.scale == other.scale
        assert torch.equal(one.numbers.float(), other.numbers.float())
    assert torch.equal(fp8_cast._peaks(-x.exp()).amax(), x.exp().amax())


def test_strides_and_zeros_are_served_and_what_is_not_finite_shows():
    x = drawn(24, 40)
    turned = fp8_cast.cast(x.t(), "e4m3")
    plain = fp8_cast.cast(x, "e4m3")
    assert torch.equal(turned.rows.numbers.float(), plain.columns.numbers.float())
    assert not fp8_cast.cast(torch.zeros_like(x), "e5m2").rows.numbers.float().any()
    for bad in (torch.inf, torch.nan):
        x[3, 4] = bad
        numbers, scale = fp8_cast.cast(x, "e4m3").rows
        assert (numbers.float() * scale).isnan().any()


def test_pytorch_finds_the_operator_registered_as_it_behaves():
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(fp8_cast._both_layouts, (drawn(6, 5), scale, "e5m2"))
    torch.library.opcheck(fp8_cast._peaks, (drawn(6, 5),))
