"""Parametrization: how init, learning rate, decay and multipliers depend on a parameter's role and fans."""

from dataclasses import dataclass
from typing import Any

from ablab.core.language.declare import Param
from ablab.core.language.numbers import Positive
from ablab.core.language.part import Part, part


@dataclass(frozen=True)
class Scales:
    """For one parameter: init std, and the factors on its chain's learning rate and decay."""

    std: float
    lr: float = 1.0
    decay: float = 1.0


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

    def scales(self, param: Param, model: Any, rule: str) -> Scales:
        """rule: how the parameter's optimizer scales with width: adam, spectral or rms (unused here)."""
        return Scales(self.std(param))

    def std(self, param: Param) -> float:
        if param.role == "embedding":
            return self.embedding
        return self.gain / param.shape[-1] ** 0.5

    def multipliers(self, model: Any) -> Multipliers:
        return Multipliers()
