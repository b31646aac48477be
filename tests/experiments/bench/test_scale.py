"""`ablab bench scale`: what is told of ranks, and steps without their messages."""

import torch

from ablab.experiments.bench.scale import Silenced, _of_ranks
from tests.core.train.worlds import Threads


def test_every_rank_knows_what_each_has_found():
    found = Threads(3).run(lambda world: _of_ranks(world.rank + 0.5, world, "cpu"))
    assert found == [[0.5, 1.5, 2.5]] * 3


def sent(world, silent):
    """The kinds of messages that go when each is asked for, and whether a tensor has changed."""
    silenced = Silenced(world)
    silenced.silent = silent
    whole = torch.full((2,), world.rank + 1.0)
    before = whole.clone()
    own = whole.chunk(2)[world.rank]
    messages = (
        silenced.all_reduce(whole),
        silenced.reduce(whole, 1),
        silenced.broadcast(whole, 1),
        silenced.reduce_scatter(whole, own),
        silenced.all_gather(whole, own),
    )
    for message in messages:
        message.wait()
    return len(world.sent), bool((whole != before).any())


def test_without_messages_no_tensor_moves_and_with_them_all_are_sent():
    assert Threads(2).run(lambda world: sent(world, silent=True)) == [(0, False)] * 2
    assert Threads(2).run(lambda world: sent(world, silent=False)) == [(5, True)] * 2
