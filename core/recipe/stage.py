"""Stages: what a run goes on from.

A stage is a run whose recipe holds the identity of its parent.  A run without one begins with the weights of its seed,
at step 0.
"""

from dataclasses import dataclass
from typing import Literal

from ablab.core.language.numbers import Natural

Taken = Literal["optimizer", "average"]
Read = Literal["trained", "evaluated"]


@dataclass(frozen=True)
class Handover:
    """What a run takes over.  The weights always; the rest as said here.

    run: identity of the run that it goes on from; empty where the weights come from a folder.
    weights: digest of the weights, where no planned run vouches for them.
    read: the parent's weights as it trained them, or as it evaluated them (an average).
    takes: the state of every optimizer chain; the running average of `after_step`.
    steps: optimizer steps that were taken before, for what counts on from them: bias correction, warm-up of momentum.
    averaged: likewise, for an average that is taken over.
    windows: of the data that were read before, where the same data go on.
    """

    run: str = ""
    weights: str = ""
    read: Read = "trained"
    takes: tuple[Taken, ...] = ()
    steps: Natural = 0
    averaged: Natural = 0
    windows: Natural = 0


NOTHING = Handover()
