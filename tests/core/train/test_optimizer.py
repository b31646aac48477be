"""What an optimizer step takes besides its chains: factors on the gradient, periodic work, rates of single members."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from ablab.core.fusion.optimizer import claim
from ablab.core.fusion.rewrite import StepsAside
from ablab.core.language.declare import Param
from ablab.core.language.part import Part
from ablab.core.parts.gradient import GradientFactor
from ablab.core.parts.parametrize import Multipliers, Scales
from ablab.core.parts.transforms import Transform
from ablab.core.recipe.recipe import Chain
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.banks import Optimizer
from ablab.core.train.trainer import Trainer, Warm

CPU = Runtime(device="cpu", compile=False)
ROLES = ("embedding", "hidden", "readout", "vector", "gate")
PLAIN = {role: {"steps": [{"kind": "sgd", "momentum": 0.0}]} for role in ROLES}
STEADY = {"schedule": "constant", "optim__lr": 1.0, "optim__chains": PLAIN}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_matrices():
    return {name: (Param((4, 6), "hidden"), randn(4, 6, seed=i)) for i, name in enumerate("ab")}


def noise(start, steps):
    return [
        {name: (1 + t) * randn(4, 6, seed=10 * t + i) for i, name in enumerate(start)}
        for t in range(steps)
    ]


# ---- optim.on_gradient ----


@dataclass(frozen=True)
class Spikes(GradientFactor):
    """Leaves out a step whose norm exceeds twice the largest before it."""

    kind: str = "spikes"
    times: float = 2.0

    def state(self, like):
        return {"largest": like + 1e9}

    def factor(self, norm, state, now):
        factor = (norm <= self.times * state["largest"]).float()
        return factor, {
            "largest": torch.where(now.step > 1, state["largest"].maximum(norm), norm)
        }


@dataclass(frozen=True)
class Times(GradientFactor):
    """A number."""

    by: float
    kind: str = "times"

    def factor(self, norm, state, now):
        return norm.new_tensor(self.by), {}


def with_factors(recipe, *parts):
    return replace(recipe, optim=replace(recipe.optim, on_gradient=parts))


def moved(seen):
    return [
        {name: before[name] - after[name] for name in before}
        for before, after in zip(seen, seen[1:], strict=False)
    ]


def test_a_factor_multiplies_every_gradient_after_the_clip(tiny, drive):
    start = two_matrices()
    gradients = noise(start, 3)
    clipped, _ = drive(tiny(**STEADY, optim__clip=0.5), start, gradients)
    recipe = with_factors(
        tiny(**STEADY, optim__clip=0.5), Times(3.0), replace(Times(0.5), kind="half")
    )
    scaled, _ = drive(recipe, start, gradients)
    for plain, ours in zip(moved(clipped), moved(scaled), strict=True):
        for name in start:
            torch.testing.assert_close(ours[name], 1.5 * plain[name], rtol=1e-4, atol=1e-6)


def test_a_factor_sees_the_norm_before_the_clip_and_keeps_state(tiny, drive):
    """Norms 1, 1, 5, 2, 9: the third is left out (5 > 2), the last is not (9 <= 2 * 5)."""
    start = two_matrices()
    unit = {name: torch.zeros(4, 6) for name in start}
    unit["a"][0, 0] = 1.0
    gradients = [{name: size * one for name, one in unit.items()} for size in (1, 1, 5, 2, 9)]
    recipe = with_factors(tiny(**STEADY, optim__clip=0.5), Spikes())
    seen, _ = drive(recipe, start, gradients)
    steps = [round(one["a"][0, 0].item(), 4) for one in moved(seen)]
    assert steps == [0.5, 0.5, 0.0, 0.5, 0.5]


def test_an_empty_slot_keeps_nothing_and_a_full_one_is_saved(tiny, token_folder, tmp_path):
    assert not [
        name for name in Trainer(tiny(), CPU, token_folder).tensors() if "on_gradient" in name
    ]
    recipe = with_factors(tiny(), Spikes(times=0.5))
    whole, stopped, resumed = (Trainer(recipe, CPU, token_folder) for _ in range(3))
    assert "optimizer/on_gradient/spikes/largest" in whole.tensors()
    for _ in range(8):
        whole.advance()
    for _ in range(4):
        stopped.advance()
    stopped.save(tmp_path)
    stopped.saver.wait()
    resumed.restore(tmp_path, print)
    for _ in range(4):
        resumed.advance()
    assert resumed.digest() == whole.digest() != Trainer(recipe, CPU, token_folder).digest()


def test_a_warm_trainer_forgets_the_state_of_a_factor(tiny, token_folder):
    recipe, warm = with_factors(tiny(), Spikes(times=0.9)), Warm()
    digests = []
    for _ in range(2):
        trainer = warm.trainer_for(recipe, CPU, token_folder)
        for _ in range(6):
            trainer.advance()
        digests.append(trainer.digest())
    assert digests[0] == digests[1]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)
@pytest.mark.parametrize("treatment", [[], ["muon", "normuon", "cautious_wd"]])
def test_the_kernels_take_the_factor(tiny, drive, treatment):
    start = two_matrices()
    gradients = noise(start, 4)
    recipe = with_factors(tiny(treatment, optim__clip=0.5), Spikes(times=1.5), Times(0.7))
    ours, _ = drive(recipe, start, gradients, kernels={"optimizer"})
    theirs, _ = drive(recipe, start, gradients)
    plain, _ = drive(tiny(treatment, optim__clip=0.5), start, gradients)
    for name in start:
        torch.testing.assert_close(ours[4][name], theirs[4][name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours[4][name], plain[4][name], rtol=1e-4, atol=1e-5)


# ---- refresh ----


@dataclass(frozen=True)
class Sampled(Transform):
    """Multiplies by a number that is drawn from the count of moves, every few steps."""

    every: int = 3
    kind: str = "sampled"

    @property
    def refresh_every(self) -> int:
        return self.every

    def state(self, weight, bank) -> dict[str, Any]:
        return {"moves": weight.new_zeros(()), "factor": weight.new_ones(())}

    def update(self, update, weight, state, bank, now):
        return update * state["factor"], {"moves": state["moves"] + 1}

    def refresh(self, state, bank, t):
        assert state["moves"].item() == t  # after the move, and it may wait for the device
        state["factor"].fill_(1 + state["moves"].item())


def test_a_refresh_comes_after_the_first_step_and_then_every_few(tiny, drive):
    """Steps 1 to 8 move by the factor that steps 1, 4 and 7 left behind."""
    base = tiny(**STEADY, optim__clip=None)
    chains = dict(base.optim.chains) | {"hidden": Chain((Sampled(),))}
    recipe = replace(base, optim=replace(base.optim, chains=chains))
    start = two_matrices()
    ones = [{name: torch.ones(4, 6) for name in start}] * 8
    seen, optimizer = drive(recipe, start, ones)
    factors = [round(one["a"][0, 0].item(), 3) for one in moved(seen)]
    assert factors == [1, 2, 2, 2, 5, 5, 5, 8]
    assert [part for _, part in optimizer.periodic] == [Sampled()]


def test_nothing_is_refreshed_where_no_part_asks(tiny, build):
    recipe = tiny(["muon", "normuon", "cautious_wd"])
    assert Optimizer(build(recipe), recipe).periodic == []


# ---- rates of single members ----


@dataclass(frozen=True)
class ByName(Part):
    """Each parameter's rates by its dotted name; 1 where it has none."""

    lr: tuple[tuple[str, float], ...] = ()
    decay: tuple[tuple[str, float], ...] = ()
    kind: str = "by_name"

    def scales(self, name, param, model, rule) -> Scales:
        return Scales(0.1, dict(self.lr).get(name, 1.0), dict(self.decay).get(name, 1.0))

    def multipliers(self, model) -> Multipliers:
        return Multipliers()


RATES = {
    "learning rate": ByName(lr=(("a", 0.5),)),
    "decay": ByName(decay=(("b", 3.0),)),
    "both": ByName(lr=(("a", 0.5), ("b", 2.0)), decay=(("a", 0.0),)),
}


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(
    "treatment", [[], ["muon", "normuon", "cautious_wd"], ["cautious_wd"]], ids=str
)
def test_each_member_of_a_bank_moves_at_its_own_rate(tiny, drive, rates, treatment):
    """As if it stood alone, in a bank of one."""
    recipe = replace(
        tiny(treatment, optim__clip=None, optim__lr=0.02), parametrization=RATES[rates]
    )
    start = two_matrices()
    gradients = noise(start, 4)
    together, optimizer = drive(recipe, start, gradients)
    assert [bank.names for bank in optimizer.banks] == [["a", "b"]]
    for name in start:
        alone, _ = drive(recipe, {name: start[name]}, gradients)
        torch.testing.assert_close(together[4][name], alone[4][name], rtol=1e-6, atol=1e-7)
    even, _ = drive(replace(recipe, parametrization=ByName()), start, gradients)
    assert any(not torch.equal(even[4][name], together[4][name]) for name in start)


def test_where_all_members_agree_a_rate_is_one_number(tiny, build):
    recipe = tiny(["mup", "muon"])
    for bank in Optimizer(build(recipe), recipe).banks:
        assert bank.lr.shape == bank.decay.shape == ()


def uneven(recipe, layer: float):
    one = ByName(lr=(("blocks.0.attention.out.weight", layer),))
    return replace(recipe, parametrization=one)


def test_kernels_that_take_one_rate_a_bank_step_aside(tiny):
    claim(tiny())
    claim(replace(tiny(), parametrization=ByName()))
    with pytest.raises(
        StepsAside, match="^hidden parameters of one shape differ in learning rate"
    ):
        claim(uneven(tiny(), 0.5))


def test_a_warm_trainer_is_not_given_a_recipe_whose_members_part(tiny, token_folder):
    """Its recorded step holds one number a bank."""
    warm = Warm()
    plain = warm.trainer_for(tiny(), CPU, token_folder)
    assert (
        warm.trainer_for(replace(tiny(), parametrization=ByName()), CPU, token_folder) is plain
    )
    parted = warm.trainer_for(uneven(tiny(), 0.5), CPU, token_folder)
    assert parted is not plain
    assert warm.trainer_for(uneven(tiny(), 2.0), CPU, token_folder) is parted
    other = Trainer(uneven(tiny(), 2.0), CPU, token_folder)
    for trainer in (parted, other):
        trainer.advance()
    assert parted.digest() == other.digest()
