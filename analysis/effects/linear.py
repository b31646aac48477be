"""Ordinary least squares: one model of all runs, for designs in which arms and seeds do not form a full table."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ablab.analysis.effects.intervals import Estimates

ESTIMABLE = 1e-8  # relative: how far a contrast may lie from what the runs can tell


@dataclass(frozen=True)
class Linear:
    """y = design @ coefficients + noise of one sd.  design: [N, P], y: [N]."""

    design: np.ndarray
    y: np.ndarray
    method: str

    @cached_property
    def _inverse(self) -> np.ndarray:
        """Moore and Penrose's, [P, N]: columns that say the same share what they tell."""
        return np.linalg.pinv(self.design)

    @cached_property
    def coefficients(self) -> np.ndarray:
        return self._inverse @ self.y

    @cached_property
    def degrees(self) -> float:
        """Of freedom that are left for the noise."""
        return float(len(self.y) - np.linalg.matrix_rank(self.design))

    @cached_property
    def error(self) -> float:
        """Mean squared error: the estimate of the noise's variance."""
        residuals = self.y - self.design @ self.coefficients
        return float(residuals @ residuals / self.degrees)

    def tells(self, contrast: np.ndarray) -> bool:
        """Whether the runs determine contrast @ coefficients, and leave something to measure the noise by."""
        told = contrast @ self._inverse @ self.design
        off = np.abs(told - contrast).max()
        return self.degrees >= 1 and bool(off <= ESTIMABLE * np.abs(contrast).max())

    def estimate(self, contrasts: np.ndarray) -> Estimates:
        """Of contrasts @ coefficients.  contrasts: [K, P], each of which `tells` holds for."""
        weights = contrasts @ self._inverse  # of each run, [K, N]
        standard_error = np.sqrt(self.error * (weights**2).sum(-1))
        degrees = np.full(len(contrasts), self.degrees)
        return Estimates(self.method, weights @ self.y, standard_error, degrees)
