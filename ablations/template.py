"""The files that `ablab new` writes: an intervention, neutral and passing the contract tests; a design."""

import keyword
from collections.abc import Collection
from pathlib import Path

from ablab.ablations.design import DESIGNS
from ablab.core.errors import UserError
from ablab.core.recipe.intervention import REGISTRY
from ablab.core.store.files import write_atomically

TEXT = '''"""{title}: one sentence that says what it does.

    y <- y * exp(strength),   strength a learned number, start 0: nothing changes at the start
"""

from ablab.core.language.declare import Param, Stage, Where
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register
from ablab.core.language.part import Part


@register(
    "{name}", slots=("model.attention.on_heads",), neutral_at_init=True,
    off="head outputs go to the output projection as they are",
    source="who had the idea, and where it is written down",
)
class {cls}(Part):
    """One line for `ablab list`."""

    start: float = 0.0  # a dose: any field of a plain type, checked and hashed

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_heads", append(self))

    def build(self, where: Where) -> Stage:
        return Stage(scale, strength=Param((1,), "vector", fill=self.start))


def scale(y, x, *, strength):
    """y: [B,T,H,D] head outputs, x: [B,T,W] the block's normed input -> [B,T,H,D]."""
    return y * strength.exp().to(y.dtype)
'''


DESIGN = '''"""{title}: one sentence that says which cells it makes, and what each is measured against."""

from ablab.ablations.design import Cell, register_design


@register_design("{name}")
def {name}(treatment, at_most: int = 3):
    """One line for `ablab list`.

    treatment: name -> intervention, as `with` lists them.  at_most: an option, {{{name}: {{at_most: 2}}}} in a sheet.
    """
    cells = [Cell("base")]
    for name in list(treatment)[:at_most]:
        cells.append(Cell(f"+ {{name}}", {{name: treatment[name]}}, "base"))
    return cells
'''


def write_design(name: str, folder: Path) -> Path:
    """The path of the new file.  Raises UserError: no name for a design, or a name that is taken."""
    path = _new_file(name, folder, "a design", DESIGNS)
    title = " ".join(name.split("_")).capitalize()
    write_atomically(path, DESIGN.format(name=name, title=title).encode())
    return path


def write(name: str, folder: Path) -> Path:
    """The path of the new file.  Raises UserError: no name for an intervention, or a name that is taken."""
    path = _new_file(name, folder, "an intervention", REGISTRY)
    words = name.split("_")
    text = TEXT.format(
        name=name,
        title=" ".join(words).capitalize(),
        cls="".join(word.title() for word in words),
    )
    write_atomically(path, text.encode())
    return path


def _new_file(name: str, folder: Path, noun: str, taken: Collection[str]) -> Path:
    if not name.isidentifier() or keyword.iskeyword(name) or name.lower() != name:
        raise UserError(
            f"{name!r} cannot name {noun}; use lower-case letters, digits and underscores, such as my_idea"
        )
    path = folder / f"{name}.py"
    if name in taken or path.exists():
        raise UserError(f"{name!r} exists already; choose another name")
    return path
