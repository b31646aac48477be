"""Designs of one recipe: trained alone, or twice to see how noisy it is."""

from dataclasses import dataclass

from ablab.ablations.designs.cell import BASE, FULL, Cell, Layout
from ablab.core.recipe.intervention import Treatment


@dataclass(frozen=True)
class Single:
    """The recipe alone, with nothing to compare it with: to train it, not to judge it."""

    def layout(self, treatment: Treatment) -> Layout:
        return Layout([Cell(FULL, dict(treatment))])


@dataclass(frozen=True)
class Arms:
    """base, which has all of `with`; the arms that the sheet writes out are measured against it."""

    def layout(self, treatment: Treatment) -> Layout:
        return Layout([Cell(BASE, dict(treatment))])


@dataclass(frozen=True)
class Replicate:
    """A and B: the same recipe twice on disjoint seeds.  Any verdict that tells them apart is a false alarm."""

    def layout(self, treatment: Treatment) -> Layout:
        return Layout([Cell("A", dict(treatment)), Cell("B", dict(treatment), "A", replica=1)])
