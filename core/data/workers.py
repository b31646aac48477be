"""Processes that encode blocks: all cores read and encode, and whatever their number, the parts are the same."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from queue import Full, Queue
from signal import SIG_IGN, SIGINT, signal

from ablab.core.data.codec import Codec
from ablab.core.data.parts import Named, Part, Work, encode
from ablab.core.errors import UserError

AHEAD = 2  # blocks that wait for each process
LOOKS = 0.2  # seconds between two looks at whether a reader should stop

Blocks = Iterator[Named]


def cores() -> int:
    """That this process may use."""
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def encoded(
    files: Iterable[Callable[[], Blocks]], work: Work, jobs: int
) -> Iterator[tuple[Part, Named]]:
    """Encode the blocks of all files; parts come as they are done.

    files: each gives the blocks of one file.  Raises UserError for the first flaw that is found.
    """
    if jobs == 1:
        codec = Codec(work.tokenizer, work.end_of_text)
        for file in files:
            for named in file():
                yield encode(named, work, codec), named
        return
    yield from _by_processes(files, work, jobs)


def _by_processes(
    files: Iterable[Callable[[], Blocks]], work: Work, jobs: int
) -> Iterator[tuple[Part, Named]]:
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(work,)
    )
    readers = Readers(files, threads=max(jobs // 4, 1), ahead=jobs)
    waiting: dict[Future[Part], Named] = {}
    try:
        for named in readers.blocks():
            waiting[pool.submit(_encode, named)] = _without_content(named)
            if len(waiting) >= AHEAD * jobs:
                yield from _done(waiting)
        while waiting:
            yield from _done(waiting)
    except BrokenProcessPool:
        raise UserError(
            f"a process that tokenizes was killed, perhaps for memory; use fewer --jobs than {jobs}; "
            "the same command goes on from here"
        ) from None
    finally:
        readers.stop()
        pool.shutdown(cancel_futures=True)


def _without_content(named: Named) -> Named:
    from dataclasses import replace

    return replace(named, block=replace(named.block, content=b""))


def _done(waiting: dict[Future[Part], Named]) -> Iterator[tuple[Part, Named]]:
    """Those that are done; waits for one."""
    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in ended:
        named = waiting.pop(future)
        yield future.result(), named


class Readers:
    """Threads that unpack files and cut them, some files at once: unpacking holds no lock of Python's."""

    def __init__(self, files: Iterable[Callable[[], Blocks]], threads: int, ahead: int):
        self.files = iter(files)
        self.taking = threading.Lock()
        self.found: Queue[Named | Exception | None] = Queue(ahead)
        self.stopped = threading.Event()
        self.threads = [
            threading.Thread(target=self._read, daemon=True) for _ in range(threads)
        ]

    def blocks(self) -> Blocks:
        for thread in self.threads:
            thread.start()
        running = len(self.threads)
        while running:
            match self.found.get():
                case None:
                    running -= 1
                case Exception() as flaw:
                    raise flaw
                case Named() as named:
                    yield named

    def stop(self) -> None:
        self.stopped.set()

    def _read(self) -> None:
        try:
            while file := self._next():
                for named in file():
                    if not self._put(named):
                        return
        except Exception as flaw:
            self._put(flaw)
        self._put(None)

    def _next(self) -> Callable[[], Blocks] | None:
        with self.taking:
            return next(self.files, None)

    def _put(self, found: Named | Exception | None) -> bool:
        """False where nobody waits for it any more."""
        while not self.stopped.is_set():
            try:
                self.found.put(found, timeout=LOOKS)
                return True
            except Full:
                continue
        return False


# -- in a process ------------------------------------------------------------------------------------------------------

_own: "tuple[Work, Codec] | None" = None


def _begin(work: Work) -> None:
    """Ctrl-C is the parent's to answer; a process whose parent was killed ends too."""
    global _own
    signal(SIGINT, SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _own = work, Codec(work.tokenizer, work.end_of_text)


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _encode(named: Named) -> Part:
    assert _own, "set as the process begins"
    return encode(named, *_own)
