"""A run on several ranks: which rows, gradients and banks each has, and that all of it is one run.

Here ranks are threads (worlds.py); tests/experiments/run/test_ranks.py has processes.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.model.init import initialise
from ablab.core.parts.transforms import Lion
from ablab.core.recipe.recipe import Chain
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.train.banks import Optimizer
from ablab.core.train.dealing import ByRows, dealt, shares_of
from ablab.core.train.sharded import ShardedOptimizer, ShardedTrainer
from ablab.core.train.trainer import Trainer
from tests.core.train.processes import on_ranks
from tests.core.train.worlds import Threads

code_fingerprint()  # kept: Python 3.11 cannot parse in two threads at a time
CHAINS = [[], ["mup", "muon", "normuon", "cautious_wd"]]
# Its bases of a few tokens' gradients turn with the rounding of a sum, so its losses part by 1e-3.
TURNING = [["soap"]]


def named(treatment):
    return "+".join(treatment) or "adam"


of_chains = pytest.mark.parametrize("treatment", CHAINS, ids=named)


def on(ranks, **more):
    return Runtime(device="cpu", ranks=ranks, log_every=4, **more)


def sharded(recipe, folder, world, **more):
    """Every bank is cut, small as it is."""
    return ShardedTrainer(recipe, on(world.size, **more), folder, world, whole=0)


def trained(trainer, steps=6):
    """Loss after loss."""
    losses = []
    for _ in range(steps):
        trainer.advance()
        losses.append(trainer.close_window())
    return losses


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


# -- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_the_rows_that_one_sees_in_its_order(tiny, token_folder, ranks, micro_batch):
    recipe = tiny()
    own = min(ranks, micro_batch)

    def rows_of(trainer):
        return list(trainer._micro_batches(3, 4))

    one = rows_of(Trainer(recipe, on(1, micro_batch=micro_batch), token_folder))
    seen = Threads(own).run(
        lambda world: rows_of(sharded(recipe, token_folder, world, micro_batch=micro_batch))
    )
    for block, *parts in zip(one, *seen, strict=True):
        assert torch.equal(block, torch.cat(parts))


# -- the same run ----------------------------------------------------------------------------------------------------
@of_chains
def test_two_and_four_ranks_follow_the_losses_of_one(tiny, token_folder, treatment):
    recipe = tiny(treatment)
    alone = Trainer(recipe, on(1), token_folder)
    losses = trained(alone)
    weights = weights_of(alone)
    for ranks in (2, 4):

        def train(world):
            trainer = sharded(recipe, token_folder, world)
            return trained(trainer), weights_of(trainer), trainer.digest()

        found = Threads(ranks).run(train)
        assert len({digest for _, _, digest in found}) == 1, "ranks have parted"
        for others, moved, _ in found:
            assert others == pytest.approx(losses, rel=2e-5)
            for name, value in weights.items():
                torch.testing.assert_close(moved[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("treatment", CHAINS + TURNING, ids=named)
def test_shares_move_as_the_banks_do_that_they_are_of(tiny, build, treatment):
    """By the same gradients; nothing is clipped, for the norm is a sum in another order."""
    recipe = tiny(treatment, optim__clip=None)

    def moved(optimizer, model):
        draw = torch.Generator().manual_seed(0)
        for t in range(1, 13):
            for _, value in model.named_parameters():
                value.grad.copy_(torch.randn(value.shape, generator=draw))
            optimizer.step(t)
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    def of_rank(world):
        model = build(recipe)
        optimizer = ShardedOptimizer(model, recipe, False, (), None, world, whole=0)
        return moved(optimizer, model)

    model = build(recipe)
    wanted = moved(Optimizer(model, recipe), model)
    for found in Threads(2).run(of_rank):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_as_many_ranks_repeat_their_bits(tiny, token_folder):
    recipe = tiny(["muon"])

    def train(world):
        trainer = sharded(recipe, token_folder, world, micro_batch=2)
        return trained(trainer), trainer.digest()

    assert Threads(2).run(train) == Threads(2).run(train)


def test_the_norm_is_that_of_the_whole_gradient(tiny, token_folder):
    recipe = tiny(["muon"], optim__clip=0.01)
    alone = Trainer(recipe, on(1), token_folder)
    (block,) = alone._micro_batches(0, 4)
    alone.training_step.descend(block)
    grads = [bank.grad.double() for bank in alone.optimizer.banks]
    norm = torch.sqrt(sum(grad.square().sum() for grad in grads)).item()
    found = Threads(2).run(lambda world: sharded(recipe, token_folder, world).advance().item())
    assert found == pytest.approx([norm, norm], rel=1e-5)


def test_ranks_evaluate_to_the_numbers_of_one_bit_for_bit(tiny, token_folder):
    recipe = tiny()
    alone = Trainer(recipe, on(1, micro_batch=2), token_folder)
    scores = alone.evaluate()

    def evaluate(world):
        trainer = sharded(recipe, token_folder, world, micro_batch=4)
        return trainer.evaluate(), trainer.held_out().nats

    for found, nats in Threads(2).run(evaluate):
        assert found == scores
        assert (nats == alone.held_out().nats).all()


# -- who owns what ---------------------------------------------------------------------------------------------------
@given(ranks=st.integers(1, 9), whole=st.sampled_from([0, 3000, 10**9]))
def test_every_member_of_a_bank_has_one_owner_in_the_order_of_ranks(tiny, build, ranks, whole):
    recipe = tiny(["muon"])
    banks = Optimizer(build(recipe), recipe).banks
    for bank, shares in zip(banks, shares_of(banks, ranks, whole), strict=True):
        dealt = [member for share in shares for member in share]
        assert dealt == list(range(len(bank.names)))
        counts = [len(share) for share in shares]
        if bank.weight.numel() < whole:
            assert sorted(counts)[:-1] == [0] * (ranks - 1)
        else:
            assert max(counts) - min(counts) <= 1


def test_a_rank_has_the_state_of_its_share_alone(tiny, build):
    recipe = tiny(["muon"])
    whole = sum(value.numel() for value in Optimizer(build(recipe), recipe).tensors().values())

    def own(world):
        optimizer = ShardedOptimizer(build(recipe), recipe, False, (), None, world, whole=0)
        return sum(value.numel() for value in optimizer._own().values())

    found = Threads(3).run(own)
    assert sum(found) == whole
    assert max(found) < whole / 2


@given(ranks=st.integers(2, 6), rows=st.integers(2, 24))
def test_ranks_own_equal_rows_of_a_table_or_one_owns_it(tiny, build, ranks, rows):
    """What they own of it are views, which together are the table."""
    (table,) = [
        one for one in optimizer_of(tiny(), build).banks if "embedding.table" in one.names
    ]
    weight = torch.arange(2.0 * rows).view(1, rows, 2)
    table = replace(table, weight=weight, grad=weight.clone())
    (one,) = dealt([table], ranks, whole=0)
    assert isinstance(one, ByRows) == (rows % ranks == 0)
    parts = [one.part(rank) for rank in range(ranks)]
    found = [part.weight for part in parts if part.names]
    assert torch.equal(torch.cat(found, 1), weight)
    assert [len(part[0]) for part in found] == [rows // len(found)] * len(found)
    for part in found:
        part.zero_()
    assert not weight.any()


def test_only_what_moves_number_by_number_is_cut_by_rows(tiny, build):
    recipe = tiny(["muon"])
    banks = optimizer_of(recipe, build).banks
    cut = [one.bank.declared.role for one in dealt(banks, 4, 0) if isinstance(one, ByRows)]
    assert "embedding" in cut
    assert "hidden" not in cut
    unsaid = [replace(bank, chain=Chain((Lion(),))) for bank in banks]
    assert not any(isinstance(one, ByRows) for one in dealt(unsaid, 4, 0))


def optimizer_of(recipe, build):
    return Optimizer(build(recipe), recipe)


# -- messages --------------------------------------------------------------------------------------------------------
def test_gradients_leave_while_the_backward_pass_goes_on(tiny, token_folder):
    """Those of the last layers before those of the first have come."""
    recipe = tiny()

    def sent(world):
        trainer = sharded(recipe, token_folder, world)
        table = next(trainer.model.parameters())  # the embedding, whose gradient comes last
        before = []
        table.register_hook(lambda gradient: before.append(len(world.sent)))
        trainer.advance()
        return before[0], len(trainer.training_step.reduction.pieces)

    for left, pieces in Threads(2).run(sent):
        assert 0 < left < pieces


def test_only_the_last_micro_batch_sends_gradients(tiny, token_folder):
    recipe = tiny()

    def reductions(world, **more):
        trainer = sharded(recipe, token_folder, world, **more)
        trainer.advance()
        return sum(kind[0] == "reduce" for kind in world.sent)

    at_once = Threads(2).run(reductions)
    in_two = Threads(2).run(lambda world: reductions(world, micro_batch=2))
    assert at_once == in_two


# -- checkpoints -----------------------------------------------------------------------------------------------------
@of_chains
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_on_four(
    tiny, token_folder, tmp_path, treatment
):
    recipe = tiny(treatment)
    steady = Trainer(recipe, on(1), token_folder)
    wanted = trained(steady, 9)

    def begin(world):
        trainer = sharded(recipe, token_folder, world)
        losses = trained(trainer, 3)
        trainer.save(tmp_path)
        trainer.saver.wait()
        return losses

    losses, _ = Threads(2).run(begin)
    alone = Trainer(recipe, on(1), token_folder)
    alone.restore(tmp_path, warn=pytest.fail)
    assert alone.segments == [[0, 2], [3, 1]]
    losses += trained(alone, 3)
    alone.save(tmp_path)
    alone.saver.wait()
    saved = {name: value.clone() for name, value in alone.tensors().items()}

    def go_on(world):
        trainer = sharded(recipe, token_folder, world)
        trainer.restore(tmp_path, warn=pytest.fail)
        found = {name: value.clone() for name, value in trainer.tensors().items()}
        return found, trained(trainer, 3), trainer.segments

    for found, rest, segments in Threads(4).run(go_on):
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert segments == [[0, 2], [3, 1], [6, 4]]
        assert losses + rest == pytest.approx(wanted, rel=5e-5)


def test_resuming_on_as_many_ranks_changes_no_bit(tiny, token_folder, tmp_path):
    recipe = tiny(["muon", {"ema": {}}])

    def straight(world):
        trainer = sharded(recipe, token_folder, world)
        trained(trainer, 3)
        trainer.save(tmp_path)
        trainer.saver.wait()
        return trained(trainer, 3), trainer.digest(), trainer.evaluate()

    def resumed(world):
        trainer = sharded(recipe, token_folder, world)
        trainer.restore(tmp_path, warn=pytest.fail)
        return trained(trainer, 3), trainer.digest(), trainer.evaluate()

    assert Threads(2).run(straight) == Threads(2).run(resumed)


def test_ranks_that_go_on_may_take_other_rows_at_once_and_one_alone_may_not(
    tiny, token_folder, tmp_path
):
    recipe = tiny()

    def begin(world):
        trainer = sharded(recipe, token_folder, world, micro_batch=4)
        trainer.advance()
        trainer.save(tmp_path)
        trainer.saver.wait()

    Threads(2).run(begin)
    alone = Trainer(recipe, on(1, micro_batch=2), token_folder)
    alone.restore(tmp_path, warn=pytest.fail)
    assert alone.step == 1
    alone.advance()
    alone.save(tmp_path)
    alone.saver.wait()
    said = []
    other = Trainer(recipe, on(1, micro_batch=4), token_folder)
    other.restore(tmp_path, warn=said.append)
    assert "was trained with micro_batch=2, now 4" in said[0]


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "said"),
    [
        (
            8,
            None,
            "8 GPUs a run (runtime.ranks) are more than the rows of a micro-batch, data.batch=6",
        ),
        (4, 3, "runtime.micro_batch=3; use at most 3"),
        (4, None, "do not divide a micro-batch of 6 rows (data.batch=6); nearest: 3, 6"),
    ],
)
def test_ranks_that_cannot_share_a_micro_batch_are_refused(ranks, micro_batch, said):
    with pytest.raises(UserError) as refusal:
        settle(on(ranks, micro_batch=micro_batch), 6)
    assert said in str(refusal.value)


def in_place(world):
    """Equal parts are added up, and then handed on, where they lie."""
    whole = torch.arange(6.0) + world.rank
    own = whole.chunk(2)[world.rank]
    world.reduce_scatter(whole, own).wait()
    added = own.clone()
    world.all_gather(whole, own).wait()
    return added.tolist(), whole.tolist()


def test_processes_add_up_equal_parts_in_place_as_threads_do():
    found = on_ranks(2, in_place)
    assert found == Threads(2).run(in_place)
    assert found[0] == ([1, 3, 5], [1, 3, 5, 7, 9, 11])


def test_a_world_of_threads_sees_ranks_that_say_different_things():
    def part(world):
        return world.told(1) if world.rank else world.all_reduce(torch.zeros(1))

    with pytest.raises(AssertionError, match="different messages"):
        Threads(2).run(part)


def test_initial_weights_are_those_of_one_rank(tiny, build, token_folder):
    recipe = tiny()
    model = build(recipe)
    initialise(model, recipe)
    found = Threads(2).run(lambda world: sharded(recipe, token_folder, world).digest())
    assert set(found) == {Trainer(recipe, on(1), token_folder).digest()}
