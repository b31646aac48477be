"""Fair pruning: a trial is compared with finished trials of its own arm, on the same schedule, and with nobody else.

Peers of the same generation stay out of sight, and a verdict is a function of the curve alone: neither the number of
workers nor the moment of a kill can change it.  A run hears of its verdict a log or two late; what it trained
meanwhile does not count.
"""

import math
from collections.abc import Mapping
from typing import Any

from ablab.core.errors import UserError

PRUNERS = {  # first, last: the optimizer steps of the first and the last evaluation
    "median": lambda optuna, first, last: optuna.pruners.MedianPruner(
        n_startup_trials=4, n_min_trials=2
    ),
    "asha": lambda optuna, first, last: optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first
    ),
    "hyperband": lambda optuna, first, last: optuna.pruners.HyperbandPruner(
        min_resource=first, max_resource=last
    ),
}


class Past:
    """The finished trials of one arm, lived through again: successive halving remembers the rungs that each trial reached."""

    def __init__(self, pruner: str, direction: str, steps: int, evaluations: int):
        """steps: of a whole run; evaluations: how many of them a run has, evenly spaced."""
        self.pruner, self.direction, self.steps, self.first = (
            pruner,
            direction,
            steps,
            math.ceil(steps / evaluations),
        )
        self.study, self.lived = self._fresh(), []

    def _fresh(self) -> Any:
        import optuna

        pruner, sampler = (
            PRUNERS[self.pruner](optuna, self.first, self.steps),
            optuna.samplers.RandomSampler(seed=0),
        )
        return optuna.create_study(
            study_name="arm", direction=self.direction, pruner=pruner, sampler=sampler
        )  # hyperband hashes the name

    def of(self, finished: list[Any]) -> list[Any]:
        """The trials with what a pruner noted of them.  finished: frozen Optuna trials; each call may add to the last one's."""
        import optuna

        for one in finished[len(self.lived) :]:
            trial, complete = self.study.ask(), one.state == optuna.trial.TrialState.COMPLETE
            for step, value in sorted(one.intermediate_values.items()):
                trial.report(value, step)
                trial.should_prune()
            self.lived.append(
                self.study.tell(
                    trial, one.value if complete else None, None if complete else one.state
                )
            )
        return self.lived[: len(finished)]

    def referee(self, finished: list[Any], number: int) -> "Referee":
        """For the trial `number`, which knows the finished trials of earlier generations."""
        import optuna

        study, known = self._fresh(), self.of(finished)
        peers = [optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL)] * (
            number - len(known)
        )  # hyperband hashes the number
        study.add_trials(known + peers)
        return Referee(study.ask(), self.steps)


class Referee:
    """Judges one trial."""

    def __init__(self, trial: Any, steps: int):
        self.trial, self.steps = trial, steps
        self.heard: set[int] = set()
        self.step: int | None = None  # where the trial should have ended

    def verdict(self, curve: Mapping[int, float]) -> int | None:
        """The step at which a trial with this curve (step -> value) should end early, or None."""
        for step, value in sorted(curve.items()):
            if self.step is None and step not in self.heard and step < self.steps:
                self.heard.add(step)
                self.trial.report(value, step)
                self.step = step if self.trial.should_prune() else None
        return self.step


def check(pruner: str, seeds: list[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"study.seeds={seeds} must name at least one seed, and each once")
    if pruner != "none" and len(seeds) > 1:
        cure = "a pruned seed has no mean; drop the pruner or keep one of study.seeds"
        raise UserError(
            f"study.pruner={pruner} works with one selection seed, not {len(seeds)}: {cure}"
        )
