"""Fair pruning: a trial is compared with finished trials of its own cell, on the same schedule, and with nobody else.

Peers of the same generation stay out of sight, and a verdict is a function of the curve alone: neither the number of
workers nor the moment of a kill can change it.  A run hears of its verdict a log or two late; what it trained
meanwhile does not count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial, Trial

Curve = Mapping[int, float]  # optimizer step of an evaluation -> value
STUDY = "arm"  # the name of every study in memory: hyperband hashes it


def pruner_of(name: str, first: int, last: int) -> "BasePruner":
    """first, last: the optimizer steps of the first and the last evaluation."""
    from optuna import pruners

    match name:
        case "median":
            return pruners.MedianPruner(n_startup_trials=4, n_min_trials=2)
        case "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=first)
        case "hyperband":
            return pruners.HyperbandPruner(min_resource=first, max_resource=last)
    raise ValueError(name)


class Past:
    """The finished trials of one cell, lived through again.

    Successive halving remembers the rungs that each trial reached.
    """

    def __init__(
        self,
        pruner: str,
        direction: Literal["minimize", "maximize"],
        steps: int,
        evaluations: int,
    ):
        """steps: of a whole run; evaluations: how many of them a run has, evenly spaced."""
        self.pruner = pruner
        self.direction = direction
        self.steps = steps
        self.first = math.ceil(steps / evaluations)
        self.study = self._fresh()
        self.lived: list[FrozenTrial] = []

    def _fresh(self) -> "Study":
        import optuna

        return optuna.create_study(
            study_name=STUDY,
            direction=self.direction,
            pruner=pruner_of(self.pruner, self.first, self.steps),
            sampler=optuna.samplers.RandomSampler(seed=0),
        )

    def of(self, finished: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
        """The trials with what a pruner noted of them.  Each call may add to the finished trials of the last one."""
        for one in finished[len(self.lived) :]:
            self.lived.append(self._live(one))
        return self.lived[: len(finished)]

    def _live(self, ended: "FrozenTrial") -> "FrozenTrial":
        from optuna.trial import TrialState

        trial = self.study.ask()
        for step, value in sorted(ended.intermediate_values.items()):
            trial.report(value, step)
            trial.should_prune()
        if ended.state == TrialState.COMPLETE:
            return self.study.tell(trial, ended.value)
        return self.study.tell(trial, state=ended.state)

    def referee(self, finished: Sequence["FrozenTrial"], number: int) -> "Referee":
        """For the trial `number`, which knows the finished trials of earlier generations."""
        from optuna.trial import TrialState, create_trial

        study = self._fresh()
        known = self.of(finished)
        # Peers leave nothing but their numbers: hyperband hashes that of the trial.
        unseen = [create_trial(state=TrialState.FAIL)] * (number - len(known))
        study.add_trials(known + unseen)
        return Referee(study.ask(), self.steps)


class Referee:
    """Judges one trial."""

    def __init__(self, trial: "Trial", steps: int):
        self.trial = trial
        self.steps = steps
        self.heard: set[int] = set()
        self.step: int | None = None  # where the trial should have ended

    def verdict(self, curve: Curve) -> int | None:
        """The step at which a trial with this curve should end early, or None."""
        for step, value in sorted(curve.items()):
            if self.step is None and step not in self.heard and step < self.steps:
                self.heard.add(step)
                self.trial.report(value, step)
                self.step = step if self.trial.should_prune() else None
        return self.step
