"""Every dose field of every intervention changes what is computed, and so the run's name.

Torch and kernels read it alike.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of
from ablab.core.model.plan import plan_of
from ablab.core.recipe.intervention import REGISTRY
from ablab.core.recipe.recipe import run_id

DECAYED = {"optim__chains__embedding__steps": [{"kind": "adam"}, {"kind": "decay"}]}


@dataclass(frozen=True)
class Given:
    """What a field needs around it to matter, and why; `value` where no plain number or word will do."""

    why: str
    dose: dict[str, Any] = field(default_factory=dict)
    beside: tuple[Any, ...] = ()
    base: dict[str, Any] = field(default_factory=dict)
    value: Any = None


PRECONDITIONS = {
    "batch_ramp.stages": Given("a list, not a number", value=[0.5, 1.0]),
    "cautious_wd.ties": Given(
        "a tie is an update of exactly 0: rows of unseen tokens, if the embedding decays",
        base=DECAYED,
    ),
    "ema.beta": Given(
        "the weight of a snapshot; online has a horizon instead", {"mode": "posthoc"}
    ),
    "ema.bias_corrected": Given("of the snapshots' weights", {"mode": "posthoc"}),
    "ema.checkpoints": Given("how many snapshots", {"mode": "posthoc"}),
    "ema.span": Given("where the snapshots lie", {"mode": "posthoc"}),
    "gating.channels": Given(
        "how many channels a gate reads, if not all", {"per": "first_channels"}
    ),
    "mup.base": Given(
        "a parametrization, not a number", value={"kind": "standard", "gain": 0.5}
    ),
    "mup.base_layers": Given("the depth rule divides by it", {"depth": "complete"}),
    "mup.rms_lr": Given(
        "the rule for Muon under the rms scale", beside=({"muon": {"scale": "rms"}},)
    ),
    "micro_steps.base": Given(
        "a schedule, not a number",
        value={"kind": "wsd", "decay_fraction": 0.5, "warmup_steps": 3},
    ),
    "muon.warmup_behind": Given(
        "a rise of one step has nothing to leave out", {"warmup_steps": 8, "warmup_from": 0.5}
    ),
    "muon.warmup_from": Given("a rise of one step has no beginning", {"warmup_steps": 8}),
    "muon.warmup_steps": Given("a rise from 0.95 to 0.95 has no length", {"warmup_from": 0.5}),
    "sliding_window.pattern": Given("letters, not a number", value="SLLL"),
    "truncated_init.base": Given(
        "a parametrization, not a number", value={"kind": "standard", "gain": 0.5}
    ),
    "wsd.power": Given("the exponent of one shape", {"shape": "power"}),
    "zero_init_projections.base": Given(
        "a parametrization, not a number", value={"kind": "standard", "gain": 0.5}
    ),
}
FIELDS = [f"{name}.{dose}" for name, cls in sorted(REGISTRY.items()) for dose in fields_of(cls)]


@pytest.fixture
def consumed(tiny, needs, shows, other_values):
    """(name.field, what it is given) -> whether some other value of the field changes the trace."""

    def of(path: str, given: Given) -> bool:
        name, dose = path.split(".")

        def arm(**more):
            return tiny([*needs(name), *given.beside, {name: given.dose | more}], **given.base)

        now, hint = arm(), fields_of(REGISTRY[name])[dose]
        start = REGISTRY[name](**given.dose)
        values = (
            [given.value]
            if given.value is not None
            else other_values(hint, getattr(start, dose), path)
        )
        assert values
        for value in values:
            try:
                other = arm(**{dose: value})
                plan_of(other)  # a part may refuse sizes only where it is built
            except UserError:
                continue  # out of range beside the rest of the dose
            if other != now:  # null may stand for the very value that it is compared with
                assert run_id(other) != run_id(now)
                if shows(other) != shows(now):
                    return True
        return False

    return of


@pytest.mark.parametrize("path", FIELDS)
def test_a_dose_field_changes_the_name_and_the_bits(consumed, path):
    assert consumed(path, PRECONDITIONS.get(path, Given(""))), (
        f"no value of {path} that was tried changes what is computed; "
        "read it, drop it, or say in PRECONDITIONS beside what it matters"
    )


@pytest.mark.parametrize("path", sorted(PRECONDITIONS))
def test_a_precondition_is_needed(consumed, path):
    assert PRECONDITIONS[path].why and path in FIELDS
    if PRECONDITIONS[path].value is None:
        assert not consumed(path, Given(""))


# ---- by torch and by kernels ----

SERVED = {
    "model__layers": 2,
    "model__width": 32,
    "model__attention__head_dim": 32,
    "optim__lr": 0.02,
}
ON_THE_HOST = {"after_step", "data.shape", "schedule"}  # slots that no kernel computes
BY_KERNELS = [
    path for path in FIELDS if not set(REGISTRY[path.split(".")[0]].about.slots) <= ON_THE_HOST
]
cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@pytest.fixture
def doses(tiny, needs, other_values):
    """name.field -> recipes of a shape that kernels serve.

    The field as it is given, each other word, or another number.
    """

    def of(path: str):
        given = PRECONDITIONS.get(path, Given(""))
        name, dose = path.split(".")
        start = getattr(REGISTRY[name](**given.dose), dose)
        hint = fields_of(REGISTRY[name])[dose]
        others = [given.value] if given.value else other_values(hint, start, path)
        words = [value for value in others if isinstance(value, (str, bool))]

        def arm(value):
            treatment = [*needs(name), *given.beside, {name: given.dose | {dose: value}}]
            recipe = tiny(treatment, **SERVED, **given.base)
            plan_of(recipe)
            return recipe

        yield from map(arm, [start, *words])
        if not words:
            yield first_that_fits(arm, others)

    return of


def first_that_fits(arm, values):
    """The recipe of the first value that the rest of it does not refuse."""
    for value in values:
        with suppress(UserError):
            return arm(value)
    raise AssertionError(f"each of {values} is refused")


@cpu
@pytest.mark.parametrize("path", BY_KERNELS)
def test_torch_and_kernels_compute_each_choice_of_a_dose_alike(doses, paths, path):
    pytest.importorskip("triton")  # there is none for macOS
    recipes = list(doses(path))
    assert len({run_id(recipe) for recipe in recipes}) > 1
    for recipe in recipes:
        assert paths.apart(recipe) == {}, recipe
