"""Questions to answers: in this process, or shared out to a process a device.

Questions of like length are answered together, the longest first: a batch has little padding, and what does not fit
into memory fails at once.  Which process answers a question changes nothing about the answer.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from signal import SIG_IGN, SIGINT, signal
from typing import TYPE_CHECKING, Protocol

from ablab.core.errors import UserError
from ablab.experiments.evaluate.questions import Answer, Question, answers
from ablab.experiments.evaluate.subjects import Device, How, Subject

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from ablab.core.interop.score import Scorer

CHUNK = 4  # batches of rows between two looks at the disk, about

Chunk = list[Question]


class Answerer(Protocol):
    def answer(self, questions: Iterable[Question]) -> Iterator[list[Answer]]:
        """As they are known, some at a time, in no order."""
        ...


def chunks(questions: Iterable[Question], rows: int) -> Iterator[Chunk]:
    """About so many rows each, of like length, the longest first."""
    order = sorted(questions, key=lambda question: -question.length)
    chunk: Chunk = []
    held = 0
    for question in order:
        chunk.append(question)
        held += len(question.texts)
        if held >= rows:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Here:
    """A model in this process."""

    scorer: "Scorer"
    rows: int = 16 * CHUNK

    def answer(self, questions: Iterable[Question]) -> Iterator[list[Answer]]:
        for chunk in chunks(questions, self.rows):
            yield answers(chunk, self.scorer)


class Everywhere:
    """A process a device, each with the model.  Use it as a context."""

    def __init__(self, subject: Subject, how: How, devices: Sequence[Device]):
        self.rows = how.batch * CHUNK
        spawn = multiprocessing.get_context("spawn")
        free: Queue[Device] = spawn.Queue()
        for device in devices:
            free.put(device)
        self.pool = ProcessPoolExecutor(
            len(devices), mp_context=spawn, initializer=_begin, initargs=(subject, how, free)
        )

    def __enter__(self) -> "Everywhere":
        return self

    def __exit__(self, *fault: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def answer(self, questions: Iterable[Question]) -> Iterator[list[Answer]]:
        """Raises UserError where a process was killed, or the model cannot be built."""
        waiting: list[Future[list[Answer]]] = [
            self.pool.submit(_answer, chunk) for chunk in chunks(questions, self.rows)
        ]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that evaluates was killed, perhaps for memory; use a smaller --batch; "
                "the same command goes on from here"
            ) from None


def devices_of(how: How) -> list[Device]:
    """All visible GPUs, else one CPU.  Raises UserError for a GPU that is not there."""
    import torch

    from ablab.core.interop.speaking import device_of

    device = device_of(how.device)
    if device != "cuda":
        return [device]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


# -- in a process ------------------------------------------------------------------------------------------------------
_own: "Scorer | UserError | None" = None


def _begin(subject: Subject, how: How, free: "Queue[Device]") -> None:
    """Ctrl-C is the parent's to answer; a process whose parent was killed ends too."""
    global _own
    signal(SIGINT, SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _own = subject.scorer(how, free.get())
    except UserError as refusal:  # raised here, it would only break the pool
        _own = refusal


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _answer(chunk: Chunk) -> list[Answer]:
    if isinstance(_own, UserError):
        raise _own
    assert _own, "set as the process begins"
    return answers(chunk, _own)
