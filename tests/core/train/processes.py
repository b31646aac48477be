"""Ranks that are processes, forked from the test, joined by gloo: for what takes torch's own process groups."""

import multiprocessing
import os
import socket
import traceback
from contextlib import closing

import torch._dynamo  # noqa: F401  (what FSDP2 imports: 0.7 s of each rank, if it is not here)

from ablab.core.runtime.world import join, leave

SECONDS = 300  # that a rank may take, on a busy machine


def on_ranks(size, call, *given):
    """What `call(world, *given)` returned on each of so many ranks, in their order."""
    port = _free_port()
    context = multiprocessing.get_context("fork")
    pipes, ranks = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        asked = (theirs, rank, size, port, call, given)
        ranks.append(context.Process(target=_rank, args=asked, daemon=True))
        pipes.append(ours)
        ranks[-1].start()
        theirs.close()
    try:
        answers = [_heard(pipe) for pipe in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    faults = [fault for fault, _ in answers if fault]
    assert not faults, "\n".join(faults)
    return [found for _, found in answers]


def _free_port():
    with closing(socket.socket()) as asked:
        asked.bind(("localhost", 0))
        return asked.getsockname()[1]


def _heard(pipe):
    try:
        return pipe.recv() if pipe.poll(SECONDS) else ("a rank has not answered", None)
    except EOFError:
        return "a rank has died", None


def _rank(pipe, rank, size, port, call, given):
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        pipe.send(("", call(join("cpu", rank), *given)))
        leave()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
