"""Why two identities differ, and why a run that is asked for is not one that the store has.

An identity is made of the schema number, of what the recipe says, and of the code of the user's own interventions
(core/recipe/recipe.py:identity_of).  All three are compared, field by field.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.language.written import Unreadable, dump, read, typed
from ablab.core.recipe.edit import diff
from ablab.core.recipe.recipe import SCHEMA, Recipe, identity_of, plain, run_id
from ablab.core.store.result import RETRY
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import PlannedRun

# Runs of a store whose recipes are read whole: those with the most lines in common.
CANDIDATES = 8
BY_WORDS = "a cell is named by two words: ablab why quickstart full"


@dataclass(frozen=True)
class Identity:
    """What a run's name was made of.  schema, plugins: None where the run has not recorded them."""

    run: str
    recipe: dict[str, Any]
    schema: int | None
    plugins: dict[str, str] | None


def why_differ(store: Store, one: str, other: str) -> list[str]:
    """A line for each field in which the identities of two runs differ.  Raises UserError: no such run, or the same."""
    first = store.id_of(one, BY_WORDS)
    second = store.id_of(other, BY_WORDS)
    if first == second:
        raise UserError(f"{one!r} and {other!r} are one run, {first}; name two")
    return _differences(_stored(store, first), _stored(store, second))


def why_not_reused(store: Store, asked: PlannedRun) -> list[str]:
    """What the store has of a run, and where it has nothing, the nearest run and the fields that differ."""
    title = f"{asked.cell}, seed {asked.recipe.seed}: run {asked.id}"
    record = store.run(asked.id)
    try:
        result = record.result()
    except UserError as damage:
        return [f"{title} is there, but {damage}"]
    if result and result.status in RETRY:
        return [f"{title} ended as {result.status}, which is tried again: {result.error}"]
    if result:
        return [f"{title} is there, {result.status}: it is reused"]
    if record.folder.is_dir():
        return [f"{title} was begun and has no result: it goes on from its last checkpoint"]
    nearest = _nearest(store, asked)
    if nearest is None:
        return [f"{title} is not there, nor is any other run in {store.root}"]
    experiment = store.run(nearest.run).about().get("experiment", "an experiment")
    return [
        f"{title} is not there; the nearest is {nearest.run}, trained for {experiment}, which differs in:",
        *(f"  {line}" for line in _differences(nearest, _asked(asked.recipe))),
    ]


# -- identities --------------------------------------------------------------------------------------------------------
def _folders(store: Store) -> list[Path]:
    """Of the runs whose recipes are there."""
    records = [store.run(run) for run in store.run_ids()]
    return [record.folder for record in records if record.recipe_path.is_file()]


def _stored(store: Store, run: str) -> Identity:
    """Raises UserError where its recipe cannot be read."""
    record = store.run(run)
    try:
        tree = read(record.recipe_path.read_text("utf-8"))
    except (OSError, Unreadable, UnicodeDecodeError) as flaw:
        raise UserError(
            f"cannot read {record.recipe_path}: {flaw}; delete {record.folder} to train that run again"
        ) from None
    known = record.about().get("identity") or {}
    schema, plugins = known.get("schema"), known.get("plugins")
    try:
        recipe = parse(Recipe, tree, "")
    except (
        UserError
    ):  # written by another version, or with a plugin that is not loaded: compared as it stands
        return Identity(run, tree, schema, plugins)
    if run_id(recipe) == run:
        return _asked(recipe)
    return Identity(run, identity_of(recipe)["recipe"], schema, plugins)


def _asked(recipe: Recipe) -> Identity:
    now = identity_of(recipe)
    return Identity(run_id(recipe), now["recipe"], SCHEMA, now["plugins"])


def _differences(one: Identity, other: Identity) -> list[str]:
    lines = [
        f"{path}: {_shown(before)} -> {_shown(now)}"
        for path, (before, now) in diff(one.recipe, other.recipe).items()
    ]
    if one.schema != other.schema:
        lines.append(f"schema: {_recorded(one.schema)} -> {_recorded(other.schema)}")
    for kind in sorted({**(one.plugins or {}), **(other.plugins or {})}):
        before = _digest(one.plugins, kind)
        now = _digest(other.plugins, kind)
        if before != now:
            lines.append(f"code of the plugin {kind}: {before} -> {now}")
    return lines or [
        "no field that is recorded: the schema or the code of a plugin was another, before runs said which"
    ]


def _digest(plugins: dict[str, str] | None, kind: str) -> str:
    return "not recorded" if plugins is None else plugins.get(kind, "not its own")


def _recorded(schema: int | None) -> str:
    return "not recorded" if schema is None else str(schema)


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else typed(value)


# -- the nearest run ---------------------------------------------------------------------------------------------------
def _nearest(store: Store, asked: PlannedRun) -> Identity | None:
    """Of the stored runs the one with the fewest fields that differ; of those, one of the same seed."""
    wanted = set(dump(plain(asked.recipe)).splitlines())
    apart = {folder: len(wanted ^ _lines(folder)) for folder in _folders(store)}
    closest = sorted(apart, key=lambda folder: (apart[folder], folder.name))[:CANDIDATES]
    now = _asked(asked.recipe)
    judged = []
    for identity in _readable(store, closest):
        differing = diff(identity.recipe, now.recipe)
        judged.append((len(differing), "seed" in differing, identity.run, identity))
    return min(judged)[3] if judged else None


def _lines(folder: Path) -> set[str]:
    try:
        return set((folder / "recipe.yaml").read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return set()


def _readable(store: Store, folders: list[Path]) -> Iterator[Identity]:
    for folder in folders:
        try:
            yield _stored(store, folder.name)
        except UserError:
            continue
