"""Plugins: what a part is made of is its file and what that imports from its folder; a broken one is named."""

import hashlib
import sys
from textwrap import dedent

import pytest

from ablab.ablations import registry
from ablab.ablations.own_files import digest_of, own_files
from ablab.core.errors import UserError
from ablab.core.language.part import Part
from ablab.core.recipe.intervention import REGISTRY

IDEA = """\
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ablab.core.recipe.intervention import register
from ablab.core.language.part import Part
{imports}

@register("idea", slots=("schedule",), off="nothing", source="a test")
class Idea(Part):
    "A test."

    def apply(self, recipe):
        return recipe
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write files into a plugin folder; whatever is registered from it is forgotten afterwards."""
    kept = [(each, dict(each)) for each in (REGISTRY, Part.known, Part.foreign)]
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(**files: str):
        for name, text in files.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(dedent(text))
        return tmp_path

    yield write
    for each, before in kept:
        each.clear()
        each.update(before)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def signature(folder) -> str:
    """The digest of the part, as a new process would find it."""
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    for each in (REGISTRY, Part.known, Part.foreign):
        each.pop("idea", None)
    registry.discover([folder])
    return Part.foreign["idea"]


def test_a_plugin_without_helpers_is_known_by_its_bytes_alone(folder):
    """As before there were helpers: no run is renamed."""
    where = folder(idea=IDEA.format(imports=""))
    bytes_of_it = (where / "idea.py").read_bytes()
    assert signature(where) == hashlib.sha256(bytes_of_it).hexdigest()[:12]


HELPERS = {
    "a helper": ("from _helper import factor", {"_helper": "factor = 1"}, "_helper"),
    "its helper": (
        "import _helper",
        {"_helper": "from _deeper import factor", "_deeper": "factor = 1"},
        "_deeper",
    ),
    "in a function": (
        "def late():\n    from _helper import factor\n",
        {"_helper": "factor = 1"},
        "_helper",
    ),
    "a package": (
        "from kit import tools",
        {"kit/__init__": "", "kit/tools": "from . import parts", "kit/parts": "factor = 1"},
        "kit/parts",
    ),
    "the package's own file": (
        "import kit.tools",
        {"kit/__init__": "factor = 1", "kit/tools": ""},
        "kit/__init__",
    ),
}


@pytest.mark.parametrize("kind", HELPERS)
def test_an_edit_of_what_it_imports_from_its_folder_is_another_part(folder, kind):
    imports, helpers, edited = HELPERS[kind]
    where = folder(idea=IDEA.format(imports=imports), **helpers)
    first = signature(where)
    assert signature(where) == first
    folder(**{edited: "factor = 2"})
    assert signature(where) != first


def test_an_edit_of_a_file_that_it_does_not_import_is_the_same_part(folder):
    imports = "from _helper import factor"
    where = folder(idea=IDEA.format(imports=imports), _helper="factor = 1", _other="factor = 1")
    first = signature(where)
    folder(_other="factor = 2")
    assert signature(where) == first


def test_helpers_that_import_each_other_and_installed_files_below_end_the_search(folder):
    where = folder(
        idea="import _one, torch, site",
        _one="import _two",
        _two="import _one",
    )
    installed = where / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "torch.py").write_text("import _two")
    sys.path.append(str(installed))
    found = own_files(where / "idea.py", where)
    assert [path.name for path in found] == ["idea.py", "_one.py", "_two.py"]
    assert digest_of(where / "_one.py", where) != digest_of(where / "_two.py", where)


def test_a_part_that_a_helper_defines_is_known_by_the_helper(folder):
    helper = """
        from ablab.core.language.part import Part, part

        @part("helped")
        class Helped(Part):
            factor: float = {factor}
    """
    where = folder(
        idea=IDEA.format(imports="import _helper"), _helper=helper.format(factor=1.0)
    )
    signature(where)
    assert Part.foreign["helped"] == digest_of(where / "_helper.py", where)


def test_what_is_imported_by_a_name_made_at_run_time_is_refused(folder):
    imports = 'import importlib; importlib.import_module("_hel" + "per")'
    where = folder(idea=IDEA.format(imports=imports), _helper="factor = 1")
    with pytest.raises(UserError, match="_helper.py by no import statement"):
        signature(where)


def test_an_edit_within_a_second_that_keeps_the_size_runs_the_new_code(folder):
    for factor in "123":
        where = folder(
            idea=IDEA.format(imports=f"from _helper import own\nfactor = {factor}"),
            _helper=f"own = {factor}",
        )
        signature(where)
        module = sys.modules[REGISTRY["idea"].__module__]
        assert (module.factor, module.own) == (int(factor), int(factor))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit()", "idea.py:2 cannot be imported: SystemExit"),
        ("raise SystemExit(0)", "idea.py:1 cannot be imported: SystemExit: 0"),
        (
            "x = 1\n\nraise ValueError('a\\nb\\udc80\\x00')",
            r"idea.py:3 .*ValueError: a b\\udc80\\x00$",
        ),
        (
            "class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute",
            "idea.py:3 .*Mute: it cannot be shown, for that raises ZeroDivisionError",
        ),
        ("raise ValueError('a' * 5000)", r"idea.py:1 .*aaa \.\.\. a+$"),
    ],
)
def test_a_plugin_that_breaks_at_its_import_is_named_with_its_line(folder, text, said):
    where = folder(idea=text)
    with pytest.raises(UserError, match=said) as refused:
        registry.discover([where])
    line = str(refused.value)
    assert line.isprintable() and len(line) < 400 + len(str(where))
