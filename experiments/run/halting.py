"""How a command that trains is stopped in time: by a signal, or by its deadline.

The first of SIGNALS, and the end of `--deadline`, let every run finish its step and save; the command ends with exit
code 75 within 30 s, and the same command goes on from there.  The second signal ends it at once.

    SIGINT   Ctrl-C
    SIGTERM  a scheduler, `docker stop`, Kubernetes; a spot instance whose notice the system passes on as a shutdown
    SIGHUP   the terminal is gone
    SIGUSR1  SLURM's `--signal=USR1@60`, or `B:USR1@60` with an `exec ablab run ...` as the last line of the script
    SIGUSR2  submitit's warning

A spot notice that a machine only publishes (EC2's metadata service) is passed on by its hook:  kill -TERM PID.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = 75  # EX_TEMPFAIL: ask again
GRACE = 24.0  # seconds that runs have to save
LAST = 28.0  # seconds after which the command ends whatever still keeps it
MOST_KEPT = 30.0  # seconds before the deadline at which saving begins, or a tenth of it


class Interrupted(KeyboardInterrupt):
    """The command was stopped in time: what it trained is saved."""


class Halts(Protocol):
    """Who is told to stop in time: an executor."""

    def halt(self) -> None: ...


class Halting:
    """Hears signals and the deadline of one command.  deadline: seconds from now."""

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self.ends = None if deadline is None else time.monotonic() + deadline
        self.why = ""  # what stopped it; "" while nothing has
        self.told: Halts | None = None

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler.  Raises where nobody trains, and at the second signal."""
        came = signal.Signals(number)
        late = came == signal.SIGALRM
        if self.why and not late:
            raise KeyboardInterrupt
        if self.why or self.told is None:
            self.why = self.why or self._named(came)
            raise Interrupted
        self.why = self._named(came)
        again = "" if late else "; again to end at once"
        # Not `print`: the signal may have come in the midst of one.
        os.write(2, f"{self.why}: saving what runs, then ending{again}\n".encode())
        self.told.halt()
        signal.setitimer(signal.ITIMER_REAL, LAST)

    def _named(self, came: signal.Signals) -> str:
        return "--deadline" if came == signal.SIGALRM else came.name

    @property
    def left(self) -> float | None:
        """Seconds until saving begins; None without a deadline."""
        return None if self.ends is None else self.ends - self._kept - time.monotonic()

    @property
    def _kept(self) -> float:
        return min(MOST_KEPT, (self.deadline or 0.0) / 10)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the handlers are ours; those that were ignored (`nohup`) stay so."""
        before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self.hear)
        if self.left is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)


# A process has one set of signal handlers, and so one of these.
_current: Halting | None = None


def time_left() -> float | None:
    """Seconds in which a run may train; None where no deadline is set."""
    return _current.left if _current else None


def is_halted() -> bool:
    return bool(_current and _current.why)


@contextmanager
def halted_by_it(executor: Halts) -> Iterator[None]:
    """Inside, the executor is told to halt; outside there is nothing to save, and a signal ends the command."""
    if _current is None:
        yield
        return
    _current.told = executor
    try:
        yield
    finally:
        _current.told = None


@contextmanager
def stopped_in_time(deadline: float | None = None) -> Iterator[Halting]:
    """Inside, signals and the deadline (seconds) are heard.  Raises Interrupted where they ended it."""
    global _current
    _current = Halting(deadline)
    try:
        with _current.listening():
            yield _current
    finally:
        _current = None
