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


def orthogonal(size, seed=0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def with_spectrum(rows, columns, seed=0):
    """A matrix whose smallest singular value is 0.012 of its Frobenius norm, the others log-spaced above; and U, V."""
    rank = min(rows, columns)
    s = np.exp(np.linspace(0, np.log(0.02), rank))
    s[-1] = 0.0121 * np.linalg.norm(s)
    s = np.sort(s)[::-1]
    u, v = orthogonal(rows, seed)[:, :rank], orthogonal(columns, seed + 1)[:, :rank]
    return torch.from_numpy(u * s @ v.T).float(), u, s, v


@pytest.mark.parametrize("coefficients", RANGES)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_newton_schulz_lands_in_its_stated_range_and_follows_its_polynomial(
    coefficients, shape
):
    matrix, u, s, v = with_spectrum(*shape)
    assert s.min() >= 0.01 * np.linalg.norm(s)
    out = newton_schulz(matrix, coefficients, torch.float32).double().numpy()
    low, high = RANGES[coefficients]
    spectrum = np.linalg.svd(out, compute_uv=False)
    assert low - MARGIN < spectrum.min() and spectrum.max() < high + MARGIN
    divisor, triples = COEFFICIENTS[coefficients]
    x = s / np.linalg.norm(s) / divisor
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    assert (
        np.abs(u.T @ out @ v - np.diag(x)).max() < 2e-4
    )  # the singular vectors stay, each value moves by itself


@pytest.mark.parametrize("coefficients", RANGES)
def test_the_stated_range_is_that_of_the_whole_interval(coefficients):
    """The ends are reached within 0.01, so the comment neither flatters nor slanders.  polar7 holds from 0.001 already."""
    divisor, triples = COEFFICIENTS[coefficients]
    x = np.linspace(0.001 if coefficients == "polar7" else 0.01, 1, 200_001) / divisor
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    low, high = RANGES[coefficients]
    assert low - MARGIN < x.min() < low + 0.01 and high - 0.01 < x.max() < high + MARGIN


def test_a_batch_is_orthogonalised_matrix_by_matrix():
    """Each matrix by its own norm: one norm over the bank would leave the small one unlifted."""
    pair = torch.stack(
        [with_spectrum(16, 24, seed=1)[0], 1e-3 * with_spectrum(16, 24, seed=3)[0]]
    )
    together = newton_schulz(pair, "polar7", torch.float32)
    for i in range(2):
        torch.testing.assert_close(
            together[i],
            newton_schulz(pair[i : i + 1], "polar7", torch.float32)[0],
            rtol=0,
            atol=1e-5,
        )
    assert np.linalg.svd(together[1].double().numpy(), compute_uv=False).min() > 0.9


@pytest.mark.parametrize("coefficients", RANGES)
def test_bf16_products_cost_less_than_two_percent(coefficients):
    matrix, *_ = with_spectrum(32, 48)
    spectra = [
        np.linalg.svd(
            newton_schulz(matrix, coefficients, dtype).double().numpy(), compute_uv=False
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    low, high = RANGES[coefficients]
    assert low - 0.025 < spectra[1].min() and spectra[1].max() < high + 0.025
    assert not np.array_equal(*spectra)


def test_exact_is_the_polar_factor_of_the_svd():
    matrix = randn(3, 12, 20)
    u, _, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert np.abs(polar_factor(matrix).double().numpy() - u @ vt).max() < 1e-5


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


def update(tiny, drive, gradient, **dose):
    return moved(tiny, drive, one(tuple(gradient.shape)), {"w": gradient}, **dose)["w"]


SETS = [*RANGES, "exact"]


@pytest.mark.parametrize("ns", ["you5", "exact"])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (12, 96)])
def test_the_rms_of_an_orthogonal_update_is_one_over_root_of_the_longer_side(
    tiny, drive, ns, shape
):
    flat = update(tiny, drive, with_spectrum(*shape)[0], ns=ns, scale="rms") / (
        0.2 * max(shape) ** 0.5
    )
    assert abs(flat.square().mean().sqrt().item() * max(shape) ** 0.5 - 1) < 0.03


@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (16, 16)])
def test_scales_are_those_of_the_papers(tiny, drive, shape):
    """RMS of an exactly orthogonal matrix is 1/sqrt(max(o, i)); every scale multiplies it."""
    rows, columns = shape
    flat = 1 / max(shape) ** 0.5
    expected = {
        "spectral": (rows / columns) ** 0.5,
        "keller": max(1, rows / columns) ** 0.5,
        "rms": 0.2 * max(rows, columns) ** 0.5,
    }
    for scale, factor in expected.items():
        rms = (
            update(tiny, drive, with_spectrum(*shape)[0], ns="exact", scale=scale)
            .square()
            .mean()
            .sqrt()
            .item()
        )
        assert abs(rms / (flat * factor) - 1) < 1e-4, scale


@pytest.mark.parametrize("ns", SETS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_rotating_the_gradient_rotates_the_update(tiny, drive, ns, shape):
    gradient, *_ = with_spectrum(*shape)
    left, right = (torch.from_numpy(orthogonal(size, seed=7)).float() for size in shape)
    expected = left @ update(tiny, drive, gradient, ns=ns) @ right
    assert (update(tiny, drive, left @ gradient @ right, ns=ns) - expected).abs().max() < 5e-4


@pytest.mark.parametrize("ns", SETS)
def test_the_size_of_the_gradient_does_not_matter_and_its_sign_does(tiny, drive, ns):
    gradient, *_ = with_spectrum(12, 20)
    plain = update(tiny, drive, gradient, ns=ns)
    for size in (
        1000.0,
        0.01,
    ):  # the norm's 1e-7 shrinks a momentum of norm 1e-3 by 1e-4, and polar7 multiplies that by 20
        assert (update(tiny, drive, size * gradient, ns=ns) - plain).abs().max() < 4e-3
    assert torch.equal(
        update(tiny, drive, 2.0**10 * gradient, ns="kj5"),
        update(tiny, drive, 2.0**12 * gradient, ns="kj5"),
    )
    assert torch.equal(update(tiny, drive, -gradient, ns=ns), -plain) or ns == "exact"
    assert (update(tiny, drive, -gradient, ns=ns) + plain).abs().max() < 1e-5
    assert plain.abs().max() > 0.1


# ---- fused matrices ----


@pytest.mark.parametrize("blocks", [(8, 8, 8), (16, 8, 8), (12, 12)])
@pytest.mark.parametrize("treatment", [[], ["normuon"]])
@pytest.mark.parametrize("scale", ["keller", "rms"])
def test_blocks_of_a_fused_matrix_move_as_separate_parameters(
    tiny, drive, blocks, treatment, scale
):
    """Bit for bit, over steps with momentum, decay and row normalisation: shape factors and norms are those of each block."""
    recipe = tiny(
        [{"muon": {"scale": scale}}, *treatment], schedule="constant", optim__clip=None
    )
    rows, weight = sum(blocks), randn(sum(blocks), 10)
    gradients = [randn(rows, 10, seed=t) for t in range(1, 4)]
    fused, _ = drive(
        recipe,
        {"w": (Param((rows, 10), "hidden", blocks=blocks), weight)},
        [{"w": g} for g in gradients],
    )
    parts = {
        f"w{i}": (Param((size, 10), "hidden"), piece)
        for i, (size, piece) in enumerate(zip(blocks, weight.split(blocks), strict=True))
    }
    apart, _ = drive(
        recipe,
        parts,
        [{f"w{i}": piece for i, piece in enumerate(g.split(blocks))} for g in gradients],
    )
    assert torch.equal(fused[3]["w"], torch.cat([apart[3][name] for name in parts]))


def test_split_heads_moves_each_head_apart_and_joint_moves_all_as_one(tiny, drive):
    rows, gradient = 32, randn(32, 12)
    start = one((rows, 12), blocks=(16, 8, 8), head=4)
    by = {
        split: moved(tiny, drive, start, {"w": gradient}, split=split, ns="exact")["w"]
        for split in ("joint", "blocks", "heads")
    }
    for split, sizes in {"joint": (32,), "blocks": (16, 8, 8), "heads": (4,) * 8}.items():
        expected = []
        for piece in np.split(gradient.double().numpy(), np.cumsum(sizes)[:-1]):
            u, _, vt = np.linalg.svd(piece, full_matrices=False)
            expected.append(u @ vt * max(1, len(piece) / 12) ** 0.5)
        assert np.abs(by[split].double().numpy() - np.concatenate(expected)).max() < 1e-5, split
    assert (by["joint"] - by["blocks"]).abs().max() > 1e-2 and (
        by["blocks"] - by["heads"]
    ).abs().max() > 1e-2


def test_the_model_declares_its_fused_matrices(tiny, build):
    """q, k, v and gate, up are apart under muon; heads are those of q, k and v; out and down are one matrix each."""
    block = build(tiny(model__attention__group=2)).blocks[0]
    assert (
        block.attention.qkv.weight.declared.blocks,
        block.attention.qkv.weight.declared.head,
    ) == ((32, 16, 16), 8)
    assert (
        block.ffn.inner.gate_up.weight.declared.blocks == (64, 64)
        and block.ffn.inner.gate_up.weight.declared.head == 0
    )
    assert (
        block.attention.out.weight.declared.blocks
        == block.ffn.inner.down.weight.declared.blocks
        == ()
    )


def test_a_zero_gradient_gives_a_zero_update(tiny, drive):
    """Not NaN: a matrix may be cut off from the loss for a step."""
    for ns in RANGES:
        assert not update(tiny, drive, torch.zeros(6, 8), ns=ns).any()
