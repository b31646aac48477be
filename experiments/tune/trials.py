"""A trial's way: proposed as a candidate, ended with its runs, stored as Optuna's trial, read back for the reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ablab.ablations.design import Cell
from ablab.core.errors import UserError
from ablab.core.store.record import SEAL, digest_of
from ablab.core.store.result import FAILED, FINISHED, PRUNED, Result, mean_of
from ablab.core.store.study_record import COMPLETE, Trial
from ablab.experiments.plan.experiment import PlannedRun
from ablab.experiments.tune.space import Axis, Point
from ablab.experiments.tune.storage import CURE, STATE, TOLD

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

UNSEALED = (SEAL, "seconds")
STATES = {FINISHED: COMPLETE}  # of a run -> of a trial; any other status keeps its name


@dataclass(frozen=True)
class Candidate:
    """A proposed point of a cell; `number` counts from 0 within the cell."""

    cell: Cell
    number: int
    params: Point
    runs: list[PlannedRun]  # one for each selection seed


@dataclass(frozen=True)
class Ending:
    """What became of a candidate."""

    status: (
        str  # of its first run that did not finish; "pruned" where its pruner had seen enough
    )
    value: float | None  # the mean over the seeds; None unless all of them finished
    values: dict[str, float | None]  # seed -> the final metric
    seconds: float  # of training, all runs together
    why: str  # it did not finish; "" where it did
    curve: Mapping[
        int, float
    ]  # step -> value, as far as it counts; empty where no pruner will ask


def ending_of(
    candidate: Candidate,
    results: Sequence[Result],
    metric: str,
    stopped: int | None,
    curve: Mapping[int, float],
) -> Ending:
    """results: of the candidate's runs, in their order.  stopped: the step after which it was pruned, or None."""
    unfinished = (result for result in results if result.status != FINISHED)
    worst = next(unfinished, results[0])
    status, why = worst.status, worst.error
    if stopped is not None:
        status, why = PRUNED, f"pruned at step {stopped}"
        curve = {step: value for step, value in curve.items() if step <= stopped}
    mean = None
    if status == FINISHED:
        mean = mean_of(results, metric)
        if mean is None:
            status, why = FAILED, f"finished without {metric}"
    values = {}
    for run, result in zip(candidate.runs, results, strict=True):
        values[str(run.recipe.seed)] = result.final(metric)
    return Ending(
        status=status,
        value=mean,
        values=values,
        seconds=sum(result.seconds for result in results),
        why=why,
        curve=curve,
    )


def frozen(candidate: Candidate, ending: Ending, axes: Sequence[Axis]) -> "FrozenTrial":
    """The ended candidate as Optuna stores it.

    Each value and attribute is a row of a database: 3 ms to store, 10,000 trials to load.
    """
    from optuna.trial import TrialState, create_trial

    states = {FINISHED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}
    told: dict[str, Any] = {
        "runs": [run.id for run in candidate.runs],
        "values": ending.values,
        "seconds": ending.seconds,
    }
    if ending.why:
        told["error"] = ending.why
    trial = create_trial(
        state=states.get(ending.status, TrialState.FAIL),
        value=ending.value,
        params=candidate.params,
        distributions=_spaces(axes, candidate.params),
        intermediate_values=dict(ending.curve),
        user_attrs={STATE: STATES.get(ending.status, ending.status), TOLD: told},
    )
    told[SEAL] = _seal(candidate.number, trial)
    return trial


def _seal(number: int, trial: "FrozenTrial") -> str:
    """Digest of what the trial says and where it stands; what the clock says is in no verdict."""
    told = {key: value for key, value in trial.user_attrs[TOLD].items() if key not in UNSEALED}
    said = {
        "number": number,
        "state": trial.user_attrs[STATE],
        "value": trial.value,
        "params": trial.params,
        "curve": {str(step): value for step, value in trial.intermediate_values.items()},
        TOLD: told,
    }
    return digest_of(msgspec.json.encode(said, order="deterministic"))


def _spaces(axes: Sequence[Axis], point: Point) -> dict[str, "BaseDistribution"]:
    """The distributions that Optuna wants to see; that of a widened path reaches as far as its value."""
    from optuna.distributions import FloatDistribution

    spaces = {axis.path: axis.distribution() for axis in axes}
    for path, space in spaces.items():
        if isinstance(space, FloatDistribution):
            low = min(space.low, point[path])
            high = max(space.high, point[path])
            spaces[path] = FloatDistribution(low, high, log=space.log)
    return spaces


def recorded(cell: str, trial: "FrozenTrial") -> Trial:
    """The stored trial as the reports want it.

    Raises UserError where it does not say what was stored; one without a seal, of before there were any, is believed.
    """
    told = trial.user_attrs[TOLD]
    if told.get(SEAL) not in (None, _seal(trial.number, trial)):
        raise UserError(
            f"trial {trial.number} of {cell!r} is not what ablab wrote into the Optuna storage: it was changed there, "
            f"or one before it is lost; {CURE}"
        )
    return Trial(
        cell,
        trial.number,
        params=dict(trial.params),
        state=trial.user_attrs[STATE],
        value=trial.value,
        values=told["values"],
        runs=told["runs"],
        seconds=told["seconds"],
    )
