"""How long training itself took.

Neither the first step of a process, which compiles, nor evaluating and saving count.
"""

import time

from torch import Tensor


class Stopwatch:
    """Seconds of training and the tokens trained on in them, over all resumes of a run."""

    def __init__(self, seconds: float = 0.0, tokens: float = 0.0):
        self.seconds = seconds
        self.tokens = tokens
        self.since: float | None = None

    def step(self, outcome: Tensor, tokens: int) -> None:
        """A step was launched.  The first one is waited for and not counted; no later one is waited for."""
        if self.since is None:
            outcome.item()
            self.since = time.perf_counter()
        else:
            self.tokens += tokens

    def stop(self) -> None:
        """To be called when the device has caught up, after a step."""
        assert self.since is not None, "a step comes first"
        self.seconds += time.perf_counter() - self.since

    def go_on(self) -> None:
        self.since = time.perf_counter()

    @property
    def rate(self) -> float:
        """Tokens a second; 0 before the second step."""
        return self.tokens / self.seconds if self.tokens else 0.0
