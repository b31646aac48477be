"""What each slot asks of its parts, as Protocols: the recipe's types, and what the table of slots checks.

Tensors are untyped here, because a recipe is read without torch; shapes stand in words, and letters are those of
core/model/transformer.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ablab.core.language.declare import Linear, Param, Stage, Where
from ablab.core.language.part import Asked
from ablab.core.parts.parametrize import Multipliers, Scales, Sizes
from ablab.core.parts.shape import Phase

Product = Callable[
    [Any, Any], Any
]  # (x [..., fan_in], weight [fan_out, fan_in]) -> [..., fan_out]


@runtime_checkable
class Builds(Asked, Protocol):
    """A choice that computes: its stage stands at the place in every model."""

    def build(self, where: Where) -> Stage:
        """The stage; what depends on the layer or on sizes is settled here."""
        ...


@runtime_checkable
class MayBuild(Asked, Protocol):
    """One of any number of stages, called in their order."""

    def build(self, where: Where) -> Stage | None:
        """The stage; None: nothing at this place, say in this layer."""
        ...


@runtime_checkable
class CountsReadouts(Protocol):
    """An objective that calls `read`, and says so to core/model/cost.py."""

    def readouts(self) -> int:
        """How often it multiplies the features of a row by the readout's matrix."""
        ...


@runtime_checkable
class CountsKeys(Protocol):
    """A mix whose queries see fewer keys than all up to their own position, and which says so to core/model/cost.py."""

    def keys_seen(self, where: Where) -> float:
        """By a query, on average over a row of the context; half of its own key, as of causal attention's T/2."""
        ...


@runtime_checkable
class Multiplies(Asked, Protocol):
    """How linear maps multiply."""

    def product(self, path: str, linear: Linear) -> Product | None:
        """path: dotted name of the map in the plan.  None: this one is left to others, or to the plain product."""
        ...


@runtime_checkable
class Parametrizes(Asked, Protocol):
    """How init, learning rate, decay and forward factors depend on a parameter and on the model's sizes."""

    def scales(self, name: str, param: Param, model: Sizes, rule: str) -> Scales:
        """name: dotted, as in the plan; rule: how its optimizer scales with width (adam, spectral, rms), or ''."""
        ...

    def multipliers(self, model: Sizes) -> Multipliers: ...


@runtime_checkable
class Schedules(Asked, Protocol):
    """How the learning rate moves."""

    def multiplier(self, t: int, steps: int) -> float:
        """The factor on the learning rate at optimizer step t, from 1 to `steps`."""
        ...


@runtime_checkable
class Moves(Asked, Protocol):
    """A step of an optimizer chain; core/parts/transforms.py has its base, and says what a bank and `now` hold."""

    def update(
        self, update: Any, weight: Any, state: Mapping[str, Any], bank: Any, now: Any
    ) -> tuple[Any, dict[str, Any]]:
        """update and weight [N, *shape], fp32 -> the next update, new state."""
        ...

    def state(self, weight: Any, bank: Any) -> dict[str, Any]:
        """Name -> tensor, as before the first step."""
        ...

    def refresh(self, state: dict[str, Any], bank: Any, t: int) -> None:
        """Change the state in place, on the host, after steps 1, 1 + refresh_every, 1 + 2 refresh_every, ..."""
        ...

    @property
    def refresh_every(self) -> int:
        """Optimizer steps; 0: never."""
        ...

    @property
    def width_rule(self) -> str | None: ...

    @property
    def recordable(self) -> bool: ...


@runtime_checkable
class ScalesGradients(Asked, Protocol):
    """A factor on every gradient; core/parts/gradient.py has its base."""

    def factor(
        self, norm: Any, state: Mapping[str, Any], now: Any
    ) -> tuple[Any, dict[str, Any]]:
        """norm: of the mean gradient, before the clip, 0-D -> the factor, 0-D; new state."""
        ...

    def state(self, like: Any) -> dict[str, Any]:
        """Name -> 0-D tensor, as before the first step."""
        ...

    @property
    def recordable(self) -> bool: ...


@runtime_checkable
class ShapesBatches(Asked, Protocol):
    """How many rows of how many tokens a step takes, as training goes on."""

    def phases(self, batch: int, context: int) -> Sequence[Phase]:
        """In their order, the last one until 1.0; batch, context: rows and tokens of a full step."""
        ...


@runtime_checkable
class Advances(Asked, Protocol):
    """What happens to the weights between steps, and which weights are evaluated."""

    def advance(
        self, state: dict[str, Any], weights: Sequence[Any], t: int, steps: int
    ) -> None:
        """Change the state in place, after optimizer step t, from 1 to `steps`."""
        ...

    def begin(self, weights: Sequence[Any]) -> dict[str, Any]:
        """Name -> tensor, as before the first step."""
        ...

    def readout(self, state: dict[str, Any], weights: Sequence[Any]) -> Sequence[Any]:
        """The weights to evaluate with, one for each given."""
        ...
