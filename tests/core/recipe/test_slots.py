"""The table of slots against the types of a recipe, and what follows from it."""

import hashlib
from dataclasses import dataclass, field, is_dataclass, make_dataclass, replace
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import msgspec
import pytest

from ablab.core.errors import UserError
from ablab.core.language.declare import Param, Stage, params
from ablab.core.language.parse import fields_of, parse
from ablab.core.language.part import Asked, Part, silent
from ablab.core.model.plan import plan_of
from ablab.core.parts.block import Residual
from ablab.core.parts.mixing import Causal
from ablab.core.parts.shape import Fixed
from ablab.core.parts.transforms import Sgd
from ablab.core.recipe.edit import append, at, edit, put
from ablab.core.recipe.intervention import About, register, resolve
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import Recipe, check, plain, run_id
from ablab.core.recipe.slots import CHOICES, SLOTS, held, slot_at
from ablab.experiments.plan.experiment import load

BUILDING = [slot for slot in SLOTS if slot.inputs is not None]


def slots_in(cls: Any, path: str = ""):
    """(path, Protocol, many) of each field of a recipe that holds parts, by its type."""
    for name, hint in fields_of(cls).items():
        here = f"{path}{name}"
        options = get_args(hint)
        if get_origin(hint) is dict:
            if is_dataclass(options[1]):
                yield from slots_in(options[1], f"{here}.*.")
        elif is_dataclass(hint):
            yield from slots_in(hint, f"{here}.")
        elif get_origin(hint) is tuple and Asked in options[0].__mro__:
            yield here, options[0], True
        elif isinstance(hint, type) and Asked in hint.__mro__:
            yield here, hint, False


def test_the_table_and_the_types_of_a_recipe_say_the_same():
    rows = {(slot.path, slot.asks, slot.many) for slot in SLOTS}
    assert rows == set(slots_in(Recipe)) and len(rows) == len(SLOTS)


def test_the_choices_are_the_slots_that_hold_one():
    assert set(CHOICES) >= {"model.block", "model.attention.mix", "model.ffn", "schedule"}
    assert not set(CHOICES) & {slot.path for slot in SLOTS if slot.many}


def test_every_part_of_a_recipe_is_found_with_its_path(tiny):
    recipe = tiny(["gating", "muon"])
    found = {path: parts for _, path, parts in held(recipe)}
    assert [part.kind for part in found["model.attention.on_heads"]] == ["gating"]
    assert [part.kind for part in found["model.block"]] == ["residual"]
    kinds = [part.kind for part in found["optim.chains.hidden.steps"]]
    assert kinds == ["momentum", "orthogonalize", "decay"]


# ---- identity ----

ADAM = {"kind": "adam", "beta1": 0.9, "beta2": 0.95, "eps": 1e-10}
TINY = {  # all that the tiny recipe says: no empty slot, no silent field at its default
    "data": {
        "name": "tiny",
        "digest": None,
        "vocab": 64,
        "context": 16,
        "batch": 4,
        "held_out": 320,
    },
    "model": {
        "width": 32,
        "layers": 3,
        "tied": False,
        "norm_eps": 1e-6,
        "attention": {
            "head_dim": 8,
            "group": 1,
            "position": {"kind": "rope", "base": 10000.0},
        },
        "ffn": {"kind": "swiglu", "expansion": 2.6667, "multiple": 64},
    },
    "parametrization": {"kind": "standard", "embedding": 0.02, "gain": 1.0},
    "optim": {
        "lr": 0.003,
        "clip": 1.0,
        "chains": {
            "embedding": {"steps": [ADAM], "lr": 1.0},
            "hidden": {
                "steps": [ADAM, {"kind": "decay", "rate": 0.1, "schedule": "constant"}],
                "lr": 1.0,
            },
            "readout": {"steps": [ADAM], "lr": 1.0},
            "vector": {"steps": [ADAM], "lr": 1.0},
            "gate": {"steps": [ADAM], "lr": 1.0},
        },
    },
    "schedule": {"kind": "cosine", "warmup_steps": 3, "floor": 0.1},
    "budget": {"tokens": 768},
    "seed": 0,
}


def test_an_identity_is_the_hash_of_the_schema_and_of_what_the_recipe_says(tiny):
    tree = {"schema": 2, "recipe": TINY}
    said = msgspec.json.encode(tree, order="deterministic")
    assert run_id(tiny()) == hashlib.sha256(said).hexdigest()[:16]
    assert parse(Recipe, TINY, "") == tiny()


@dataclass(frozen=True)
class Later(Recipe):
    """A recipe of later: with a slot of many, a choice and a number that were not there."""

    stages: tuple[Any, ...] = ()
    choice: Any = silent(factory=Sgd)
    number: int = silent(3)


@pytest.mark.parametrize("field", [{"stages": (Sgd(),)}, {"choice": Sgd(0.5)}, {"number": 4}])
def test_a_later_field_leaves_no_trace_in_an_identity_until_it_is_used(tiny, field):
    before = vars(tiny())
    assert run_id(Later(**before)) == run_id(tiny())
    assert run_id(Later(**before, **field)) != run_id(tiny())


def test_a_later_field_that_is_not_silent_renames_every_run(tiny):
    loud = make_dataclass("Loud", [("number", int, 3)], bases=(Recipe,), frozen=True)
    assert run_id(loud(**vars(tiny()))) != run_id(tiny())


@pytest.mark.parametrize("kind", [Residual, Causal, Fixed])
def test_a_silent_choice_has_no_dose_whose_default_could_be_edited(kind):
    assert not fields_of(kind)


IDENTITIES = {  # of each shipped sheet: sha256 of the run ids of its cells, as schema 2 began
    "aa_tiny": "7d825f76a4c4dc26",
    "add_one_70m": "02ebdd7946140e27",
    "loo_70m": "e06c0918d41e8cb3",
    "lr_70m": "e06c0918d41e8cb3",
    "lr_width_70m": "313b7f98476c0d77",
    "lr_width_tiny": "1507e762c12dcfda",
    "quickstart": "be59bd8a55543e74",
}


@pytest.mark.parametrize("sheet", IDENTITIES)
def test_a_slot_that_a_shipped_sheet_does_not_use_renames_none_of_its_runs(sheet):
    experiment = load(sheet, {})
    names = []
    for cell in experiment.cells:
        recipe = resolve(experiment.base, cell.treatment)
        anywhere = replace(recipe, data=replace(recipe.data, digest=None))
        names.append(run_id(anywhere))
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()
    assert digest[:16] == IDENTITIES[sheet]


def test_a_choice_written_out_at_its_default_is_the_same_run(tiny):
    written = assign(assign(tiny(), "model.block", "residual"), "model.attention.mix", "causal")
    assert written == tiny() and run_id(written) == run_id(tiny())
    assert parse(Recipe, plain(written), "") == tiny()


@dataclass(frozen=True)
class Sized(Part):
    """With a dose of its own, and a dataclass in it."""

    size: int = 3
    kind: str = field(default="sized", init=False)

    def build(self, where):
        return Stage(lambda q, k, v, carry, start: q)


def test_another_choice_and_another_dose_of_it_are_other_runs(tiny):
    names = {
        run_id(edit(tiny(), "model.attention.mix", put(part)))
        for part in (at(tiny(), "model.attention.mix"), Sized(), Sized(4))
    }
    assert len(names) == 3


@dataclass(frozen=True)
class Grown(Sized):
    """As Sized, with a dose that came later."""

    later: bool = silent(False)


def test_a_dose_that_came_later_is_in_the_name_only_where_it_is_used(tiny):
    def name(part):
        return run_id(edit(tiny(), "model.attention.mix", put(part)))

    assert name(Grown(4)) == name(Sized(4))
    assert name(Grown(4, later=True)) not in (name(Sized(4)), name(Grown(5, later=True)))


# ---- refusals ----


@pytest.mark.parametrize(
    ("slot", "kind", "takes", "gives"),
    [
        ("model.ffn", "rope", "q, k, start", "x"),
        ("model.block", "swiglu", "x", "x, carry, attention, ffn"),
        ("model.attention.mix", "rope", "q, k, start", "q, k, v, carry, start"),
        ("model.attention.position", "causal", "q, k, v, carry, start", "q, k, start"),
    ],
)
def test_a_choice_that_is_made_for_another_slot_is_refused_when_it_is_planned(
    tiny, slot, kind, takes, gives
):
    with pytest.raises(UserError) as refusal:
        plan_of(check(assign(tiny(), slot, kind)))
    said = f"{slot} cannot hold '{kind}': its stage takes {takes}, and the slot gives {gives};"
    assert str(refusal.value).startswith(said) and "\n" not in str(refusal.value)


def test_so_is_one_of_many(tiny):
    with pytest.raises(
        UserError, match="objective cannot hold 'soft_cap': its stage takes logits"
    ):
        plan_of(check(assign(tiny(), "objective", ["soft_cap"])))


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.path)
def test_a_part_without_the_method_asked_is_refused_when_the_recipe_is_checked(tiny, slot):
    """Sgd builds nothing, Rope moves nothing."""
    stranger = {"kind": "rope"} if slot.inputs is None else {"kind": "sgd"}
    path = slot.path.replace("*", "gate")
    wrong = assign(tiny(), path, [stranger] if slot.many else stranger)
    with pytest.raises(
        UserError, match=rf"^{path} cannot hold '{stranger['kind']}', which has no"
    ):
        check(wrong)


def test_a_choice_that_builds_nothing_is_refused(tiny):
    nothing = assign(tiny(), "model.ffn", "ln_scaling")  # in layer 0
    with pytest.raises(UserError, match="model.ffn=ln_scaling builds nothing"):
        plan_of(check(nothing))


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("model.attention.on_head", "Did you mean 'model.attention.on_heads'"),
        ("model.feedforward", ""),
        ("optim.chains.hidden.step", "Did you mean"),
    ],
)
def test_an_intervention_that_claims_no_place_of_a_recipe_is_refused(path, near):
    with pytest.raises(UserError, match=f"claims '{path}', which no recipe has.*{near}"):
        register("unplaced", off="nothing", source="nobody", slots=(path,))


def choosing(name: str, slot: str, part: Part):
    """An intervention that puts the part there, and is registered nowhere."""
    about = About(
        name=name,
        off="as before",
        source="this test",
        slots=(slot,),
        order=50,
        neutral_at_init=False,
        requires=(),
        excludes=(),
        crosses_late=False,
        acts_late=False,
        summary="Choose.",
    )
    return SimpleNamespace(about=about, kind=name, apply=lambda old: edit(old, slot, put(part)))


@pytest.mark.parametrize("slot", ["model.block", "model.attention.mix"])
def test_two_interventions_that_choose_one_of_the_later_slots_clash(tiny, slot):
    one = choosing("one", slot, Sized(3))
    other = choosing("other", slot, Sized(4))
    assert at(resolve(tiny(), {"one": one}), slot) == Sized(3)
    with pytest.raises(UserError, match=f"one and other both choose {slot}; drop one"):
        resolve(tiny(), {"one": one, "other": other})


@dataclass(frozen=True)
class Wrapping(Part):
    """Holds another choice, of its slot or of another."""

    base: Any
    kind: str = field(default="wrapping", init=False)

    def build(self, where):
        return Stage(lambda q, k, v, carry, start: q)


def wrapping(name: str, slot: str, holds: str):
    """An intervention whose choice for `slot` holds what stands in the slot `holds`."""
    one = choosing(name, slot, Sized())
    one.apply = lambda old: edit(old, slot, put(Wrapping(at(old, holds))))
    return one


@pytest.mark.parametrize("slot", ["model.block", "model.attention.mix"])
def test_a_choice_that_holds_the_choice_that_it_found_is_no_clash(tiny, slot):
    inner = choosing("inner", slot, Sized(3))
    outer = wrapping("outer", slot, holds=slot)
    outermost = wrapping("outermost", slot, holds=slot)
    both = resolve(tiny(), {"inner": inner, "outer": outer, "outermost": outermost})
    assert at(both, slot) == Wrapping(Wrapping(Sized(3)))
    after = choosing("then", slot, Sized(4))
    with pytest.raises(UserError, match=f"outer and then both choose {slot}; drop one"):
        resolve(tiny(), {"inner": inner, "outer": outer, "then": after})


def test_a_choice_that_holds_something_else_is_a_clash(tiny):
    inner = choosing("inner", "model.block", Sized(3))
    other = wrapping("other", "model.block", holds="model.ffn")
    with pytest.raises(UserError, match="inner and other both choose model.block; drop one"):
        resolve(tiny(), {"inner": inner, "other": other})


# ---- the plan follows ----


@dataclass(frozen=True)
class Probe(Part):
    """Builds a stage with as many inputs as the slot gives; its parameter shows where it stands."""

    count: int
    kind: str = field(default="probe", init=False)

    def build(self, where):
        names = ", ".join(f"a{i}" for i in range(self.count))
        return Stage(eval(f"lambda {names}, *, mark: a0"), mark=Param((1,), "vector", fill=1.0))


@pytest.mark.parametrize("slot", BUILDING, ids=lambda slot: slot.path)
def test_what_stands_in_a_slot_stands_in_the_plan_under_the_slots_own_name(tiny, slot):
    probe = Probe(len(slot.inputs))
    placed = append(probe) if slot.many else put(probe)
    recipe = check(edit(tiny(), slot.path, placed))
    names = [name.split(".") for name, _ in params(plan_of(recipe))]
    marks = [name for name in names if name[-1] == "mark"]
    assert len(marks) in (1, 3, 6)  # outside, in each block, at both of its norms
    _, _, own_name = slot.path.rpartition(".")
    assert all(own_name in name for name in marks)


def test_the_signature_names_the_inputs():
    assert slot_at("model.attention.mix").inputs == ("q", "k", "v", "carry", "start")
    assert slot_at("model.on_embedding").inputs == ("x", "tokens", "carry")
    assert slot_at("schedule").inputs is None
