"""A replayed step sees every number that moves: each is changed after the step was recorded, and the replay follows.

On a CPU a tape stands in for the CUDA graph: it keeps the operations of the recorded call with the very tensors and
Python numbers that they were called with, and runs them again.  A number that was baked in stays as it was.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ablab.core.language.part import Part
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.parts.gradient import GradientFactor
from ablab.core.parts.parametrize import Multipliers, Scales
from ablab.core.parts.schedule import Constant, Cosine
from ablab.core.parts.transforms import Adam, Decay, Momentum, Sgd, Transform
from ablab.core.recipe.recipe import Chain
from ablab.core.runtime.replay import WARM_UP, CudaGraphs, OnDevice, use_recordable_stream
from ablab.core.train.banks import Optimizer
from ablab.core.train.step import TrainingStep

ROLES = ("embedding", "hidden", "readout", "vector", "gate")


class Tape(TorchDispatchMode):
    """The operations of one call."""

    height = 0

    def __init__(self, function, like):
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.given = like.clone()
        with self:
            self.result = function(self.given)
        self.ran = (
            True  # a graph's capture computes nothing, ours has computed the first replay
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the recorded work waits for the device"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self, given):
        if self.ran:
            self.ran = False
            return self.result
        self.given.copy_(given)
        for func, args, kwargs, kept in self.operations:
            _write(kept, func(*args, **kwargs))
        return self.result


def _write(kept, again) -> None:
    """Put what an operation returned where later ones look for it, as in a graph's memory."""
    if isinstance(kept, torch.Tensor):
        if kept.data_ptr() != again.data_ptr():
            kept.copy_(again)
    elif isinstance(kept, tuple | list):
        for one, other in zip(kept, again, strict=True):
            _write(one, other)


class Tapes:
    def record(self, function, like):
        return Tape(function, like)


# ---- the recorder ----


def test_a_call_is_recorded_once_a_shape_and_after_others_of_that_shape():
    ran = []

    def doubled(given):
        ran.append(tuple(given.shape))
        return given * 2

    called = OnDevice(doubled, torch.device("cpu"), Tapes())
    for i in range(WARM_UP + 3):
        for length in (2, 5):
            assert called(torch.full((length,), float(i))).tolist() == [2.0 * i] * length
    assert ran == [(2,), (5,)] * (WARM_UP + 1) and len(called.recordings) == 2


def test_a_tape_shows_a_number_that_is_baked_in():
    """Else the tests below could not fail."""
    number, tensor = [1.0], torch.ones(())
    called = OnDevice(lambda x: x * number[0] * tensor, torch.device("cpu"), Tapes())
    for _ in range(WARM_UP + 1):
        called(torch.ones(1))
    number[0] = 5.0
    assert called(torch.ones(1)).item() == 1.0
    tensor.fill_(3.0)
    assert called(torch.ones(1)).item() == 3.0
    with pytest.raises(AssertionError, match="waits for the device"):
        Tape(lambda x: x * x.item(), torch.ones(()))


def test_what_waits_for_the_device_is_not_recorded(tiny, build):
    recipe = tiny([{"muon": {"ns": "exact"}}])
    optimizer = Optimizer(build(recipe), recipe, recorder=Tapes())
    assert not isinstance(optimizer.launch, OnDevice)


# ---- the numbers that move ----


@dataclass(frozen=True)
class Fading(GradientFactor):
    """A number of its own times what is left of the run."""

    kind: str = "fading"

    def state(self, like):
        return {"by": like + 0.5}

    def factor(self, norm, state, now):
        return state["by"] * (1.5 - now.progress), {}


@dataclass(frozen=True)
class Held(Transform):
    """A factor that is renewed every second step from the count of steps."""

    kind: str = "held"

    @property
    def refresh_every(self):
        return 2

    def state(self, weight, bank):
        return {"factor": weight.new_ones(())}

    def update(self, update, weight, state, bank, now):
        return update * state["factor"], {}

    def refresh(self, state, bank, t):
        state["factor"].fill_(1 + 0.1 * t)


@dataclass(frozen=True)
class ByLayer(Part):
    """Learning rate and decay of each parameter by the length of its name."""

    lr: float = 1.0
    decay: float = 1.0
    kind: str = "by_layer"

    def scales(self, name, param, model, rule):
        return Scales(0.05, self.lr * (1 + len(name) % 5), self.decay * (1 + len(name) % 3))

    def multipliers(self, model):
        return Multipliers()


def chained(recipe, *steps):
    """Every role by one chain."""
    chains = {role: Chain(steps) for role in ROLES}
    return replace(recipe, optim=replace(recipe.optim, chains=chains))


def decaying(recipe, schedule):
    return replace(chained(recipe, Adam(), Decay(0.5, schedule)), schedule=Constant())


class Run:
    """A recipe's training step on random rows; `perturb` is called between its steps."""

    def __init__(self, recipe, build, batch, device, recorder, kernels):
        self.model = build(recipe).to(device)
        self.optimizer = Optimizer(self.model, recipe, kernels=kernels, recorder=recorder)
        self.rows = batch(recipe)
        loss = of_rows(self.model, heads_of(self.model)[0])
        tokens = self.rows[:, 1:].numel()
        self.step = TrainingStep(loss, self.optimizer, recipe, tokens, recorder)

    def take(self, t, tokens=None):
        self.step.take(t, [self.rows], tokens)

    def weights(self):
        return torch.cat([value.detach().flatten() for value in self.model.parameters()])


def twice_the_rate(run):
    run.optimizer.lr *= 2


def another_schedule(run):
    run.optimizer.schedule = Cosine(warmup_steps=0, floor=0.0)


def a_shorter_run(run):
    run.optimizer.steps = 7


def half_the_multiplier_at_twice_the_rate(run):
    run.optimizer.schedule = Half()
    run.optimizer.lr *= 2


@dataclass(frozen=True)
class Half(Part):
    def multiplier(self, t, steps):
        return 0.5


def other_decay_factors(run):
    for bank in run.optimizer.banks:
        bank.decay.mul_(4)


def other_rates(run):
    for bank in run.optimizer.banks:
        bank.lr.mul_(3)


def another_factor(run):
    run.optimizer.scaling.state["fading"]["by"].fill_(2.0)


def nothing(run):
    """The number moves by itself, with the step."""


@dataclass(frozen=True)
class Scalar:
    """A number that moves: in which recipe, what changes it, and which steps and tokens follow."""

    recipe: Any
    perturb: Any = nothing
    steps: tuple[int, ...] = (5, 6)  # after four recorded or warming up
    tokens: int | None = None  # of the steps that follow
    kernels: bool = True  # whether the kernels know the chain


SMALL = {"model__layers": 1, "model__width": 8}  # kernels are slow in the interpreter
SCALARS = {
    "learning rate": Scalar(lambda tiny: tiny(**SMALL), twice_the_rate),
    "schedule": Scalar(lambda tiny: tiny(**SMALL), another_schedule),
    "constant decay": Scalar(
        lambda tiny: decaying(tiny(**SMALL), "constant"), other_decay_factors
    ),
    "linear decay": Scalar(lambda tiny: decaying(tiny(**SMALL), "linear"), a_shorter_run),
    "decay with lr": Scalar(
        lambda tiny: decaying(tiny(**SMALL), "lr"), half_the_multiplier_at_twice_the_rate
    ),
    "cautious decay": Scalar(
        lambda tiny: tiny(["cautious_wd"], schedule="constant", **SMALL),
        other_decay_factors,
    ),
    "momentum warm-up": Scalar(
        lambda tiny: chained(tiny(schedule="constant"), Momentum(0.95, True, 0.2, 40)),
        steps=(25, 39),
        kernels=False,
    ),
    "momentum warm-up of muon": Scalar(
        lambda tiny: tiny(
            [{"muon": {"ns": "kj5", "warmup_from": 0.2, "warmup_steps": 40}}],
            schedule="constant",
            **SMALL,
        ),
        steps=(25, 39),
    ),
    "bias correction": Scalar(lambda tiny: tiny(schedule="constant", **SMALL), steps=(60, 61)),
    "state of a gradient factor": Scalar(
        lambda tiny: fading(tiny(optim__clip=0.1, **SMALL)), another_factor
    ),
    "progress in a gradient factor": Scalar(
        lambda tiny: fading(tiny(schedule="constant", **SMALL)), a_shorter_run
    ),
    "tokens of a step": Scalar(
        lambda tiny: chained(tiny(optim__clip=None), Sgd(0.5)), tokens=16, kernels=False
    ),
    "clip of a smaller step": Scalar(
        lambda tiny: chained(tiny(optim__clip=0.1, optim__lr=0.1), Sgd(0.5)),
        tokens=2,
        kernels=False,
    ),
    "rates of single members": Scalar(
        lambda tiny: replace(tiny(), parametrization=ByLayer()), other_rates, kernels=False
    ),
    "decay of single members": Scalar(
        lambda tiny: replace(tiny(), parametrization=ByLayer()),
        other_decay_factors,
        kernels=False,
    ),
    "a refreshed state": Scalar(
        lambda tiny: chained(tiny(), Held(), Sgd(0.5)), steps=(5, 16, 17), kernels=False
    ),
}


def fading(recipe):
    return replace(recipe, optim=replace(recipe.optim, on_gradient=(Fading(),)))


def followed(make, scalar: Scalar, perturbed: bool) -> torch.Tensor:
    """The weights after four steps and some more, which a change precedes if `perturbed`."""
    run = make()
    for t in range(1, WARM_UP + 2):
        run.take(t)
    if not perturbed:
        for t in range(WARM_UP + 2, WARM_UP + 2 + len(scalar.steps)):
            run.take(t)
        return run.weights()
    scalar.perturb(run)
    for t in scalar.steps:
        run.take(t, scalar.tokens)
    return run.weights()


def torchs_products():
    from tests.interpreted import plain_products

    return plain_products()


@pytest.mark.parametrize("name", SCALARS)
def test_a_tape_sees_each_number_that_moves(tiny, build, batch, name):
    scalar = SCALARS[name]
    interpreted = scalar.kernels and not torch.cuda.is_available()
    for kernels in [(), ("optimizer",)][: 1 + interpreted]:

        def make(recorder=None, kernels=kernels):
            recipe = scalar.recipe(tiny)
            return Run(recipe, build, batch, torch.device("cpu"), recorder, kernels)

        with torchs_products() if kernels else nullcontext():
            plain = followed(make, scalar, perturbed=True)
            taped = followed(lambda: make(Tapes()), scalar, perturbed=True)
            calm = followed(make, scalar, perturbed=False)
        assert torch.equal(taped, plain)
        assert not torch.equal(calm, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", SCALARS)
def test_a_cuda_graph_sees_each_number_that_moves(tiny, build, batch, name):
    scalar, device = SCALARS[name], torch.device("cuda")
    use_recordable_stream(device)
    for kernels in [(), ("optimizer",)][: 1 + scalar.kernels]:

        def make(recorder=None, kernels=kernels):
            return Run(scalar.recipe(tiny), build, batch, device, recorder, kernels)

        def recorded():
            run = make(CudaGraphs())
            assert len(run.step.replayed) == 2
            return run

        plain = followed(make, scalar, perturbed=True)
        assert torch.equal(followed(recorded, scalar, perturbed=True), plain)
        assert not torch.equal(followed(make, scalar, perturbed=False), plain)
