"""What the runner and those who execute its jobs say to each other.  Plain frozen data: it crosses a pipe.

the runner says        TrainJob, TraceJob, EvalJob    a job, to whoever is Ready
                       Stop                           end a run early
                       Halt                           save the run in hand, and let go of it
a worker says          Ready                          it may be given a job
    of a TrainJob      Began, Logged, Warned          and it goes on
                       Done, Found, Busy, Halted,     the answer
                       Refused
    of a TraceJob      Traced, Untraced, Refused      the answer
    of an EvalJob      Asked                          and it goes on
                       Evaluated, Unevaluated, Busy,  the answer
                       Halted, Refused
is said of a job       Lost                           its worker's machine is gone
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablab.core.store.result import Result
from ablab.experiments.evaluate.asking import Request
from ablab.experiments.evaluate.subjects import How, Subject
from ablab.experiments.plan.judging import Judging


# -- what the runner says ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainJob:
    """Train a run to its end and leave its result."""

    run: str
    recipe: dict[str, Any]
    runtime: dict[str, Any]
    folder: Path  # the run folder
    data: Path  # the token folder
    # The stamp of the result that it had when it was asked for: a failure that stood there does not count, so each
    # call tries a failed run once.  No clock is asked: a file may be dated in the future.
    before: int = 0
    # Of the weights to begin with, where no run of the store vouches for them.
    start: Path | None = None
    # What it is asked at its end; None: nothing.
    judging: Judging | None = None
    about: dict[str, Any] = field(default_factory=dict)  # what run.json says besides
    shared: str = ""  # why its pace is that of a shared device, in words


@dataclass(frozen=True)
class TraceJob:
    """Take the liveness trace of a recipe (ablations/checks/liveness.py)."""

    run: str
    recipe: dict[str, Any]
    runtime: dict[str, Any]


@dataclass(frozen=True)
class EvalJob:
    """Ask a model, and leave its evaluation."""

    run: str  # who is asked what: it names the job
    subject: Subject
    request: Request
    how: How
    bundle: str  # digest of what is to be asked


@dataclass(frozen=True)
class Stop:
    """End a run at its next log.  Of a run that has ended it changes nothing."""

    run: str


@dataclass(frozen=True)
class Halt:
    """Save the run in hand at its next step, and let go of it.  Of one that holds none it changes nothing."""


Job = TrainJob | TraceJob | EvalJob
Saving = TrainJob | EvalJob  # jobs that are saved when they are told to halt
Order = Job | Stop | Halt


# -- what a worker says ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ready:
    """It has started, and may be given a job."""


@dataclass(frozen=True)
class Began:
    """It holds the run, and trains it."""


@dataclass(frozen=True)
class Dying:
    """The last word of a worker whose ranks have died, and of what."""

    why: str


@dataclass(frozen=True)
class Logged:
    step: int
    scalars: dict[str, float]
    seconds: float  # of training so far


@dataclass(frozen=True)
class Warned:
    line: str


@dataclass(frozen=True)
class Done:
    """It trained the run, however that ended."""

    result: Result


@dataclass(frozen=True)
class Found:
    """The run has a result already: another process trained it."""

    result: Result


@dataclass(frozen=True)
class Busy:
    """Another process holds the run: it is asked for again, later."""


@dataclass(frozen=True)
class Halted:
    """The run is saved at this step and has no result: the next call goes on from there.

    Of an evaluation: at this answer.
    """

    step: int


@dataclass(frozen=True)
class Lost:
    """The machine of its worker is gone: it is given out again, and resumes from its last checkpoint."""

    why: str


@dataclass(frozen=True)
class Traced:
    digest: str


@dataclass(frozen=True)
class Untraced:
    """Taking the trace failed: nobody knows whether the recipe is alive."""

    why: str


@dataclass(frozen=True)
class Asked:
    """Answers known so far, of all."""

    known: int
    total: int


@dataclass(frozen=True)
class Evaluated:
    """The evaluation is written."""


@dataclass(frozen=True)
class Unevaluated:
    """Asking failed; the answers so far stand."""

    why: str


@dataclass(frozen=True)
class Refused:
    """This process cannot compute what was asked for."""

    why: str


OnTheWay = Began | Logged | Warned | Asked
OfEvaluations = Asked | Evaluated | Unevaluated
Answer = (
    Done | Found | Busy | Lost | Halted | Traced | Untraced | Evaluated | Unevaluated | Refused
)
Message = OnTheWay | Answer
