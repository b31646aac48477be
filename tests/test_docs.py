"""What the pages say of the code is there: files, functions, the schema."""

import ast
import re
from pathlib import Path

import pytest

from ablab.core.recipe.recipe import SCHEMA

ROOT = Path(__file__).parents[1]
PAGES = (
    *("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"),
    *(f"docs/pages/{path.name}" for path in sorted((ROOT / "docs" / "pages").glob("*.md"))),
)
FOLDERS = "core|kernels|ablations|experiments|analysis|configs|docs|tests"
# `folder/`, `folder/file.py` or `folder/file.py:Class.method`
REFERENCE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*|[A-Z]+\.md)(?::([\w.]+))?`")


def references(page: str) -> list[tuple[str, str]]:
    """(path, name in it or '')."""
    return REFERENCE.findall((ROOT / page).read_text())


def defined(tree: ast.AST) -> dict[str, ast.AST]:
    """Names that a module or a class defines."""
    names: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]):
                names[name] = node
            case ast.AnnAssign(target=ast.Name(id=name)):
                names[name] = node
    return names


def stands_in(source: str, dotted: str) -> bool:
    tree: ast.AST = ast.parse(source)
    for name in dotted.split("."):
        names = defined(tree)
        if name not in names:
            return False
        tree = names[name]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_function_that_a_page_names_exists(page):
    missing = []
    for path, name in references(page):
        if not (ROOT / path).exists():
            missing.append(path)
        elif name and not stands_in((ROOT / path).read_text(), name):
            missing.append(f"{path}:{name}")
    assert not missing


def test_what_is_not_there_is_seen():
    source = "LIMIT = 3\nclass A:\n    x: int = 0\n    def f(self): ...\ndef g():\n    h = 1\n"
    for name in ("LIMIT", "A", "A.x", "A.f", "g"):
        assert stands_in(source, name)
    for name in ("B", "A.g", "f", "h", "A.f.x"):
        assert not stands_in(source, name)
    found = REFERENCE.findall("`core/a.py` `core/a.py:B.c` `core/` `optim/lr` `README.md`")
    assert found == [("core/a.py", ""), ("core/a.py", "B.c"), ("core/", ""), ("README.md", "")]


JOURNEYS = (
    "A token block",
    "A toggle",
    "A learning rate",
    "A result",
    "An override",
    "A trial",
    "An evaluation",
)


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_journey_names_files_all_along_the_way(journey):
    text = (ROOT / "ARCHITECTURE.md").read_text()
    _, _, after = text.partition(f"\n## {journey}\n")
    stations, _, _ = after.partition("\n## ")
    assert len(REFERENCE.findall(stations)) >= 6


def test_every_folder_stands_in_the_map():
    named = {path for path, _ in references("ARCHITECTURE.md")}
    for top in ("core", "experiments"):
        rooms = (path.parent for path in (ROOT / top).glob("*/__init__.py"))
        for room in rooms:
            assert f"{top}/{room.name}/" in named, room


def test_the_top_entry_of_the_changelog_names_the_schema_of_today():
    entries = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert entries[0] == f"Schema {SCHEMA}"
