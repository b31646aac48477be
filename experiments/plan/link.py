"""One run of a chain, before its seed and what it goes on from are known."""

from dataclasses import dataclass, field

from ablab.core.model.heritage import Wish
from ablab.core.recipe.recipe import Recipe


@dataclass(frozen=True)
class Link:
    """name: of the stage; empty where there is but one.

    wish: what it asks of the run before it.  repeats: it computes as the one before, so nothing of it is to be checked.
    counts_averages: its averages count their steps from the start of the chain, though they begin here.
    """

    name: str
    recipe: Recipe
    wish: Wish = field(default_factory=Wish)
    repeats: bool = False
    counts_averages: bool = False
