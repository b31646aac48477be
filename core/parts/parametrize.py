"""Parametrization: how init, learning rate, decay and multipliers depend on a parameter's name, role and fans."""

from dataclasses import dataclass
from typing import Protocol

from ablab.core.language.declare import Param
from ablab.core.language.numbers import Positive
from ablab.core.language.part import Part, part


class Sizes(Protocol):
    """What a parametrization may know of the model; core/recipe/recipe.py's Model has more."""

    @property
    def width(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def tied(self) -> bool: ...


@dataclass(frozen=True)
class Scales:
    """For one parameter: init std, and the factors on its chain's learning rate and decay.

    cut: the normal is drawn within so many std of 0; 0: the whole of it.
    """

    std: float
    lr: float = 1.0
    decay: float = 1.0
    cut: float = 0.0


@dataclass(frozen=True)
class Multipliers:
    """Forward factors: on the embedding's output, on each residual branch, on the logits."""

    embedding: float = 1.0
    branch: float = 1.0
    logits: float = 1.0


@part("standard")
class Standard(Part):
    """The standard parametrization: fan-in init, one learning rate for every width.

    std = gain / sqrt(fan_in) for matrices, `embedding` for the token table; no depth-scaled init, which
    LayerNorm scaling would fight (Sun et al., arXiv:2502.05795, README).
    """

    embedding: Positive = 0.02
    gain: Positive = 1.0

    def scales(self, name: str, param: Param, model: Sizes, rule: str) -> Scales:
        if param.role == "embedding":
            return Scales(self.embedding)
        fan_in = param.shape[-1]
        return Scales(self.gain / fan_in**0.5)

    def multipliers(self, model: Sizes) -> Multipliers:
        return Multipliers()
