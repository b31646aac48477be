"""The documentation site: it is built from what the code knows, needs no network, and its commands exist."""

import html
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml

from ablab.ablations.design import DESIGNS
from ablab.core.language.parse import fields_of, paths_of
from ablab.core.recipe.intervention import REGISTRY
from ablab.core.recipe.recipe import Recipe
from ablab.core.recipe.slots import SLOTS
from ablab.core.runtime.runtime import Runtime
from ablab.experiments.cli.main import app
from ablab.experiments.plan.sheets import (
    ArmSheet,
    Sheet,
    StageSheet,
    StudySheet,
    catalog,
    read_sheet,
)

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
TEXT = {path.name: path.read_text() for path in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)


# -- what is built -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it, without a way to the network."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    words = ["-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", "docs/mkdocs.yml"]
    built = subprocess.run(
        [sys.executable, *words, "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    assert built.stdout + built.stderr == ""
    return folder


@pytest.fixture(scope="module")
def headings(site):
    """Page -> what its headings and code words say."""

    def read(page: str) -> set[str]:
        text = (site / page).read_text()
        found = re.findall(r"<code>([^<]*)</code>", text) + re.findall(
            r"<h2 id=[^>]*>([^<]*)", text
        )
        return {html.unescape(one) for one in found}

    return read


def commands():
    """Words of a command -> it, of every command that does something."""

    def walk(group, path):
        for name, one in group.commands.items():
            if hasattr(one, "commands"):
                yield from walk(one, (*path, name))
            else:
                yield (*path, name), one

    return dict(walk(typer.main.get_command(app), ()))


def test_every_key_of_a_sheet_has_its_place(headings):
    said = headings("reference/sheet.html")
    for cls, prefix in ((Sheet, ""), (ArmSheet, ""), (StageSheet, ""), (StudySheet, "study.")):
        keys = {"with" if name == "treatment" else name for name in fields_of(cls)}
        assert {f"{prefix}{key}" for key in keys} <= said
    assert {f"runtime.{name}" for name in fields_of(Runtime)} <= headings(
        "reference/runtime.html"
    )


def test_every_path_of_a_recipe_has_its_place(headings):
    assert set(paths_of(Recipe)) <= headings("reference/recipe.html")


def test_every_intervention_has_its_place_with_its_control_and_its_doses(headings, site):
    said = headings("reference/interventions.html")
    text = html.unescape((site / "reference/interventions.html").read_text())
    for name, made in REGISTRY.items():
        assert {name, *fields_of(made)} <= said
        assert made.about.off in text


def test_every_slot_design_and_experiment_has_its_place(headings):
    assert {slot.path for slot in SLOTS} <= headings("reference/slots.html")
    assert set(DESIGNS) <= headings("reference/designs.html")
    assert set(catalog()) <= headings("reference/experiments.html")


def test_every_command_and_option_has_its_place(headings):
    said = headings("reference/commands.html")
    for words, command in commands().items():
        assert f"ablab {' '.join(words)}" in said
        options = {one for param in command.params for one in param.opts if one.startswith("-")}
        assert options <= said


def test_every_public_name_for_notebooks_has_its_place(headings):
    public = set(import_module("ablab.analysis").__all__)
    assert public <= headings("reference/api.html")


def test_a_page_fetches_nothing(site):
    fetched = []
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)[^>]*>", page.read_text())
        fetched += [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)]
    assert not fetched


# -- what is written by hand -------------------------------------------------------------------------------------------
def lines() -> list[str]:
    """Every line of ablab in a block of commands, and every command in a sentence."""
    found = []
    for text in TEXT.values():
        blocks = [body for kind, body in BLOCK.findall(text) if kind == ""]
        found += [line for body in blocks for line in body.splitlines()]
        found += re.findall(r"`(ablab [a-z][^`]*)`", BLOCK.sub("", text))
    return sorted({line for line in found if line.startswith("ablab ")})


@pytest.mark.parametrize("line", lines())
def test_a_command_of_a_page_is_one_and_has_its_options(line):
    known = commands()
    words = shlex.split(line)[1:]
    depth = next((size for size in (2, 1) if tuple(words[:size]) in known), None)
    if depth is None:  # in a sentence, a group of commands may be named
        assert any(name[: len(words)] == tuple(words) for name in known), line
        return
    options = {one for param in known[tuple(words[:depth])].params for one in param.opts}
    assert {word for word in words[depth:] if word.startswith("--")} <= options


README = (ROOT / "README.md").read_text()
# What the tutorial says besides the README's commands; its sheets are read below.
OF_ITS_SHEETS = ("mine.yaml", "mine_tuned.yaml")


def test_the_tutorial_runs_the_commands_of_the_readme_or_those_of_its_own_sheets():
    steps = [
        line
        for kind, body in BLOCK.findall(TEXT["tutorial.md"])
        if not kind
        for line in body.splitlines()
    ]
    strange = [
        line
        for line in steps
        if line not in README and not any(one in line for one in OF_ITS_SHEETS)
    ]
    assert not strange


def yaml_blocks() -> list[tuple[str, str]]:
    return [
        (name, body)
        for name, text in TEXT.items()
        for kind, body in BLOCK.findall(text)
        if kind == "yaml"
    ]


@pytest.mark.parametrize(("page", "body"), yaml_blocks())
def test_a_sheet_of_a_page_is_one(page, body, tmp_path):
    """Also a part of one, beside the keys that every sheet has."""
    content = {"question": "?", "base": ["base"]} | yaml.safe_load(body)
    path = tmp_path / "sheet.yaml"
    path.write_text(yaml.safe_dump(content))
    sheet = read_sheet(path)
    for name in sheet.set:
        known = set(paths_of(Recipe))
        assert name in known, name


def test_python_of_a_page_names_what_is_public():
    public = set(import_module("ablab.analysis").__all__)
    blocks = [
        body for text in TEXT.values() for kind, body in BLOCK.findall(text) if kind == "python"
    ]
    assert blocks
    for body in blocks:
        compile(body, "a page", "exec")
        assert set(re.findall(r"\bab\.(\w+)", body)) <= public


def test_what_a_page_says_without_the_code_stops_the_build(monkeypatch):
    """A column more, or one that is no longer there."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    generate = import_module("generate")
    monkeypatch.setitem(generate.SAID["columns"], "gone", "a column that no report has")
    with pytest.raises(ValueError, match="columns.*differ in .'gone'"):
        generate.report()
