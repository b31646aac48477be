"""Whose turn it is, among the workers of one call that share a GPU: a lock without a name.

Whoever is killed, and be it all of them at once, leaves no file behind and no turn taken: the file has no name from
the start, and the system ends a lock (a POSIX record lock, `fcntl.lockf`) with the process that holds it.
"""

import fcntl
import os
import tempfile
from multiprocessing.reduction import DupFd
from types import TracebackType
from typing import Protocol


class Passed(Protocol):
    """A file descriptor on its way into a process that is being started."""

    def detach(self) -> int: ...


class Turn:
    """Held while a run trains.  Among the arguments of a process that is started it names the same lock there."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as nameless:
            self.descriptor = os.dup(nameless.fileno())

    def __getstate__(self) -> Passed:
        passed: Passed = DupFd(self.descriptor)
        return passed

    def __setstate__(self, passed: Passed) -> None:
        self.descriptor = passed.detach()

    def __enter__(self) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self.descriptor)
