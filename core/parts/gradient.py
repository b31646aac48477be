"""Factors on the whole gradient, after the clip.  Pure tensor arithmetic, no torch import."""

from collections.abc import Mapping
from typing import Any

from ablab.core.language.part import Part
from ablab.core.parts.transforms import Now


class GradientFactor(Part):
    """Base of what may stand in optim.on_gradient.

    recordable: `factor` never waits for the device, as a CUDA graph demands.
    """

    @property
    def recordable(self) -> bool:
        return True

    def state(self, like: Any) -> dict[str, Any]:
        """Name -> 0-D tensor, as before the first step.  like: a 0-D fp32 tensor on the device."""
        return {}

    def factor(
        self, norm: Any, state: Mapping[str, Any], now: Now
    ) -> tuple[Any, dict[str, Any]]:
        """norm: of the mean gradient, before the clip, 0-D -> factor on every gradient, 0-D; new state."""
        raise NotImplementedError
