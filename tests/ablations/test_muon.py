"""Muon against a loop of SVDs in fp64; everything that is not a hidden matrix keeps AdamW."""

import numpy as np
import pytest
import torch

from ablab.core.language.declare import Param
from ablab.core.train.banks import Optimizer

STEADY = {"schedule": "constant", "optim__clip": None}


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def polar(matrix: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("shape", "scale", "factor"),
    [
        ((12, 8), "keller", (12 / 8) ** 0.5),
        ((8, 12), "keller", 1.0),
        ((8, 12), "spectral", (8 / 12) ** 0.5),
        ((8, 12), "rms", 0.2 * 12**0.5),
    ],
)
def test_muon_equals_an_fp64_loop_of_svds(tiny, drive, nesterov, shape, scale, factor):
    """Averaged momentum, Nesterov before the polar factor, shape factor after it; decay at lr * muon.lr alone."""
    dose = {
        "lr": 2.5,
        "momentum": 0.9,
        "warmup_from": 0.9,
        "nesterov": nesterov,
        "ns": "exact",
        "scale": scale,
    }
    start = {"w": (Param(shape, "hidden"), randn(*shape))}
    gradients = [{"w": (1 + t) * randn(*shape, seed=t + 1)} for t in range(6)]
    seen, _ = drive(tiny([{"muon": dose}], optim__lr=0.02, **STEADY), start, gradients)
    weight = fp64(start["w"][1]).copy()
    mean = np.zeros(shape)
    for t, gradient in enumerate(gradients, 1):
        g = fp64(gradient["w"])
        mean = 0.9 * mean + 0.1 * g
        direction = polar(0.1 * g + 0.9 * mean if nesterov else mean)
        weight = weight - 0.02 * 2.5 * (factor * direction + 0.1 * weight)
        assert apart(fp64(seen[t]["w"]), weight) < 1e-5, t


def test_momentum_may_warm_up_from_085(tiny, drive):
    """Seen through the direction alone: two orthogonal rank-one gradients, whose mixture tells the momentum used."""
    dose = {
        "lr": 1.0,
        "momentum": 0.95,
        "warmup_from": 0.85,
        "warmup_steps": 2,
        "ns": "exact",
        "nesterov": False,
    }
    recipe = tiny(
        [{"muon": dose}], optim__lr=1.0, optim__chains__hidden__steps=["adam"], **STEADY
    )
    seen, optimizer = drive(
        recipe,
        {"w": (Param((2, 3), "hidden"), torch.zeros(2, 3))},
        [{"w": randn(2, 3, seed=1)}, {"w": randn(2, 3, seed=2)}],
    )
    # 0.90 at step 1, 0.95 from step 2.
    expected = 0.95 * (0.1 * randn(2, 3, seed=1)) + 0.05 * randn(2, 3, seed=2)
    state = optimizer.banks[0].state["momentum"]["mean"][0]
    assert apart(state, expected) < 1e-6
    assert apart(fp64(seen[1]["w"] - seen[2]["w"]), polar(fp64(expected))) < 1e-4


def test_only_hidden_matrices_change_their_chain(tiny):
    before = tiny().optim
    muon = tiny(["muon"]).optim
    assert {role for role in before.chains if before.chains[role] != muon.chains[role]} == {
        "hidden"
    }
    assert [step.kind for step in muon.chains["hidden"].steps] == [
        "momentum",
        "orthogonalize",
        "decay",
    ]
    # The same decay.
    assert muon.chains["hidden"].steps[-1] == before.chains["hidden"].steps[-1]
    assert (muon.lr, muon.clip) == (before.lr, before.clip)


def test_everything_else_takes_the_very_steps_of_adamw(tiny, build):
    """Bit for bit, under equal gradients: embedding, readout, gains and gates."""
    after = []
    for treatment in (["gating", "qk_norm"], ["gating", "qk_norm", "muon"]):
        recipe = tiny(treatment, optim__clip=None)
        model = build(recipe)
        optimizer = Optimizer(model, recipe)
        for t in range(1, 4):
            for i, value in enumerate(model.parameters()):
                value.grad.copy_(randn(*value.shape, seed=100 * t + i))
            optimizer.step(t)
        after.append({name: value for name, value in model.named_parameters()})
    for name, value in after[0].items():
        assert torch.equal(value, after[1][name]) == (value.declared.role != "hidden"), name


def test_the_default_learning_rates_are_those_of_the_imu1_ablations(tiny):
    """0.0235 for matrices beside 0.007 for the rest."""
    recipe = tiny(["muon"], optim__lr=0.007)
    assert abs(recipe.optim.lr * recipe.optim.chains["hidden"].lr - 0.0235) < 5e-5
    assert all(
        recipe.optim.chains[role].lr == 1.0
        for role in ("embedding", "readout", "vector", "gate")
    )


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("joint", 1),
        ("blocks", 3),
        ("heads", 8),
    ],
)
def test_each_split_gives_every_piece_of_qkv_its_own_unit_spectrum(tiny, build, split, pieces):
    """Grouped queries: 4 + 2 + 2 heads of 8, so q is [32, 32] and k, v are [16, 32]."""
    recipe = tiny(
        [{"muon": {"lr": 1.0, "ns": "exact", "scale": "spectral", "split": split}}],
        model__attention__group=2,
        optim__lr=1.0,
        optim__chains__hidden__steps=["adam"],
        **STEADY,
    )
    model = build(recipe)
    optimizer = Optimizer(model, recipe)
    weight = model.blocks[1].attention.qkv.weight
    before = weight.detach().clone()
    for i, value in enumerate(model.parameters()):
        value.grad.copy_(randn(*value.shape, seed=i))
    optimizer.step(1)
    moved = fp64(before - weight.detach())
    sizes = {"joint": (64,), "blocks": (32, 16, 16), "heads": (8,) * 8}[split]
    assert len(sizes) == pieces
    for piece in np.split(moved, np.cumsum(sizes)[:-1]):
        spectrum = np.linalg.svd(piece, compute_uv=False)
        assert apart(spectrum, (len(piece) / 32) ** 0.5) < 1e-5
