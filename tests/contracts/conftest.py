"""What the contract tests share.

They are parametrized over the registry: a file with an intervention is enough to be tested.
"""

import functools
from contextlib import contextmanager
from typing import get_args
from unittest.mock import patch

import pytest

from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.recipe.intervention import REGISTRY
from ablab.core.recipe.recipe import run_id

OF_THE_MODEL = frozenset(
    {"attention", "attention_fp8", "ffn", "ffn_fp8", "ffn_epilogue", "residual", "loss"}
)


@pytest.fixture(scope="session")
def needs():
    return requirements


@pytest.fixture(scope="session")
def other_values():
    return values_besides


@pytest.fixture(scope="session")
def shows():
    """recipe -> its liveness trace, taken once.  kernels: the places that they serve."""
    from ablab.ablations.checks.liveness import trace

    seen = {}

    def of(recipe, kernels=frozenset()) -> str:
        name = run_id(recipe), kernels
        if name not in seen:
            seen[name] = trace(recipe, kernels=kernels)
        return seen[name]

    return of


@pytest.fixture(scope="session")
def servable():
    """recipe -> the places that kernels can serve, whether or not they are faster."""
    from ablab.core.fusion.places import KERNELS, flaw

    return lambda recipe: frozenset(
        place for place in KERNELS if not flaw(place, recipe, "fp32")
    )


@pytest.fixture(scope="session")
def shows_by_kernels(servable):
    """recipe -> the trace of the path that kernels serve, each kernel by the formula in torch that stands beside it.

    What is seen is the rewrite of the plan and what it hands to the kernels; that these compute the formula, is seen by
    tests/kernels.
    """
    from ablab.ablations.checks.liveness import trace

    seen = {}

    def of(recipe) -> str:
        name = run_id(recipe)
        if name not in seen:
            with formulas():
                seen[name] = trace(recipe, kernels=servable(recipe) & OF_THE_MODEL)
        return seen[name]

    return of


@contextmanager
def formulas():
    import torch

    from ablab.kernels import (
        attention,
        fp8_projection,
        fp8_swiglu,
        linear_cross_entropy,
        residual_norm,
        swiglu,
    )

    def token_losses(x, weight, targets, multiplier=1.0, cap=0.0, cap_form="none"):
        logits = multiplier * torch.nn.functional.linear(x, weight).float()
        squashed = linear_cross_entropy.squash(logits, cap, cap_form)
        return torch.nn.functional.cross_entropy(squashed, targets, reduction="none")

    with (
        patch.object(attention, "attention", attention.reference),
        patch.object(swiglu, "swiglu", swiglu.reference),
        patch.object(fp8_projection, "fp8_projection", fp8_projection.reference),
        patch.object(fp8_swiglu, "fp8_swiglu", fp8_swiglu.reference),
        patch.object(residual_norm, "residual_norm", residual_norm.reference),
        patch.object(
            linear_cross_entropy, "linear_cross_entropy", linear_cross_entropy.reference
        ),
        patch.object(linear_cross_entropy, "token_losses", token_losses),
    ):
        yield


@pytest.fixture(scope="session")
def paths(servable, drive):
    return Paths(servable, drive)


class Paths:
    """What a recipe computes by torch and by kernels, in fp32; each model and each optimizer once."""

    def __init__(self, servable, drive):
        self.servable = servable
        self.drive = drive
        self.seen = {}

    def apart(self, recipe) -> dict[str, float]:
        """Relative differences beyond what another order of sums leaves, by name: loss, nats, gradients, moves."""
        model = (recipe.model, recipe.parametrization, recipe.objective)
        optimizer = repr((recipe.optim, recipe.parametrization))
        for part, compare in ((model, self.in_the_model), (optimizer, self.in_the_optimizer)):
            if part not in self.seen:
                self.seen[part] = compare(recipe)
        return self.seen[model] | self.seen[optimizer]

    def in_the_model(self, recipe) -> dict[str, float]:
        """fp32 sums in another order leave 2e-5, and twice that in a scalar's gradient.

        By other scales the roundings to 8 bits fall elsewhere: 0.15 of a gradient, 0.32 behind every map of a block.
        """
        kernels = self.servable(recipe) & OF_THE_MODEL
        limit = 0.4 if recipe.model.products else 1e-4
        return too_far(evaluated(recipe, kernels), evaluated(recipe, frozenset()), limit)

    def in_the_optimizer(self, recipe) -> dict[str, float]:
        """Newton-Schulz multiplies the rounding of a singular value near 1 by up to 1,700: 2e-4."""
        kernels = self.servable(recipe) & {"optimizer", "newton_schulz"}
        from tests.interpreted import plain_products

        theirs = moved(recipe, self.drive, frozenset())
        with plain_products():
            ours = moved(recipe, self.drive, kernels)
        return too_far(ours, theirs, 1e-3)


def too_far(ours, theirs, limit: float) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    errors = {
        name: ((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)).item()
        for name in theirs
    }
    return {name: error for name, error in errors.items() if not error < limit}


def evaluated(recipe, kernels):
    """Loss, nats of each token, and every gradient on one row of tokens, parameters stirred."""
    import torch

    from ablab.core.fusion.places import plan_with
    from ablab.core.model.init import initialise
    from ablab.core.model.objective import heads_of, of_rows
    from ablab.core.model.transformer import Transformer

    model = Transformer(recipe, plan=plan_with(kernels, recipe))
    initialise(model, recipe)
    draw = torch.Generator().manual_seed(3)
    for value in model.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=draw)
    rows = torch.randint(recipe.data.vocab, (1, recipe.data.context + 1), generator=draw)
    descend, measure = heads_of(model)
    loss, _ = of_rows(model, descend)(rows)
    loss.backward()
    with torch.no_grad():
        nats = of_rows(model, measure)(rows)
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    return {"loss": loss.detach(), "nats": nats} | gradients


def moved(recipe, drive, kernels):
    """How far two steps move a matrix in blocks, a gate, a gain, and a table of which a row is never seen."""
    import torch

    from ablab.core.language.declare import Param

    draw = torch.Generator().manual_seed(5)
    declared = {
        "hidden": Param((12, 6), "hidden", blocks=(6, 3, 3), head=3),
        "gate": Param((2, 6), "gate"),
        "vector": Param((6,), "vector"),
        "readout": Param((5, 6), "readout"),
        "table": Param((5, 6), "embedding"),
    }
    start = {
        name: (one, torch.randn(one.shape, generator=draw)) for name, one in declared.items()
    }
    moves = [
        {name: torch.randn(one.shape, generator=draw) for name, one in declared.items()}
        for _ in range(2)
    ]
    for move in moves:
        move["table"][0] = 0.0
    seen, _ = drive(recipe, start, moves, kernels=kernels)
    return {name: seen[-1][name] - seen[0][name] for name in declared}


@functools.cache
def requirements(name: str) -> tuple[str, ...]:
    """Everything that an intervention builds on, transitively."""
    wanted = [name]
    for one in wanted:
        wanted += [need for need in REGISTRY[one].about.requires if need not in wanted]
    return tuple(wanted[1:])


def values_besides(hint, value, path: str) -> list:
    """Valid values of the hinted type other than `value`.

    Words of a Literal, the other truth value, or numbers near and far.
    """
    number = value if isinstance(value, (int, float)) else 1
    pool = (
        *_words(hint),
        True,
        False,
        number * 2,
        number / 2,
        0.25,
        2,
        0.75,
        5,
        number + 1,
        3,
        1,
        0,
        60.0,
        f"{value}x",
        None,
    )
    found = []
    for candidate in pool:
        try:
            candidate = parse(hint, candidate, path)
        except UserError:
            continue
        if candidate != value and not any(
            candidate == one and type(candidate) is type(one) for one in found
        ):
            found.append(candidate)
    return found


def _words(hint) -> tuple:
    """The words of every Literal inside the hint."""
    return tuple(
        word
        for option in get_args(hint)
        for word in ((option,) if isinstance(option, str) else _words(option))
    )
