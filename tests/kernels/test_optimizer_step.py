"""The kernels of the optimizer step against the chains that they replace, and against fp64."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.fusion.optimizer import FusedMove
from ablab.core.fusion.places import flaw
from ablab.core.language.declare import Param
from ablab.core.parts.transforms import newton_schulz
from ablab.kernels import optimizer_step
from ablab.kernels.optimizer_step import ROWS, adam_step, apply_rows, momentum_step, row_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="products are in bf16 on a GPU, in fp32 here"
)
OURS = {"kernels": {"optimizer", "newton_schulz"}}
RISING = {"momentum": 0.9, "warmup_from": 0.7, "warmup_steps": 3}
TREATMENTS = {
    "adam": [],
    "adam, cautious": ["cautious_wd"],
    "adam, strictly cautious": [{"cautious_wd": {"ties": False}}],
    "muon": ["muon"],
    "muon, heavy ball": [{"muon": {"nesterov": False, "scale": "rms", "ns": "kj5"}}],
    "muon, rising": [{"muon": RISING | {"scale": "spectral", "ns": "you5"}}, "cautious_wd"],
    "normuon": ["muon", "normuon"],
    "all": [
        {"muon": {"ns": "polar5"}},
        {"normuon": {"beta2": 0.8, "eps": 1e-3}},
        "cautious_wd",
    ],
    "heads": [{"muon": {"split": "heads"}}, "normuon"],
    "joint": [{"muon": {"split": "joint"}}, "normuon"],
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(rows, columns, blocks, head=0, count=2):
    """`count` hidden matrices in one bank, an embedding and a vector."""
    hidden = {
        f"w{i}": (
            Param((rows, columns), "hidden", blocks=blocks, head=head),
            randn(rows, columns, seed=i),
        )
        for i in range(count)
    }
    return hidden | {
        "table": (Param((7, columns), "embedding"), randn(7, columns, seed=8)),
        "gain": (Param((columns,), "vector"), randn(columns, seed=9)),
    }


def gradients(start, steps=4, scale=0.3):
    return [
        {
            name: scale * (t + 1) * randn(*one.shape, seed=50 * t + i)
            for i, (name, (one, _)) in enumerate(start.items())
        }
        for t in range(steps)
    ]


def apart(one, other):
    """Relative Frobenius distance, in fp64."""
    return (
        (one.double().cpu() - other.double().cpu()).norm()
        / other.double().cpu().norm().clamp(min=1e-12)
    ).item()


def too_far(found):
    """What errs by more than 3e-5, or 3e-4 where NorMuon keeps the squares of what Newton-Schulz returns.

    A singular value near 1 enters its polynomials where terms of opposite signs nearly cancel: they multiply a rounding
    by up to 1,700 (polar7) or 650 (polar5), a square doubles it, and 2 * 1,700 * 2^-24 is 2e-4.
    """
    return {
        name: far
        for name, far in found.items()
        if not far < (3e-4 if "/normuon/" in name else 3e-5)
    }


def both(drive, recipe, start, moves):
    (ours, mine), (theirs, chain) = (
        drive(recipe, start, moves, **OURS),
        drive(recipe, start, moves),
    )
    assert isinstance(mine.move, FusedMove)
    assert not isinstance(chain.move, FusedMove)
    assert mine.tensors().keys() == chain.tensors().keys()
    states = {
        name: apart(value, chain.tensors()[name]) for name, value in mine.tensors().items()
    }
    weights = {
        f"{name} after {t}": apart(at[name], theirs[t][name])
        for t, at in enumerate(ours)
        for name in at
    }
    return states | weights, mine


@cpu
@settings(max_examples=12)
@given(
    treatment=st.sampled_from(sorted(TREATMENTS)),
    columns=st.integers(1, 40),
    sizes=st.sampled_from([(), (1,), (9, 9), (12, 4, 4), (40,)]),
    clip=st.sampled_from([None, 0.5]),
    decay=st.sampled_from(["constant", "linear", "lr"]),
)
def test_every_chain_moves_as_it_is_written(
    tiny, drive, treatment, columns, sizes, clip, decay
):
    """In fp32, over three steps: matrices alone, equal and unequal blocks, more elements than a program takes, a clip that bites or none."""
    steps = [{"kind": "adam"}, {"kind": "decay", "rate": 0.3, "schedule": decay}]
    recipe = tiny(
        TREATMENTS[treatment],
        optim__clip=clip,
        optim__lr=0.02,
        **{f"optim__chains__{role}__steps": steps for role in ("hidden", "embedding")},
    )
    assert flaw("optimizer", recipe, "fp32") == ""
    start = parameters(
        sum(sizes) or 11,
        columns,
        sizes if len(sizes) > 1 else (),
        head=3 if sizes == (9, 9) else 0,
    )
    with patch.multiple(optimizer_step, CHUNK=256, BLOCK=16):
        found, mine = both(drive, recipe, start, gradients(start, 3))
    assert too_far(found) == {}
    assert all((bank.grad == 0).all() for bank in mine.banks)


@cpu
def test_adam_by_its_kernel_equals_torch_adamw_in_fp64(tiny, drive):
    recipe = tiny(
        optim__chains__hidden__steps=[
            {"kind": "adam", "beta2": 0.999, "eps": 0.1},
            {"kind": "decay"},
        ],
        schedule="constant",
        optim__clip=None,
        optim__lr=0.02,
    )
    start = {"w": (Param((50, 70), "hidden"), randn(50, 70))}
    moves = gradients(start, 10)
    seen, _ = drive(recipe, start, moves, **OURS)
    weight = start["w"][1].double().requires_grad_()
    rule = torch.optim.AdamW([weight], lr=0.02, betas=(0.9, 0.999), eps=0.1, weight_decay=0.1)
    for t, move in enumerate(moves, 1):
        weight.grad = move["w"].double()
        rule.step()
        assert (seen[t]["w"] - weight).abs().max() < 3e-6, t


@cpu
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["adam", "muon"])
def test_gradients_that_fall_by_orders_of_magnitude_leave_no_trace_of_their_size(
    tiny, drive, rule, beta
):
    """A running mean that forgets at once must be the new value to the last bit, not the old one plus a difference that rounds away."""
    recipe = {
        "adam": tiny(
            optim__chains__hidden__steps=[{"kind": "adam", "beta1": beta, "beta2": beta}]
        ),
        "muon": tiny(
            [{"muon": {"momentum": beta, "warmup_from": beta}}, {"normuon": {"beta2": beta}}]
        ),
    }[rule]
    start = parameters(14, 6, ())
    moves = [
        {name: size * value for name, value in one.items()}
        for one, size in zip(gradients(start), (1.0, 1e-4, 1e-8, 1e-8), strict=True)
    ]
    found, _ = both(drive, recipe, start, moves)
    assert too_far(found) == {}


@pytest.mark.parametrize("block", [16, optimizer_step.BLOCK])
def test_normuon_by_its_kernel_equals_fp64_and_keeps_the_norm(monkeypatch, block):
    monkeypatch.setattr(optimizer_step, "BLOCK", block)
    polar, square = (
        randn(3, 2 * ROWS + 3, 300).to(DEVICE),
        randn(3, 2 * ROWS + 3, 1, seed=1).square().to(DEVICE),
    )
    before, scaled = square.double(), 1.7 * polar.double()
    scales = row_scales(polar, square, 1.7, 0.9, 1e-8)
    running = 0.9 * before + 0.1 * scaled.square().mean(-1, keepdim=True)
    rows = scaled / (running.sqrt() + 1e-8)
    expected = (
        rows * scaled.norm(dim=(-2, -1), keepdim=True) / rows.norm(dim=(-2, -1), keepdim=True)
    )
    assert apart(square, running) < 1e-6 and apart(scales[..., None] * polar, expected) < 1e-6
    assert (
        apart((scales[..., None] * polar).norm(dim=(-2, -1)), scaled.norm(dim=(-2, -1))) < 1e-6
    )


@cpu
def test_a_zero_gradient_moves_nothing(tiny, drive):
    start, chains = (
        parameters(12, 8, (6, 6)),
        {
            f"optim__chains__{role}__steps": [{"kind": "adam"}]
            for role in ("hidden", "embedding", "vector")
        },
    )
    seen, _ = drive(
        tiny(["muon", "normuon"], **chains),
        start,
        [{n: 0 * v for n, (_, v) in start.items()}],
        **OURS,
    )
    assert all(torch.equal(seen[1][name], seen[0][name]) for name in start)


def test_pytorch_finds_the_operators_registered_as_they_behave():
    def on(*shape, seed=0):
        return randn(*shape, seed=seed).to(DEVICE)

    one, w, matrices = (
        torch.ones((), device=DEVICE),
        [on(2, 20, 30, seed=i).abs() for i in range(4)],
        on(2, 20, 30),
    )
    for operator, given_ in (
        (adam_step, (*w, one, 0.1 * one, one, 0.9, 0.95, 1e-8, "cautious", 0.1 * one)),
        (momentum_step, (w[0], w[1], one, 0.9 * one, True, 1.0, torch.float32)),
        (row_scales, (matrices, on(2, 20, 1).abs(), 1.0, 0.95, 1e-8)),
        (apply_rows, (w[0], matrices, on(2, 20), 1.0, one, "none", None)),
    ):
        torch.library.opcheck(operator, given_)


@pytest.mark.parametrize(
    ("treatment", "said"),
    [
        ([], ""),
        (
            [{"muon": {"ns": "exact"}}],
            "the chain of hidden takes exact polar factors, which the kernel does not",
        ),
        (
            ["muon", {"normuon": {"axis": "shape_rule"}}],
            "normuon normalises by shape_rule, and the kernel rows alone",
        ),
    ],
    ids=str,
)
def test_a_chain_that_the_kernels_do_not_know_is_named(tiny, treatment, said):
    assert flaw("optimizer", tiny(treatment), "fp32") == said


@pytest.mark.parametrize(
    ("role", "steps", "said"),
    [
        (
            "embedding",
            ["lion", "decay"],
            "the chain of embedding is lion, decay, which the kernel does not know",
        ),
        ("embedding", [], "the chain of embedding is empty, which the kernel does not know"),
        (
            "vector",
            ["momentum", "orthogonalize"],
            "the chain of vector orthogonalizes, and the kernel matrices alone",
        ),
    ],
)
def test_another_rule_and_a_rule_for_other_shapes_are_named(tiny, role, steps, said):
    chain = {f"optim__chains__{role}__steps": [{"kind": kind} for kind in steps]}
    assert flaw("optimizer", tiny(**chain), "fp32") == said


@pytest.mark.parametrize("shape", [(2, 256, 512), (2, 768, 256), (3, 128, 128)], ids=str)
class TestOnAGPU:
    pytestmark = gpu

    def test_in_bf16_a_step_is_as_close_to_fp64_as_the_chain(self, tiny, drive, shape):
        """A heavy ball from rest: u = 0.05 g, so the polar factor is that of the gradient."""
        count, rows, columns = shape
        recipe = tiny(
            [{"muon": {"nesterov": False, "lr": 1.0}}],
            schedule="constant",
            optim__clip=None,
            optim__lr=1.0,
            optim__chains__hidden__steps=[{"kind": "adam"}],
        )
        start = {
            f"w{i}": (Param((rows, columns), "hidden"), torch.zeros(rows, columns))
            for i in range(count)
        }
        move = {name: 1e-4 * randn(rows, columns, seed=i) for i, name in enumerate(start)}
        exact = {
            name: -(max(1, rows / columns) ** 0.5)
            * newton_schulz(g.double()[None], "polar7", torch.float64)[0]
            for name, g in move.items()
        }
        far = {
            how: max(
                apart(
                    drive(recipe, start, [move], "cuda", kernels=how)[0][1][name], exact[name]
                )
                for name in start
            )
            for how in (("optimizer", "newton_schulz"), ())
        }
        assert far["optimizer", "newton_schulz"] <= 1.1 * far[()], far

    def test_steps_repeat_their_bits(self, tiny, drive, shape):
        recipe, start = (
            tiny(["muon", "normuon", "cautious_wd"]),
            parameters(shape[1], shape[2], (shape[1] // 2,) * 2),
        )
        first, again = (
            drive(recipe, start, gradients(start), "cuda", **OURS)[0][-1] for _ in range(2)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
