"""Ranks that are threads of one process: a World without processes, for what needs none."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class Done:
    def wait(self):
        return None


class Threads:
    """The same call in as many threads, each of which is a rank; what each returned, in the order of ranks."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=120)
        self.said = [None] * size

    def run(self, call):
        with ThreadPoolExecutor(self.size) as pool:
            ranks = [pool.submit(self._rank, call, rank) for rank in range(self.size)]
            faults = [rank.exception() for rank in ranks]
        causes = [one for one in faults if not isinstance(one, threading.BrokenBarrierError)]
        for cause in filter(None, causes + faults):
            raise cause
        return [rank.result() for rank in ranks]

    def _rank(self, call, rank):
        try:
            return call(ThreadWorld(self, rank))
        except BaseException:
            self.barrier.abort()  # else the others would wait for us
            raise


class ThreadWorld:
    """A World (core/runtime/world.py).  sent: the kinds of its messages, in order."""

    recordable = False

    def __init__(self, threads, rank):
        self.threads = threads
        self.rank = rank
        self.size = threads.size
        self.sent = []

    def _exchanged(self, kind, value):
        """What every rank gives, in the order of ranks."""
        self.sent.append(kind)
        self.threads.said[self.rank] = kind, value
        self.threads.barrier.wait()
        said = list(self.threads.said)
        self.threads.barrier.wait()
        assert {other for other, _ in said} == {kind}, "ranks wait for different messages"
        return [given for _, given in said]

    def all_reduce(self, tensor):
        tensor.copy_(sum(self._exchanged("all_reduce", tensor.clone())))
        return Done()

    def reduce(self, tensor, owner):
        total = sum(self._exchanged(("reduce", owner, tensor.shape), tensor.clone()))
        tensor.copy_(total if self.rank == owner else torch.full_like(tensor, 1e9))
        return Done()

    def broadcast(self, tensor, owner):
        tensor.copy_(self._exchanged(("broadcast", owner), tensor.clone())[owner])
        return Done()

    def all_gather(self, whole, own):
        whole.copy_(torch.cat(self._exchanged("all_gather", own.clone())))
        return Done()

    def reduce_scatter(self, whole, own):
        said = self._exchanged(("reduce_scatter", whole.shape), whole.clone())
        whole.fill_(1e9)
        own.copy_(sum(said).chunk(self.size)[self.rank])
        return Done()

    def told(self, word):
        return self._exchanged("told", word)[0]

    def agreed(self, wish):
        return self.told(wish)
