"""The numbers that a dose or a setting may be: their ranges are checked where plain data becomes a value."""

from typing import Annotated

from msgspec import Meta

Natural = Annotated[int, Meta(ge=0)]
Whole = Annotated[int, Meta(ge=1)]
Depth = Annotated[
    int, Meta(ge=1, le=1000)
]  # layers: each is planned, 0.25 ms, before anything is built

# Counted in optimizer steps, or in tokens, of the whole run: a shorter run has fewer (core/recipe/scale.py).
SCALES = "scales"
Steps = Annotated[int, Meta(ge=0, extra={SCALES: True})]
SomeSteps = Annotated[int, Meta(ge=1, extra={SCALES: True})]
SomeTokens = Annotated[int, Meta(ge=1, extra={SCALES: True})]

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]

Unit = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(gt=0, le=1)]  # of something that must not be empty
Memory = Annotated[
    float, Meta(ge=0, lt=1)
]  # what a running average keeps at a step: 1 would keep all for ever
