"""YAML files and dotted overrides -> a typed recipe.  Strict: unknown keys are errors with the near miss named."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, near, parse
from ablab.core.language.written import LONGEST, Unreadable, read
from ablab.core.recipe.edit import children, edit
from ablab.core.recipe.recipe import Data, Recipe, check, plain

CONFIGS = Path(str(files("ablab.configs")))


def read_yaml(path: Path) -> dict[str, Any]:
    """A file that holds a mapping.  Raises UserError: cannot be read, or not YAML (with the line)."""
    try:
        with open(path, "rb") as file:
            content = read(file.read(4 * LONGEST).decode())  # a device has no end
    except OSError as refusal:
        raise UserError(f"cannot read {path}: {refusal.strerror}") from None
    except UnicodeDecodeError as flaw:
        raise UserError(
            f"{path} is not UTF-8 text ({flaw.reason} at byte {flaw.start}); name a YAML file"
        ) from None
    except Unreadable as flaw:
        line = f":{flaw.line}" if flaw.line else ""
        raise UserError(f"{path}{line} is not YAML: {flaw}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a mapping of names to values, not {content!r:.40}")
    return dict(content)


def find_config(name: str, beside: Path | None = None) -> Path:
    """`size/70m` -> the file, first beside the experiment that asks, then among the shipped configs."""
    folders = [folder for folder in (beside, CONFIGS) if folder]
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    files_here = [path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")]
    shipped = sorted(str(path.with_suffix("")) for path in files_here)
    own = [path.stem for path in beside.glob("*.yaml")] if beside else []
    said = near(name, own + shipped)
    raise UserError(f"unknown config {name!r}. {said}Shipped: {', '.join(shipped)}")


def merge(old: Any, new: Any) -> Any:
    """Mappings merge key by key, except that a part of another kind replaces the old one; all else replaces."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    if "kind" in new and new["kind"] != old.get("kind"):
        return new
    merged = dict(old)
    for key, value in new.items():
        merged[key] = merge(old[key], value) if key in old else value
    return merged


def recipe_from(
    names: Iterable[str], overrides: Mapping[str, Any] = {}, beside: Path | None = None
) -> Recipe:
    """The defaults of core/recipe/recipe.py, then each named config, then `{dotted path: value}`."""
    recipe = Recipe(data=Data(name=""))
    for name in names:
        path = find_config(name, beside)
        tree = merge(plain(recipe), read_yaml(path))
        with blaming(path):
            recipe = parse(Recipe, tree, "")
    for setting, value in overrides.items():
        recipe = assign(recipe, setting, value)
    if not recipe.data.name:
        raise UserError(
            "the recipe names no data; add a config such as data/embedded to its base"
        )
    return check(recipe)


@contextmanager
def blaming(path: Path):
    """Lead a UserError by the file that holds the mistake."""
    try:
        yield
    except UserError as flaw:
        raise UserError(f"{path}: {flaw}") from None


def assign(recipe: Any, path: str, value: Any) -> Any:
    """Set one leaf, checked against its type.  Raises UserError for an unknown path or a wrong value."""
    parent, _, leaf = path.rpartition(".")

    def set_leaf(holder: Any) -> Any:
        hint = _type_of(holder, leaf)
        return edit(holder, leaf, lambda old: parse(hint, value, path))

    try:
        return edit(recipe, parent, set_leaf) if parent else set_leaf(recipe)
    except UserError as flaw:
        said = str(flaw).replace("unknown path ", f"unknown path {path!r}: no ", 1)
        raise UserError(said) from None


def _type_of(holder: Any, leaf: str) -> Any:
    """The type of a field; in a mapping, and among the parts of a slot, the type of what stands there."""
    if is_dataclass(holder):
        return fields_of(type(holder)).get(leaf)
    return type(children(holder).get(leaf))


def overrides_from(words: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=0.01"]` -> {"optim.lr": 0.01}; the value is read as YAML."""
    overrides: dict[str, Any] = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals or not path:
            raise UserError(
                f"override {word!r} must look like path=value, for example optim.lr=0.01"
            )
        try:
            overrides[path] = read(value)
        except Unreadable as flaw:
            said = f"override {word!r:.120}: the value is not YAML ({flaw}); quote it"
            raise UserError(said) from None
    return overrides
