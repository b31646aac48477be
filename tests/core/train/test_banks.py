"""The chains against torch and fp64 loops; banks, clipping, decay and the three factors of a learning rate."""

import itertools
import math
from decimal import Decimal

import numpy as np
import pytest
import torch

from ablab.core.language.declare import Param
from ablab.core.model.objective import token_losses
from ablab.core.parts.transforms import bias_correction
from ablab.core.train.banks import Optimizer

STEADY = {"schedule": "constant", "optim__clip": None}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(*names, shape=(6, 10), **more):
    return {
        name: (Param(shape, "hidden", **more), randn(*shape, seed=i + 1))
        for i, name in enumerate(names)
    }


def noise(start, steps, scale=1.0):
    """Gradients of changing size, so that a missing bias correction shows."""
    draws = [
        {
            name: (1 + 0.3 * t) * scale * randn(*one.shape, seed=100 * t + i)
            for i, (name, (one, _)) in enumerate(start.items())
        }
        for t in range(steps)
    ]
    return draws


# ---- the rules ----


@pytest.mark.parametrize(
    ("beta1", "beta2", "eps", "decay"),
    [(0.9, 0.95, 1e-10, 0.1), (0.8, 0.999, 0.3, 0.0), (0.0, 0.5, 1e-3, 0.7)],
)
def test_adam_and_decay_equal_torch_adamw_in_fp64_over_20_steps(
    tiny, drive, beta1, beta2, eps, decay
):
    """eps 0.3 is as large as the denominator: it must stand outside the root and after the bias correction."""
    steps = [
        {"kind": "adam", "beta1": beta1, "beta2": beta2, "eps": eps},
        {"kind": "decay", "rate": decay},
    ]
    start = matrices("w")
    gradients = noise(start, 20)
    seen, _ = drive(
        tiny(optim__chains__hidden__steps=steps, optim__lr=0.02, **STEADY), start, gradients
    )
    weight = start["w"][1].double().requires_grad_()
    torch_rule = torch.optim.AdamW(
        [weight], lr=0.02, betas=(beta1, beta2), eps=eps, weight_decay=decay
    )
    for t, gradient in enumerate(gradients, 1):
        weight.grad = gradient["w"].double()
        torch_rule.step()
        assert (seen[t]["w"] - weight).abs().max() < 3e-6, t
    assert (seen[20]["w"] - seen[0]["w"]).abs().mean() > 0.02


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("step", [1, 2, 3, 100, 3_500, 1_000_000])
def test_a_bias_correction_is_right_to_1e7_of_its_value(beta, step):
    """1 - beta^t in fp32 is off by 2e-4 at .9999."""
    exact = 1 - Decimal(beta) ** step
    found = bias_correction(beta, torch.tensor(float(step)))
    assert found.dtype == torch.float32
    assert abs(Decimal(found.item()) / exact - 1) < Decimal(2e-7)


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.9999])
def test_under_an_unchanging_gradient_adam_moves_by_the_learning_rate_from_the_first_step(
    tiny, drive, beta2
):
    """m^ = g and sqrt(v^) = |g|, whatever the betas."""
    start = {"w": (Param((6, 10), "hidden"), torch.zeros(6, 10))}
    gradient = randn(6, 10)
    adam = {"kind": "adam", "beta2": beta2}
    recipe = tiny(optim__lr=1.0, optim__chains__hidden__steps=[adam], **STEADY)
    moved, _ = drive(recipe, start, [{"w": gradient}] * 5)
    for before, after in itertools.pairwise(moved):
        step = before["w"] - after["w"]
        assert (step - gradient.sign()).abs().max() < 3e-6


def test_lion_equals_an_fp64_loop(tiny, drive):
    start = matrices("w")
    gradients = noise(start, 12)
    steps = [{"kind": "lion", "beta1": 0.8, "beta2": 0.95}, {"kind": "decay", "rate": 0.5}]
    seen, _ = drive(
        tiny(optim__chains__hidden__steps=steps, optim__lr=0.01, **STEADY), start, gradients
    )
    weight, mean = start["w"][1].double().numpy().copy(), np.zeros((6, 10))
    for t, gradient in enumerate(gradients, 1):
        g = gradient["w"].double().numpy()
        weight = weight - 0.01 * (np.sign(0.8 * mean + 0.2 * g) + 0.5 * weight)
        mean = 0.95 * mean + 0.05 * g
        assert np.abs(seen[t]["w"].numpy() - weight).max() < 2e-6, t


def test_sgd_equals_an_fp64_heavy_ball(tiny, drive):
    start = matrices("w")
    gradients = noise(start, 12, scale=0.1)
    seen, _ = drive(
        tiny(
            optim__chains__hidden__steps=[{"kind": "sgd", "momentum": 0.8}],
            optim__lr=0.01,
            **STEADY,
        ),
        start,
        gradients,
    )
    weight, total = start["w"][1].double().numpy().copy(), np.zeros((6, 10))
    for t, gradient in enumerate(gradients, 1):
        total = 0.8 * total + gradient["w"].double().numpy()
        weight = weight - 0.01 * total
        assert np.abs(seen[t]["w"].numpy() - weight).max() < 2e-6, t


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_rises_linearly_and_nesterov_looks_one_step_ahead(tiny, drive, nesterov):
    """0.85 -> 0.95 over 4 steps: 0.875, 0.9, 0.925, 0.95, then 0.95 for good."""
    steps = [
        {
            "kind": "momentum",
            "momentum": 0.95,
            "nesterov": nesterov,
            "warmup_from": 0.85,
            "warmup_steps": 4,
        }
    ]
    start = matrices("w")
    gradients = noise(start, 6)
    seen, _ = drive(
        tiny(optim__chains__hidden__steps=steps, optim__lr=1.0, **STEADY), start, gradients
    )
    weight, mean = start["w"][1].double().numpy().copy(), np.zeros((6, 10))
    for t, (keep, gradient) in enumerate(
        zip([0.875, 0.9, 0.925, 0.95, 0.95, 0.95], gradients, strict=True), 1
    ):
        g = gradient["w"].double().numpy()
        mean = keep * mean + (1 - keep) * g
        weight = weight - (keep * mean + (1 - keep) * g if nesterov else mean)
        assert np.abs(seen[t]["w"].numpy() - weight).max() < 3e-6, t


# ---- banks ----

CHAINS = {
    "adamw": [],
    "lion": [{"base": "lion"}],
    "muon": ["muon"],
    "everything": [{"muon": {"ns": "polar5", "scale": "spectral"}}, "normuon", "cautious_wd"],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("blocks", [(), (4, 4), (4, 2, 2)])
def test_a_bank_moves_each_parameter_as_if_it_stood_alone(tiny, drive, chain, blocks):
    recipe = (
        tiny(optim__chains__hidden__steps=["lion", "decay"], **STEADY)
        if chain == "lion"
        else tiny(CHAINS[chain], **STEADY)
    )
    start = matrices("a", "b", "c", shape=(8, 12), blocks=blocks)
    gradients = noise(start, 4)
    together, optimizer = drive(recipe, start, gradients)
    assert [bank.names for bank in optimizer.banks] == [["a", "b", "c"]]
    for name in start:
        alone, _ = drive(recipe, {name: start[name]}, gradients)
        assert torch.equal(alone[4][name], together[4][name]) and not torch.equal(
            alone[4][name], alone[3][name]
        )


def test_every_parameter_lives_in_exactly_one_bank_of_its_role_and_shape(tiny, build):
    recipe = tiny(["gating", "qk_norm", "muon"])
    model = build(recipe)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    banks = Optimizer(model, recipe).banks
    assert sorted(name for bank in banks for name in bank.names) == sorted(before)
    for bank in banks:
        for i, name in enumerate(bank.names):
            value = model.get_parameter(name)
            assert (
                torch.equal(value, before[name])
                and bank.chain == recipe.optim.chains[value.declared.role]
            )
            assert (
                value.data_ptr() == bank.weight[i].data_ptr()
                and value.grad.data_ptr() == bank.grad[i].data_ptr()
            )
    assert (
        len(banks) == 9
    )  # table; readout; gains of width 32, of 8; qkv, out, gate_up, down; gate


def test_backward_adds_into_the_bank_and_a_step_clears_it(tiny, build, batch):
    recipe = tiny(optim__clip=None)
    model, block = build(recipe), batch(recipe)
    optimizer = Optimizer(model, recipe)
    norms = []
    for _ in range(2):
        token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
        norms.append([bank.grad.norm() for bank in optimizer.banks])
    assert all(norm > 0 for norm in norms[0])
    torch.testing.assert_close(norms[1], [2 * norm for norm in norms[0]], rtol=1e-5, atol=0)
    optimizer.step(1)
    assert all((bank.grad == 0).all() for bank in optimizer.banks)
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters())


# ---- clipping ----

PLAIN = [{"kind": "sgd", "momentum": 0.0}]  # the update is the clipped gradient itself


def plain_everywhere(tiny, **more):
    chains = {
        role: {"steps": PLAIN} for role in ("embedding", "hidden", "readout", "vector", "gate")
    }
    return tiny(**{"schedule": "constant", "optim__chains": chains, "optim__lr": 1.0} | more)


def applied(seen):
    return {name: (seen[0][name].double() - seen[1][name].double()) for name in seen[0]}


def global_norm(tensors) -> float:
    return math.sqrt(sum((value.double() ** 2).sum().item() for value in tensors.values()))


def test_clipping_scales_the_global_norm_of_many_parameters_to_the_limit(tiny, drive):
    """Forty parameters of three roles and shapes: a norm taken of one bank is another number."""
    start = {f"h{i}": (Param((5, 4), "hidden"), torch.zeros(5, 4)) for i in range(20)}
    start |= {f"v{i}": (Param((7,), "vector"), torch.zeros(7)) for i in range(19)} | {
        "e": (Param((9, 4), "embedding"), torch.zeros(9, 4))
    }
    gradients = noise(start, 1, scale=30.0)
    norm = global_norm(gradients[0])
    for limit in (1.0, 0.25):
        moved = applied(drive(plain_everywhere(tiny, optim__clip=limit), start, gradients)[0])
        assert abs(global_norm(moved) / limit - 1) < 1e-5
        for name, gradient in gradients[0].items():
            assert (moved[name] - gradient.double() * limit / norm).abs().max() < 1e-6


def test_gradients_below_the_limit_and_without_a_limit_are_left_alone(tiny, drive):
    start = {f"h{i}": (Param((5, 4), "hidden"), torch.zeros(5, 4)) for i in range(4)}
    gradients = noise(start, 1, scale=10.0)
    for limit in (None, 1.01 * global_norm(gradients[0])):
        seen, _ = drive(plain_everywhere(tiny, optim__clip=limit), start, gradients)
        assert all(
            torch.equal(seen[1][name], -gradient) for name, gradient in gradients[0].items()
        )


def test_a_real_model_is_clipped_and_the_norm_before_is_returned(tiny, build, batch):
    recipe = plain_everywhere(tiny, optim__clip=0.01)
    model, block = build(recipe), batch(recipe)
    optimizer = Optimizer(model, recipe)
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    norm = global_norm({name: value.grad for name, value in model.named_parameters()})
    returned = optimizer.step(1).item()
    after = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert norm > 0.5 and abs(returned / norm - 1) < 1e-5
    assert abs(global_norm(applied([before, after])) / 0.01 - 1) < 1e-3


# ---- decay ----


@pytest.mark.parametrize(
    "treatment", [[], ["cautious_wd"], ["muon"], ["muon", "normuon", "cautious_wd"]]
)
def test_only_hidden_matrices_decay(tiny, build, treatment):
    recipe = tiny([*treatment, "gating", "qk_norm", "value_residual"], schedule="constant")
    model = build(recipe, stirred=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    Optimizer(model, recipe).step(1)  # every gradient is zero: what moves, decays
    factor = 1 - recipe.optim.lr * recipe.optim.chains["hidden"].lr * 0.1
    for name, value in model.named_parameters():
        expected = before[name] * (factor if value.declared.role == "hidden" else 1)
        torch.testing.assert_close(
            value.detach(),
            expected,
            rtol=1e-6 if value.declared.role == "hidden" else 0,
            atol=0,
        )


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda t, m: 1.0),
        ("linear", lambda t, m: 1 - (t - 1) / 12),
        ("lr", lambda t, m: m),
    ],
)
def test_decay_schedules_hit_their_corners(tiny, drive, schedule, factor):
    """Cosine with 3 steps of warm-up and no floor over 12 steps: multiplier 1 at step 3 and 4, 0.03 at 12."""
    recipe = tiny(
        optim__chains__hidden__steps=[{"kind": "decay", "rate": 0.4, "schedule": schedule}],
        optim__lr=0.5,
        schedule__floor=0.0,
    )
    start = matrices("w")
    seen, _ = drive(recipe, start, [{"w": torch.zeros(6, 10)}] * 12)
    for t in range(1, 13):
        multiplier = t / 3 if t < 4 else (1 + math.cos(math.pi * (t - 4) / 9)) / 2
        ratio = seen[t]["w"] / seen[t - 1]["w"]
        assert (
            ratio - (1 - 0.5 * multiplier * 0.4 * factor(t, multiplier))
        ).abs().max() < 1e-6, t


# ---- learning rate ----


def test_a_step_is_optim_lr_times_chain_lr_times_schedule_times_width_factor(tiny, drive):
    """Lion moves by exactly one learning rate.  muP at m = 2: hidden 1/2, vectors 1."""
    recipe = tiny(
        [{"mup": {"base_width": 16}}],
        optim__lr=0.03,
        optim__clip=None,
        optim__chains__hidden={"steps": ["lion"], "lr": 5.0},
        optim__chains__vector={"steps": ["lion"], "lr": 0.1},
    )
    start = {
        "h": (Param((6, 10), "hidden"), torch.zeros(6, 10)),
        "v": (Param((10,), "vector"), torch.zeros(10)),
    }
    seen, _ = drive(recipe, start, [{"h": torch.ones(6, 10), "v": torch.ones(10)}] * 12)
    for t in range(1, 13):
        multiplier = t / 3 if t < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (t - 4) / 9)) / 2
        step = {name: seen[t - 1][name] - seen[t][name] for name in start}
        assert (step["h"] / (0.03 * 5.0 * 0.5 * multiplier) - 1).abs().max() < 2e-5, t
        assert (step["v"] / (0.03 * 0.1 * multiplier) - 1).abs().max() < 2e-5, t


def test_a_compiled_chain_is_the_eager_chain_and_compiles_once_for_all_learning_rates(
    tiny, monkeypatch
):
    """A Python float would compile the chain again at every value of the schedule."""
    from ablab.core.model.layers import parameter

    recipe, compiled = tiny(["cautious_wd"]), 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **more: real(function, backend=count, **more)
    )
    results = []
    for compile in (False, True):
        model = torch.nn.Module()
        model.register_parameter("w", parameter(Param((6, 10), "hidden")))
        model.w.data.copy_(randn(6, 10))
        optimizer = Optimizer(model, recipe, compile)
        for t in range(1, 7):
            model.w.grad.copy_(randn(6, 10, seed=t))
            optimizer.step(t)
        results.append(model.w.detach().clone())
    assert compiled == 1 and torch.equal(*results)
