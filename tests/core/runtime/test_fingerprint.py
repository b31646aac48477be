"""The code fingerprint moves with what can change a number, and with nothing else."""

import pytest

from ablab.core.runtime import fingerprint
from ablab.core.runtime.fingerprint import code_fingerprint, syntax

SOURCE = '''"""A module."""

RATE = 0.1  # decay


class Scale:
    """A class."""

    power = 2

    def of(self, x):
        """A method."""
        return x**self.power * RATE
'''
SAME = {
    "a module's docstring": ('"""A module."""', '"""Another module,\nlonger."""'),
    "no docstring": ('"""A module."""\n', ""),
    "a class's docstring": ('"""A class."""', '"""What scales."""'),
    "a function's docstring": ('"""A method."""\n        ', ""),
    "a comment": ("# decay", "# of weights"),
    "a blank line": ("\nclass", "\n\n\nclass"),
    "a line break": ("x**self.power * RATE", "(\n            x**self.power * RATE\n        )"),
    "quotes": ('"""A class."""', "'A class.'"),
}
OTHER = {
    "a number": ("0.1", "0.2"),
    "an operator": ("* RATE", "/ RATE"),
    "a name": ("power", "degree"),
    "an argument": ("(self, x)", "(self, x, y)"),
    "a default": ("(self, x)", "(self, x=1)"),
    "a type of a number": ("= 2", "= 2.0"),
    "an order": ("x**self.power", "self.power**x"),
    "a string that is no docstring": ("power = 2", "power = 2\n    'text'"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_cannot_change_a_number_is_no_part_of_it(change):
    old, new = SAME[change]
    assert old in SOURCE and SOURCE.replace(old, new) != SOURCE
    assert syntax(SOURCE.replace(old, new)) == syntax(SOURCE)


@pytest.mark.parametrize("change", OTHER)
def test_what_can_change_a_number_is(change):
    old, new = OTHER[change]
    assert old in SOURCE
    assert syntax(SOURCE.replace(old, new)) != syntax(SOURCE)


@pytest.fixture
def fingerprint_of(tmp_path, monkeypatch):
    """text of a file at a path -> the fingerprint of a house with that one file."""

    def taken(path, text):
        for old in tmp_path.rglob("*.py"):
            old.unlink()
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
        code_fingerprint.cache_clear()
        return code_fingerprint()

    yield taken
    code_fingerprint.cache_clear()


def test_a_docstring_in_a_file_keeps_the_fingerprint_and_a_number_moves_it(fingerprint_of):
    path = "core/data/corpus.py"
    plain = fingerprint_of(path, SOURCE)
    assert fingerprint_of(path, SOURCE.replace("A module.", "Documents become ids.")) == plain
    assert fingerprint_of(path, SOURCE.replace("0.1", "0.2")) != plain


def test_core_kernels_and_ablations_count_and_no_other_folder(fingerprint_of):
    nothing = fingerprint_of("README.py", SOURCE)
    for folder in ("core", "kernels", "ablations/interventions"):
        assert fingerprint_of(f"{folder}/a.py", SOURCE) != nothing
    for folder in ("experiments", "analysis", "configs", "tests"):
        assert fingerprint_of(f"{folder}/a.py", SOURCE) == nothing


def test_a_file_counts_by_its_name_too(fingerprint_of):
    assert fingerprint_of("core/a.py", SOURCE) != fingerprint_of("core/b.py", SOURCE)
