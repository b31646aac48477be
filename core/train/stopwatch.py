"""How long training itself took: without the first step of a process, which compiles, and without evaluating and saving."""

import time

from torch import Tensor


class Stopwatch:
    """seconds and steps counted so far, over all resumes of a run."""

    def __init__(self, seconds: float = 0.0, steps: int = 0):
        self.seconds, self.steps = seconds, int(steps)
        self.since: float | None = None

    def step(self, outcome: Tensor) -> None:
        """A step was launched.  The first one is waited for and not counted; no later one is waited for."""
        if self.since is None:
            outcome.item()
            self.since = time.perf_counter()
        else:
            self.steps += 1

    def stop(self) -> None:
        """To be called when the device has caught up."""
        self.seconds += time.perf_counter() - self.since

    def go_on(self) -> None:
        self.since = time.perf_counter()

    def rate(self, tokens_per_step: int) -> float:
        """Tokens a second; 0 before the second step."""
        return self.steps * tokens_per_step / self.seconds if self.steps else 0.0
