"""How long training itself took, and how much of that time the thread that trains had a core.

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
        # Of this process alone: seconds that were timed, and those in which this thread ran.
        self.timed = 0.0
        self.ran = 0.0
        self.ran_before = 0.0

    def step(self, outcome: Tensor, tokens: int) -> None:
        """A step was launched.  The first one is waited for and not counted; no later one is waited for."""
        if self.since is None:
            outcome.item()
            self.go_on()
        else:
            self.tokens += tokens

    def stop(self) -> None:
        """To be called when the device has caught up, after a step."""
        assert self.since is not None, "a step comes first"
        passed = time.perf_counter() - self.since
        self.seconds += passed
        self.timed += passed
        self.ran += time.thread_time() - self.ran_before

    def go_on(self) -> None:
        self.since = time.perf_counter()
        self.ran_before = time.thread_time()

    @property
    def share(self) -> float:
        """Of a core, that this thread had while it was timed: 1 where nothing else ran there, or nothing was timed."""
        return self.ran / self.timed if self.timed else 1.0

    @property
    def rate(self) -> float:
        """Tokens a second; 0 before the second step."""
        return self.tokens / self.seconds if self.tokens else 0.0
