"""The kernels of the optimizer step against the chains that they replace, and against fp64."""

from itertools import pairwise
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


BLOCKS = [(), (1,), (9, 9), (12, 4, 4), (40,)]  # rows of each


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw)


def parameters(rows, columns, blocks, head=0, count=2):
    """`count` hidden matrices in one bank, an embedding and a vector."""
    matrix = Param((rows, columns), "hidden", blocks=blocks, head=head)
    hidden = {f"w{i}": drawn(matrix, seed=i) for i in range(count)}
    return hidden | {
        "table": drawn(Param((7, columns), "embedding"), seed=8),
        "gain": drawn(Param((columns,), "vector"), seed=9),
    }


def drawn(param, seed=0):
    """The declaration and a first value."""
    return param, randn(*param.shape, seed=seed)


def gradients(start, steps=4, scale=0.3):
    """For each step, name -> gradient; they grow."""

    def at(t):
        size = scale * (t + 1)
        params = enumerate(start.items())
        return {
            name: size * randn(*param.shape, seed=50 * t + i)
            for i, (name, (param, _)) in params
        }

    return [at(t) for t in range(steps)]


def apart(one, other):
    """Relative Frobenius distance, in fp64."""
    one = one.double().cpu()
    other = other.double().cpu()
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


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
    """How far kernels and chains are apart, by what; and the optimizer with kernels."""
    ours, mine = drive(recipe, start, moves, **OURS)
    theirs, chain = drive(recipe, start, moves)
    assert isinstance(mine.move, FusedMove)
    assert not isinstance(chain.move, FusedMove)
    states, wanted = mine.tensors(), chain.tensors()
    assert states.keys() == wanted.keys()
    far = {name: apart(value, wanted[name]) for name, value in states.items()}
    for t, (weights, plain) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in weights.items():
            far[f"{name} after {t}"] = apart(value, plain[name])
    return far, mine


@cpu
@settings(max_examples=12)
@given(
    treatment=st.sampled_from(sorted(TREATMENTS)),
    columns=st.integers(1, 40),
    sizes=st.sampled_from(BLOCKS),
    clip=st.sampled_from([None, 0.5]),
    decay=st.sampled_from(["constant", "linear", "lr"]),
)
def test_every_chain_moves_as_it_is_written(
    tiny, drive, treatment, columns, sizes, clip, decay
):
    """In fp32, over three steps.

    Matrices alone, equal and unequal blocks, more elements than a program takes, a clip that bites or none.
    """
    steps = [{"kind": "adam"}, {"kind": "decay", "rate": 0.3, "schedule": decay}]
    recipe = tiny(
        TREATMENTS[treatment],
        optim__clip=clip,
        optim__lr=0.02,
        **{f"optim__chains__{role}__steps": steps for role in ("hidden", "embedding")},
    )
    assert flaw("optimizer", recipe, "fp32") == ""
    blocks = sizes if len(sizes) > 1 else ()
    head = 3 if sizes == (9, 9) else 0
    start = parameters(sum(sizes) or 11, columns, blocks, head)
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
    start = {"w": drawn(Param((50, 70), "hidden"))}
    moves = gradients(start, 10)
    seen, _ = drive(recipe, start, moves, **OURS)
    weight = start["w"][1].double().requires_grad_()
    rule = torch.optim.AdamW(
        [weight],
        lr=0.02,
        betas=(0.9, 0.999),
        eps=0.1,
        weight_decay=0.1,
    )
    for t, move in enumerate(moves, 1):
        weight.grad = move["w"].double()
        rule.step()
        assert (seen[t]["w"] - weight).abs().max() < 3e-6, t


@cpu
@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999])
def test_under_an_unchanging_gradient_adam_moves_by_the_learning_rate_from_the_first_step(
    tiny, drive, beta2
):
    """m^ = g and sqrt(v^) = |g|, whatever the betas: 1 - beta2^t in fp32 is off by 2e-4 of its value at .9999."""
    recipe = tiny(
        optim__chains__hidden__steps=[{"kind": "adam", "beta2": beta2}],
        schedule="constant",
        optim__clip=None,
        optim__lr=1.0,
    )
    start = {"w": (Param((6, 10), "hidden"), torch.zeros(6, 10))}
    gradient = randn(6, 10)
    moved, _ = drive(recipe, start, [{"w": gradient}] * 12, **OURS)
    for before, after in pairwise(moved):
        step = before["w"] - after["w"]
        assert (step - gradient.sign()).abs().max() < 3e-6


@cpu
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["adam", "muon"])
def test_gradients_that_fall_by_orders_of_magnitude_leave_no_trace_of_their_size(
    tiny, drive, rule, beta
):
    """A running mean that forgets at once must be the new value to the last bit.

    Not the old one plus a difference that rounds away.
    """
    adam = {"kind": "adam", "beta1": beta, "beta2": beta}
    muon = {"momentum": beta, "warmup_from": beta}
    recipes = {
        "adam": tiny(optim__chains__hidden__steps=[adam]),
        "muon": tiny([{"muon": muon}, {"normuon": {"beta2": beta}}]),
    }
    start = parameters(14, 6, ())
    sizes = (1.0, 1e-4, 1e-8, 1e-8)
    moves = [
        {name: size * value for name, value in gradient.items()}
        for gradient, size in zip(gradients(start), sizes, strict=True)
    ]
    found, _ = both(drive, recipes[rule], start, moves)
    assert too_far(found) == {}


@pytest.mark.parametrize("block", [16, optimizer_step.BLOCK])
def test_normuon_by_its_kernel_equals_fp64_and_keeps_the_norm(monkeypatch, block):
    monkeypatch.setattr(optimizer_step, "BLOCK", block)
    rows = 2 * ROWS + 3
    polar = randn(3, rows, 300).to(DEVICE)
    square = randn(3, rows, 1, seed=1).square().to(DEVICE)
    running = 0.9 * square.double()
    scales = row_scales(polar, square, 1.7, 0.9, 1e-8)
    scaled = 1.7 * polar.double()
    running += 0.1 * scaled.square().mean(-1, keepdim=True)
    even = scaled / (running.sqrt() + 1e-8)
    expected = even * norms(scaled) / norms(even)
    found = scales[..., None] * polar
    assert apart(square, running) < 1e-6
    assert apart(found, expected) < 1e-6
    assert apart(norms(found), norms(scaled)) < 1e-6


def norms(matrices):
    """[N,1,1]."""
    return matrices.norm(dim=(-2, -1), keepdim=True)


@cpu
def test_a_zero_gradient_moves_nothing(tiny, drive):
    start = parameters(12, 8, (6, 6))
    roles = ("hidden", "embedding", "vector")
    chains = {f"optim__chains__{role}__steps": [{"kind": "adam"}] for role in roles}
    recipe = tiny(["muon", "normuon"], **chains)
    zeros = {name: torch.zeros_like(value) for name, (_, value) in start.items()}
    (before, after), _ = drive(recipe, start, [zeros], **OURS)
    for name in start:
        assert torch.equal(after[name], before[name])


def test_pytorch_finds_the_operators_registered_as_they_behave():
    def on(*shape, seed=0):
        return randn(*shape, seed=seed).to(DEVICE)

    one = torch.ones((), device=DEVICE)
    tenth = 0.1 * one
    held = [on(2, 20, 30, seed=i).abs() for i in range(4)]
    weight, grad, *_ = held
    matrices = on(2, 20, 30)
    square = on(2, 20, 1).abs()
    check = torch.library.opcheck
    check(adam_step, (*held, one, tenth, one, 0.9, 0.95, 1e-8, "cautious", tenth))
    check(momentum_step, (weight, grad, one, 0.9 * one, True, 1.0, torch.float32))
    check(row_scales, (matrices, square, 1.0, 0.95, 1e-8))
    check(apply_rows, (weight, matrices, on(2, 20), 1.0, one, "none", None))


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


@pytest.mark.parametrize(
    "shape",
    [(2, 256, 512), (2, 768, 256), (3, 128, 128)],
    ids=str,
)
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
        matrix = Param((rows, columns), "hidden")
        names = [f"w{i}" for i in range(count)]
        start = {name: (matrix, torch.zeros(rows, columns)) for name in names}
        move = {name: 1e-4 * randn(rows, columns, seed=i) for i, name in enumerate(names)}

        def furthest(**how):
            (_, after), _ = drive(recipe, start, [move], "cuda", **how)
            return max(apart(after[name], exact(move[name])) for name in names)

        def exact(gradient):
            polar = newton_schulz(gradient.double()[None], "polar7", torch.float64)
            return -(max(1, rows / columns) ** 0.5) * polar[0]

        assert furthest(**OURS) <= 1.1 * furthest()

    def test_steps_repeat_their_bits(self, tiny, drive, shape):
        _, rows, columns = shape
        recipe = tiny(["muon", "normuon", "cautious_wd"])
        start = parameters(rows, columns, (rows // 2, rows // 2))

        def weights_after():
            seen, _ = drive(recipe, start, gradients(start), "cuda", **OURS)
            return seen[-1]

        first, again = weights_after(), weights_after()
        for name in first:
            assert torch.equal(first[name], again[name])
