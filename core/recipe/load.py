"""YAML files and dotted overrides -> a typed recipe.  Strict: unknown keys are errors with the near miss named."""

import re
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, near, parse
from ablab.core.recipe.edit import children, edit
from ablab.core.recipe.recipe import Data, Recipe, check, plain

CONFIGS = Path(str(files("ablab.configs")))


SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(SafeLoader):
    """Refuses a key that is given twice; YAML keeps the last one in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as a word.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file that holds a mapping.  Raises UserError: cannot be read, or not YAML (with the line)."""
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as refusal:
        raise UserError(f"cannot read {path}: {refusal.strerror}") from None
    except yaml.YAMLError as flaw:
        mark = getattr(flaw, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not YAML: {_told(flaw)}") from None
    except UnicodeDecodeError as flaw:
        raise UserError(
            f"{path} is not UTF-8 text ({flaw.reason} at byte {flaw.start}); name a YAML file"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a mapping of names to values, not {content!r:.40}")
    return dict(content)


def _told(flaw: yaml.YAMLError) -> str:
    """The parser's complaint on one line."""
    return " ".join(str(getattr(flaw, "problem", None) or flaw).split())


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
            overrides[path] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as flaw:
            said = f"override {word!r}: the value is not YAML ({_told(flaw)}); quote it"
            raise UserError(said) from None
    return overrides


def dump(tree: Any) -> str:
    """Plain data as YAML, keys in the order of their fields."""
    return yaml.dump(tree, sort_keys=False, allow_unicode=True, width=110, Dumper=_Dumper)


class _Dumper(yaml.SafeDumper):
    """Tuples as lists, no anchors: the file is read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_list(dumper: yaml.SafeDumper, data: tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data)


_Dumper.add_representer(tuple, _as_list)
