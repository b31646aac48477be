"""Worker processes: started, handed jobs, listened to, replaced when they die.

What a worker says:     ready                          it may be given a job
    of its job          began, log, warning            and it goes on
                        busy                           another process holds the run: it is asked for again a second later
                        traced, done, found, refused   the answer; `found`: another process trained it
"""

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from ablab.core.errors import UserError
from ablab.core.store.record import FAILED, Record, Result
from ablab.experiments.run.worker import Job, serve

Task = TypeVar("Task")
Heard = Callable[[str, Job, Any], Iterable[Task]]  # a message -> tasks that may begin now
PATIENCE = 1.0  # seconds before a run that another process holds is asked for again


class Workers:
    """Up to `count` processes, started as work comes.

    gpus: one of these each, in rotation; empty: all see what we see.  turns: likewise, files to lock while training;
    empty: all train at once.
    """

    def __init__(
        self,
        count: int,
        plugins: Iterable[str] = (),
        gpus: Iterable[str] = (),
        turns: Iterable[Path] = (),
    ):
        self.count, self.plugins, self.gpus, self.turns = (
            count,
            list(plugins),
            list(gpus),
            list(turns),
        )
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[Any, Any] = {}  # pipe -> process
        self.idle: list[Any] = []  # pipes of workers that are ready and hold nothing
        self.holds: dict[Any, Job] = {}  # pipe -> the job in hand

    def work(
        self,
        tasks: Iterable[Task],
        job_of: Callable[[Task], Job],
        heard: Heard,
        kind_of: Callable[[Task], str] = lambda task: "",
    ) -> None:
        """Hand out jobs until each is answered, and those that `heard` adds.  A job is made when it is given: ten thousand would fill the memory.

        kind_of: tasks of one kind go to one worker, which is warm for it, while others find another kind.
        Raises UserError where a worker cannot start.
        """
        tasks, later = (
            deque((kind_of(task), task) for task in tasks),
            deque(),
        )  # later: (when, kind, job)
        count = len(self.processes)
        while tasks or later or self.holds:
            count = max(count, min(self.count, len(tasks)))
            for slot in set(range(count)) - {
                process.slot for process in self.processes.values()
            }:
                self._start(slot)
            while self.idle and (tasks or (later and later[0][0] < time.monotonic())):
                pipe = self.idle.pop()
                if tasks:
                    self._give(pipe, job_of(self._suited(tasks, pipe)))
                else:
                    _, self.processes[pipe].kind, job = later.popleft()
                    self._give(pipe, job)
            for pipe in wait(list(self.processes), timeout=PATIENCE / 2):
                word, job, payload = self._hear(pipe)
                if word == "busy":
                    later.append((time.monotonic() + PATIENCE, self.processes[pipe].kind, job))
                if job:
                    tasks.extend((kind_of(task), task) for task in heard(word, job, payload))

    def stop(self, run: str) -> None:
        """End a run early, at its next log: it answers with a pruned result."""
        for pipe in (pipe for pipe, job in self.holds.items() if job.run == run):
            with suppress(BrokenPipeError, ConnectionResetError):
                pipe.send(run)

    def close(self) -> None:
        """An idle worker sees its pipe close and tidies up behind itself; one at work is ended."""
        for pipe, process in self.processes.items():
            pipe.close()
            if not any(pipe is one for one in self.idle):
                process.terminate()
        until = time.monotonic() + 3
        for process in self.processes.values():
            process.join(timeout=max(until - time.monotonic(), 0.01))
            process.kill()
        self.processes, self.idle, self.holds = {}, [], {}

    def _start(self, slot: int) -> None:
        ours, theirs = self.context.Pipe()
        environment = (
            {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        )
        turn = self.turns[slot % len(self.turns)] if self.turns else None
        process = self.context.Process(
            target=serve, args=(theirs, self.plugins, environment, turn), daemon=True
        )
        with _no_interrupt():
            process.start()
        theirs.close()
        process.slot, process.was_ready, process.kind = slot, False, ""
        self.processes[ours] = process

    def _suited(self, tasks: deque, pipe: Any) -> Any:
        """Take out the first task of the kind that the worker had last; else of a kind that none has; else the first."""
        taken = {process.kind for process in self.processes.values()}
        wanted = (
            (lambda kind: kind == self.processes[pipe].kind),
            (lambda kind: kind not in taken),
            (lambda kind: True),
        )
        place = next(i for suits in wanted for i, (kind, _) in enumerate(tasks) if suits(kind))
        self.processes[pipe].kind, task = tasks[place]
        del tasks[place]
        return task

    def _give(self, pipe: Any, job: Job) -> None:
        self.holds[pipe] = job
        with suppress(
            BrokenPipeError, ConnectionResetError
        ):  # it died idle: `_hear` will find out
            pipe.send(job)

    def _hear(self, pipe: Any) -> tuple[str, Job | None, Any]:
        try:
            word, payload = pipe.recv()
        except (EOFError, ConnectionResetError):
            return self._bury(pipe)
        if word in ("began", "log", "warning"):
            return word, self.holds[pipe], payload
        self.processes[pipe].was_ready = True
        if not (
            word == "done" and payload.status == FAILED
        ):  # a crash may poison its process, as CUDA errors do: it ends itself
            self.idle.append(pipe)
        return word, self.holds.pop(pipe, None), payload

    def _bury(self, pipe: Any) -> tuple[str, Job | None, Any]:
        """A worker died: what it trained is a failure; `work` starts another in its place."""
        process, job = self.processes.pop(pipe), self.holds.pop(pipe, None)
        self.idle = [one for one in self.idle if one is not pipe]
        pipe.close()
        process.join(timeout=10)
        if not process.was_ready:
            raise UserError(
                f"a worker ended with exit code {process.exitcode} before it was ready; what it said stands above"
            )
        cause = f"the worker died with exit code {process.exitcode} (-9: killed, often for lack of host memory); run again to resume from its last checkpoint"
        if job and job.kind == "trace":
            raise UserError(f"run {job.run}, liveness check: {cause}")
        return "done", job, job and _lost(job, cause)


def _lost(job: Job, cause: str) -> Result:
    record = Record(job.folder)
    result = record.result() if record.stamp() >= job.asked else None
    if result is None:
        record.finish(result := Result(job.run, FAILED, 0, 0, error=cause))
    return result


@contextmanager
def _no_interrupt():
    """A process started in here never gets Ctrl-C, not even while it imports; ours comes at the end."""
    resource_tracker.ensure_running()  # would otherwise be started along, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
