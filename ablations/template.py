"""The file that `ablab new intervention NAME` writes: neutral, complete, and passing the contract tests."""

import keyword
from pathlib import Path

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


def write(name: str, folder: Path) -> Path:
    """The path of the new file.  Raises UserError: no name for an intervention, or a name that is taken."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.lower() != name:
        raise UserError(
            f"{name!r} cannot name an intervention; "
            "use lower-case letters, digits and underscores, such as my_idea"
        )
    path = folder / f"{name}.py"
    if name in REGISTRY or path.exists():
        raise UserError(f"{name!r} exists already; choose another name")
    words = name.split("_")
    text = TEXT.format(
        name=name,
        title=" ".join(words).capitalize(),
        cls="".join(word.title() for word in words),
    )
    write_atomically(path, text.encode())
    return path
