"""NorMuon: one second moment per output row, and the update keeps its Frobenius norm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.normuon import NorMuon
from ablab.core.errors import UserError
from ablab.core.language.declare import Param

STEADY = {"schedule": "constant", "optim__clip": None}
# No decay, learning rate 1.
BARE = {
    "optim__chains__hidden__steps": ["adam"],
    "optim__lr": 1.0,
    **STEADY,
}


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one(shape, **more):
    return {"w": (Param(shape, "hidden", **more), torch.zeros(shape))}


def uneven(*shape, seed=0):
    """A gradient whose rows differ a hundredfold: the rows of its polar factor differ too."""
    return randn(*shape, seed=seed) * torch.logspace(-1, 1, shape[0])[:, None]


def step_one(tiny, drive, gradient, treatment, **muon):
    recipe = tiny([{"muon": {"lr": 1.0, **muon}}, *treatment], **BARE)
    seen, optimizer = drive(recipe, one(tuple(gradient.shape)), [{"w": gradient}])
    return -seen[1]["w"], optimizer


@pytest.mark.parametrize("ns", ["polar7", "exact"])
@pytest.mark.parametrize("shape", [(32, 12), (12, 32), (24, 24)])
def test_the_first_update_has_equal_rows_and_muons_frobenius_norm(tiny, drive, ns, shape):
    plain, _ = step_one(tiny, drive, uneven(*shape), [], ns=ns)
    normed, _ = step_one(tiny, drive, uneven(*shape), ["normuon"], ns=ns)
    rows = normed.double().norm(dim=1)
    assert (rows.std() / rows.mean()).item() < 1e-3
    assert abs(normed.norm() / plain.norm() - 1).item() < 1e-3
    if shape == (32, 12):  # there was something to even out
        plain_rows = plain.norm(dim=1)
        assert (plain_rows.std() / plain_rows.mean()).item() > 0.02


@pytest.mark.parametrize("blocks", [(), (16, 8, 8)])
def test_normuon_equals_an_fp64_loop(tiny, drive, blocks):
    """v <- b v + (1-b) mean(O^2) a row; O / (sqrt(v) + eps), rescaled to |O|_F of each block; gradients change."""
    recipe = tiny(
        [
            {"muon": {"lr": 1.0, "ns": "exact", "momentum": 0.9, "warmup_from": 0.9}},
            {"normuon": {"beta2": 0.8}},
        ],
        **BARE,
    )
    gradients = [uneven(32, 12, seed=t) for t in range(5)]
    seen, _ = drive(recipe, one((32, 12), blocks=blocks), [{"w": g} for g in gradients])
    weights = [fp64(one["w"]) for one in seen]
    borders = np.cumsum(blocks)[:-1]
    mean = np.zeros((32, 12))
    energy = np.zeros((32, 1))
    for t, gradient in enumerate(gradients, 1):
        g = fp64(gradient)
        mean = 0.9 * mean + 0.1 * g
        pieces = np.split(0.1 * g + 0.9 * mean, borders)
        expected = []
        for piece, v in zip(pieces, np.split(energy, borders), strict=True):
            u, _, vt = np.linalg.svd(piece, full_matrices=False)
            o = u @ vt * max(1, len(piece) / 12) ** 0.5
            square = (o**2).mean(1, keepdims=True)
            v[:] = 0.8 * v + 0.2 * square
            scaled = o / (np.sqrt(v) + 1e-8)
            expected.append(scaled * np.linalg.norm(o) / np.linalg.norm(scaled))
        update = weights[t - 1] - weights[t]
        assert np.abs(update - np.concatenate(expected)).max() < 2e-5, t


def test_under_a_constant_gradient_the_rows_reach_unit_rms(tiny, drive):
    """v -> mean(O^2), so O / sqrt(v) has rows of RMS 1 and the rescaled update rows of RMS |O|_F / sqrt(o i)."""
    muon = {"muon": {"lr": 1.0}}
    gradients = [{"w": uneven(32, 12)}] * 250
    seen, optimizer = drive(tiny([muon, "normuon"], **BARE), one((32, 12)), gradients)
    plain, _ = drive(tiny([muon], **BARE), one((32, 12)), gradients)
    update = (seen[-2]["w"] - seen[-1]["w"]).double()
    direction = (plain[-2]["w"] - plain[-1]["w"]).double()
    square = optimizer.banks[0].state["normuon"]["square0"][0].double()
    expected = direction.norm() / (32 * 12) ** 0.5
    assert (row_rms(direction / square.sqrt()) - 1).abs().max() < 1e-3
    assert (row_rms(update) / expected - 1).abs().max() < 1e-3


def row_rms(matrix):
    return matrix.square().mean(1).sqrt()


def stub(blocks=()):
    return SimpleNamespace(blocks=blocks, matmul=torch.float32)


@pytest.mark.parametrize(
    ("axis", "wide", "tall"),
    [
        ("row", (1, 12, 1), (1, 64, 1)),
        ("shape_rule", (1, 1, 768), (1, 64, 1)),
    ],
)
def test_rows_are_output_rows_even_for_a_gate_of_12_by_768(axis, wide, tall):
    """The shape rule would keep 768 numbers for such a gate, one per input channel."""
    rule = NorMuon(axis=axis)
    for shape, expected in (((1, 12, 768), wide), ((1, 64, 16), tall)):
        matrix = randn(*shape) * torch.logspace(-1, 1, shape[1])[None, :, None]
        state = rule.state(matrix, stub())
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "square0": expected
        }
        assert not state["square0"].any()
        out, new = rule.update(matrix, None, state, stub(), None)
        along = 2 if expected[2] == 1 else 1
        norms = out.norm(dim=along)
        assert (norms.std() / norms.mean()).item() < 1e-3
        assert new["square0"].shape == expected
        assert abs(out.norm() / matrix.norm() - 1).item() < 1e-3


def test_the_state_is_one_number_an_output_row_of_each_matrix_in_the_bank(tiny, build):
    from ablab.core.train.banks import Optimizer

    recipe = tiny(["muon", "normuon"], model__attention__group=2)
    shapes = {}
    for bank in Optimizer(build(recipe), recipe).banks:
        if bank.chain == recipe.optim.chains["hidden"]:
            shapes[bank.names[0].split(".", 2)[2]] = [
                tuple(value.shape) for value in bank.state["normuon"].values()
            ]
    assert shapes == {
        "attention.qkv.weight": [
            (3, 32, 1),
            (3, 16, 1),
            (3, 16, 1),
        ],
        "attention.out.weight": [(3, 32, 1)],
        "ffn.inner.gate_up.weight": [(6, 64, 1)],
        "ffn.inner.down.weight": [(3, 32, 1)],
    }


def test_blocks_keep_their_own_frobenius_norm(tiny, drive):
    """Rescaled jointly, a block of strong rows would take its step size from its neighbour."""
    start = one((24, 12), blocks=(8, 8, 8))
    recipes = [
        tiny([{"muon": {"lr": 1.0, "ns": "exact"}}, *more], **BARE)
        for more in ([], ["normuon"])
    ]
    gradients = [{"w": uneven(24, 12)}]
    plain, normed = (-drive(recipe, start, gradients)[0][1]["w"] for recipe in recipes)
    for before, behind in zip(plain.split(8), normed.split(8), strict=True):
        assert abs(behind.norm() / before.norm() - 1).item() < 1e-3


@pytest.mark.parametrize("scale", ["keller", "spectral", "rms"])
def test_the_shape_factor_of_muon_survives(tiny, drive, scale):
    gradient = uneven(8, 32)
    plain, _ = step_one(tiny, drive, gradient, [], scale=scale, ns="exact")
    normed, _ = step_one(tiny, drive, gradient, ["normuon"], scale=scale, ns="exact")
    factors = {
        "keller": 1.0,
        "spectral": (8 / 32) ** 0.5,
        "rms": 0.2 * 32**0.5,
    }
    norm = normed.norm().item()
    assert norm == pytest.approx(8**0.5 * factors[scale], rel=1e-3)
    assert plain.norm().item() == pytest.approx(norm, rel=1e-3)


def test_a_silent_row_stays_silent():
    """A neuron without a gradient: 0 / (0 + eps), not NaN, and the others still fill the norm."""
    matrix = randn(1, 6, 10)
    matrix[0, 2] = 0
    rule = NorMuon()
    out, _ = rule.update(matrix, None, rule.state(matrix, stub()), stub(), None)
    assert out.isfinite().all()
    assert not out[0, 2].any()
    assert abs(out.norm() / matrix.norm() - 1).item() < 1e-3


def test_normuon_without_muon_is_refused(tiny):
    with pytest.raises(UserError, match="normuon builds on muon; add muon to the same cell"):
        tiny(["normuon"])


def test_normuon_keeps_the_weight_decay_of_the_chain(tiny):
    """The arm without cautious decay must still decay."""
    steps = tiny(["muon", "normuon"]).optim.chains["hidden"].steps
    kinds = [step.kind for step in steps]
    assert kinds == ["momentum", "orthogonalize", "normuon", "decay"]
