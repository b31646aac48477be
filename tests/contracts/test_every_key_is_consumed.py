"""Every key of a recipe is read: changing it changes the run's name and what the run computes.

Weight tying, clipping, the z-loss weight and muP's multipliers were all keys that nothing read in the code that ablab
answers to.  Here each leaf of a few rich recipes is changed in turn, and the tiny run trained to its end.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, get_origin

import pytest

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, parse
from ablab.core.language.part import Part
from ablab.core.model.plan import plan_of
from ablab.core.parts.schedule import Cosine
from ablab.core.recipe.intervention import REGISTRY, resolve, treatment_of
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import (
    Attention,
    Budget,
    Data,
    Model,
    Recipe,
    check,
    plain,
    run_id,
    structure,
)
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer, Warm

CPU = Runtime(device="cpu")
DIGEST = "c203028650c73ea2"  # of the token folder of conftest
BASE = Recipe(
    Data("tiny", DIGEST, vocab=64, context=16, batch=4, held_out=160),
    Model(width=32, layers=2, attention=Attention(head_dim=8)),
    schedule=Cosine(warmup_steps=3),
    budget=Budget(8 * 64),
)
# Leaves that change a run's name and nothing that it computes.
INERT_BY_NATURE = {
    "data.name": "a label for people, and the name of a folder; the digest says which tokens",
    "data.digest": "names the tokens: a wrong one is refused (below), null takes what is there",
    "data.epochs": "allows a mix to repeat a source: fewer than it takes are refused",
}
# Values that must show, where a number near or far would be refused or would not show.
TELLING = {
    "data.vocab": [72],
    "data.mix.tiny": [1.0],
    "data.mix.second": [3.0],
    "data.epochs": [2.0],
    "data.digest": [None],
    "data.shape.batch_ramp.stages": [0.75],
    "init": [{"run": "0" * 16, "steps": 5, "windows": 3}],
    "optim.clip": [0.05, None],
    "model.attention.mix.sliding_window.pattern": ["SLLL"],
}
# Doses that interventions need so that each of their keys matters, and the base paths beneath them.
RICH = {
    "adamw": (
        {
            "optim.chains.hidden.steps": [
                {"kind": "adam"},
                {"kind": "decay", "schedule": "lr"},
            ],
            "schedule.floor": 0.2,
        },
        [
            {"ema": {"horizon": 3, "start": 0.25, "mix": 0.7}},
            {"value_residual": {"form": "learnable", "own": 0.6, "first": 0.3}},
            {"qk_norm": {"gain": "scalar"}},
            "gating",
        ],
    ),
    "imu1": (
        {
            "optim.chains.embedding.steps": [{"kind": "adam"}, {"kind": "decay", "rate": 0.3}],
            "optim.chains.hidden.steps": [
                {"kind": "adam"},
                {"kind": "decay", "schedule": "linear"},
            ],
        },
        [
            "qk_norm",
            {"gating": {"per": "first_channels", "channels": 5, "init": "normal"}},
            "value_residual",
            "ln_scaling",
            "relu2",
            "soft_cap",
            "z_loss",
            {"mup": {"base_width": 16, "depth": "complete"}},
            {"muon": {"scale": "rms", "warmup_from": 0.8, "warmup_steps": 5}},
            "normuon",
            "cautious_wd",
            {"wsd": {"shape": "power", "decay_fraction": 0.5}},
            {"ema": {"mode": "posthoc", "checkpoints": 3, "span": 0.6}},
        ],
    ),
    "mixed": (
        {
            "schedule": {"kind": "constant", "warmup_steps": 3},
            "optim.chains.embedding.steps": ["lion"],
            "optim.chains.readout.steps": ["sgd"],
            "optim.chains.gate.steps": ["lion", "decay"],
            "optim.chains.vector.steps": [
                {"kind": "momentum", "warmup_from": 0.5, "warmup_steps": 3}
            ],
            "optim.chains.hidden.steps": [
                "momentum",
                {"kind": "orthogonalize", "scale": "spectral"},
                {"kind": "decay", "schedule": "linear"},
            ],
        },
        [{"gating": {"per": "elementwise"}}, "ema"],
    ),
    "released": (
        {},
        [
            "gating",
            {"value_residual": {"first_layer": "mixed"}},
            {"muon": {"warmup_from": 0.5, "warmup_steps": 8, "warmup_behind": 1}},
            {"wsd": {"shape": "power", "decay_fraction": 0.5, "idle_steps": 1}},
            "micro_steps",
            "adam_eps_inside",
            "truncated_init",
            "unclipped",
            "with_replacement",
        ],
    ),
    # Bases are renewed twice behind the first.
    "soap": ({}, [{"soap": {"frequency": 3}}]),
    # Four tokens a step leave some ReLUs dead, and so some updates of hidden weights exactly 0: a tie.
    "few": (
        {"data.batch": 1, "data.context": 4, "budget.tokens": 32},
        ["relu2", "cautious_wd"],
    ),
    # Of two layers the last sees all, and a pattern has one letter to say.
    "windows": ({"model.layers": 3}, ["sliding_window"]),
    # The first source is the folder of the others.
    "sources": (
        {"data.mix": {"tiny": 3.0, "second": 1.0}, "data.digest": None, "data.held_out": 320},
        [],
    ),
}
LISTED = {name for _, listed in RICH.values() for name in treatment_of(listed)}
RICH |= {
    name: ({}, [*cls.about.requires, name])
    for name, cls in REGISTRY.items()
    if name not in LISTED
}  # a user's own


@dataclass(frozen=True)
class Leaf:
    """A settable field of a rich recipe: its place in the plain tree, its type and its value."""

    rich: str
    path: tuple[str | int, ...]
    hint: Any
    value: Any


def rich_recipe(name: str) -> Recipe:
    recipe, (paths, listed) = BASE, RICH[name]
    for path, value in paths.items():
        recipe = assign(recipe, path, value)
    return resolve(recipe, treatment_of(listed))


def leaves(value: Any, hint: Any = None, path: tuple[str | int, ...] = (), name: str = ""):
    """(name, path, hint, value) of every leaf.  A name tells the kinds of parts: `schedule.wsd.floor`."""
    if isinstance(value, Part):
        name = f"{name}.{value.kind}"
    if dataclasses.is_dataclass(value):
        for key, hint in fields_of(type(value)).items():
            yield from leaves(
                getattr(value, key), hint, (*path, key), f"{name}.{key}".lstrip(".")
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, None, (*path, key), f"{name}.{key}")
    elif get_origin(hint) is tuple:
        for i, item in enumerate(value):
            yield from leaves(item, None, (*path, i), name)
        yield f"{name}[]", path, hint, value  # a part without fields leaves no other trace
    else:
        yield name, path, hint, value


def walk() -> tuple[dict[str, Recipe], dict[str, list[Leaf]], set[str]]:
    """The rich recipes, every leaf by name, and the slots that are empty in all of them."""
    recipes, found, empty = {}, {}, set()
    for rich in RICH:
        try:
            recipes[rich] = rich_recipe(rich)
        except UserError:
            continue  # an intervention that does not stand on the base fails its own contract
        for name, *rest in leaves(recipes[rich]):
            found.setdefault(name, []).append(Leaf(rich, *rest))
    empty = {
        name
        for name, slots in found.items()
        if name.endswith("[]") and not any(slot.value for slot in slots)
    }
    return (
        recipes,
        {name: leaf for name, leaf in found.items() if not name.endswith("[]")},
        empty,
    )


RECIPES, LEAVES, EMPTY = walk()


def changed(recipe: Recipe, path: tuple[str | int, ...], value: Any) -> Recipe:
    """Raises UserError where the value cannot stand there."""
    tree = holder = plain(recipe)
    for key in path[:-1]:
        holder[key] = list(holder[key]) if isinstance(holder[key], tuple) else holder[key]
        holder = holder[key]
    holder[path[-1]] = value
    return check(parse(Recipe, tree, ""))


@pytest.fixture(scope="module")
def folder_of(token_folder, write_token_folder, tmp_path_factory):
    """recipe -> a token folder with its vocabulary; the tokens are the same."""
    wider = write_token_folder(tmp_path_factory.mktemp("data") / "wider", vocab=72, top=64)
    for folder in (token_folder, wider):
        vocab = 72 if folder == wider else 64
        second = folder.with_name("second")
        write_token_folder(second, vocab=vocab, top=64, seed=1, like=folder)
    wider.with_name("tiny").symlink_to(wider)
    return lambda recipe: {64: token_folder, 72: wider}[recipe.data.vocab]


@pytest.fixture(scope="module")
def outcome(folder_of):
    """recipe -> the bits of its last weights and its held-out losses.  Each recipe is trained once."""
    seen = {}

    def of(recipe: Recipe):
        if (name := run_id(recipe)) not in seen:
            seen[name] = trained_or_refused(fitting(recipe), folder_of(recipe))
        return seen[name]

    return of


def fitting(recipe: Recipe) -> Recipe:
    """The wider folder has a digest of its own."""
    wider = recipe.data.vocab != BASE.data.vocab
    return assign(recipe, "data.digest", None) if wider else recipe


def trained_or_refused(recipe: Recipe, folder):
    """What stands in the recipe may not fit the tokens: another end of text than theirs."""
    try:
        trainer = Trainer(recipe, CPU, folder)
    except UserError as refusal:
        return str(refusal)
    return trained(trainer)


def trained(trainer: Trainer):
    while trainer.step < trainer.recipe.steps:
        trainer.advance()
    return trainer.digest(), trainer.evaluate()


@pytest.fixture
def others(other_values):
    """A leaf -> the recipes that hold another value there, those that should show most first."""

    def of(name: str, leaf: Leaf):
        for value in TELLING.get(name) or other_values(leaf.hint, leaf.value, name):
            try:
                recipe = changed(RECIPES[leaf.rich], leaf.path, value)
                plan_of(recipe)  # a part may refuse sizes only where it is built
            except UserError:
                continue  # it does not fit the rest of the recipe
            if recipe != RECIPES[leaf.rich]:
                assert run_id(recipe) != run_id(RECIPES[leaf.rich]), (
                    f"{name}={value} is another run of the same name"
                )
                yield recipe

    return of


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_changes_the_name_and_the_outcome_or_is_listed_as_inert(outcome, others, name):
    rounds = itertools.zip_longest(
        *(
            [(RECIPES[leaf.rich], other) for other in others(name, leaf)]
            for leaf in LEAVES[name]
        )
    )
    pairs = [
        pair for one in rounds for pair in one if pair
    ]  # the most telling value in each recipe first
    assert pairs, f"no other value of {name} is allowed; add one to TELLING"
    shows = any(outcome(other) != outcome(recipe) for recipe, other in pairs)
    assert shows != (name in INERT_BY_NATURE), (
        "nothing reads it" if not shows else "it is listed as inert, yet something reads it"
    )


def kinds_in(value: Any):
    """The kinds of all parts below."""
    if isinstance(value, Part):
        yield value.kind
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        yield from kinds_in(item)


# No shipped part stands there: tests/core/model/test_slots.py and tests/core/train/test_optimizer.py bring their own.
UNTENANTED = {"model.on_features[]", "optim.on_gradient[]"}


def test_every_part_and_every_slot_stands_in_a_rich_recipe():
    """Otherwise its leaves would not be asked."""
    kinds = {kind for recipe in RECIPES.values() for kind in kinds_in(recipe)}
    assert set(Part.known) <= kinds
    assert EMPTY <= UNTENANTED
    assert set(INERT_BY_NATURE) | set(TELLING) <= set(LEAVES) and all(INERT_BY_NATURE.values())


@pytest.mark.parametrize(
    ("path", "kind"), [("after_step", "ema"), ("optim.chains.hidden.steps", "momentum")]
)
def test_two_parts_that_would_share_one_state_are_refused(path, kind):
    """Checkpoints and banks know a state by its kind: of two, one would be lost."""
    check(assign(BASE, path, [kind]))
    with pytest.raises(UserError, match=f"{path} names '{kind}' twice"):
        check(assign(BASE, path, [kind, kind]))


def test_a_wrong_digest_is_refused(token_folder):
    with pytest.raises(UserError, match=f"holds data {DIGEST}, but the recipe names 0badc0de"):
        Trainer(assign(BASE, "data.digest", "0badc0de"), CPU, token_folder)


@pytest.mark.parametrize("rich", ["adamw", "imu1", "mixed"])
def test_a_warm_trainer_remembers_nothing_of_the_run_before(outcome, others, folder_of, rich):
    """Runs of one structure share compiled graphs; whatever differs between them must be read anew."""
    recipe, warm, shared = RECIPES[rich], Warm(), set()
    graphs = warm.trainer_for(recipe, CPU, folder_of(recipe))
    for name, leaf in [
        (name, leaf) for name, found in LEAVES.items() for leaf in found if leaf.rich == rich
    ]:
        other = next(others(name, leaf), recipe)
        if other != recipe and structure(other, CPU) == structure(recipe, CPU):
            trainer = warm.trainer_for(other, CPU, folder_of(other))
            assert trainer is graphs and trained(trainer) == outcome(other), name
            shared.add(name)
    assert {"seed", "optim.lr", "budget.tokens", "data.held_out"} < shared
