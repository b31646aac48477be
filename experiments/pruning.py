"""Fair pruning: a trial is compared with finished trials of its own arm, on the same schedule, and with nobody else.

Peers of the same generation stay out of sight, so that the verdict does not depend on how many run at once.
"""

from typing import Any

from ablab.core.errors import UserError

PRUNERS = {
    "median": lambda optuna: optuna.pruners.MedianPruner(n_startup_trials=4, n_min_trials=2),
    "asha": lambda optuna: optuna.pruners.SuccessiveHalvingPruner(),
    "hyperband": lambda optuna: optuna.pruners.HyperbandPruner(),
}


class Referee:
    """Decides for one running trial.  before: the arm's finished trials of earlier generations (frozen Optuna trials)."""

    def __init__(self, pruner: str, direction: str, before: list[Any]):
        import optuna

        self.study = optuna.create_study(direction=direction, pruner=PRUNERS[pruner](optuna), sampler=optuna.samplers.RandomSampler(seed=0))
        for finished in before:
            self._replay(finished)
        self.trial = self.study.ask()

    def _replay(self, finished: Any) -> None:
        """Live through a finished trial again: successive halving remembers the rungs that a trial reached."""
        import optuna

        trial = self.study.ask()
        for step, value in sorted(finished.intermediate_values.items()):
            trial.report(value, step)
            trial.should_prune()
        complete = finished.state == optuna.trial.TrialState.COMPLETE
        self.study.tell(trial, finished.value if complete else None, None if complete else finished.state)

    def stops(self, step: int, value: float) -> bool:
        """Whether the trial should end here, having `value` after `step` optimizer steps."""
        self.trial.report(value, step)
        return self.trial.should_prune()


def check(pruner: str, seeds: list[int]) -> None:
    if pruner != "none" and len(seeds) > 1:
        raise UserError(f"study.pruner={pruner} works with one selection seed, not {len(seeds)}: a pruned seed has no mean; drop the pruner or keep one of study.seeds")
