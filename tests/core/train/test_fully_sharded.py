"""Ranks that share weights and gradients too: the run of one rank, in less memory on each.

Here ranks are forked processes (processes.py), for torch's FSDP2 takes its own process groups.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from ablab.core.errors import UserError
from ablab.core.fusion.places import places
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.store.record import Record
from ablab.core.store.state import state_of
from ablab.core.train import checkpoint
from ablab.core.train.cutting import axes_of, own_of
from ablab.core.train.fully_sharded import FullyShardedTrainer
from ablab.core.train.run import run
from ablab.core.train.sharded import ShardedTrainer
from ablab.core.train.trainer import Trainer, Warm
from tests.core.train.processes import on_ranks

code_fingerprint()  # kept: ranks need not read the sources again
# Elementwise chains, and one of whole matrices; factors that differ from layer to layer; an average.
TREATMENT = ["mup", "muon", "normuon", "cautious_wd", "value_residual", {"ema": {}}]
ODD = {  # 85 hidden units, 21 held-out rows
    "model__ffn__multiple": 1,
    "model__ffn__expansion": 2.66,
    "data__held_out": 336,
}
HALF = 6  # steps of 12


def on(ranks, **more):
    return Runtime(device="cpu", ranks=ranks, **more)


def sharded(recipe, folder, world, **more):
    """Every matrix is cut, small as it is."""
    runtime = on(world.size, shard="weights", **more)
    return FullyShardedTrainer(recipe, runtime, folder, world, small=0)


def trained(trainer, steps=HALF):
    """Loss after loss."""
    losses = []
    for _ in range(steps):
        trainer.advance()
        losses.append(trainer.close_window())
    return losses


def saved(trainer, folder):
    trainer.save(folder)
    trainer.saver.wait()


def bytes_of(trainer):
    """Of the weights, gradients and state that lie on this rank."""
    values = list(trainer.model.parameters())
    held = [own_of(value) for value in values] + [own_of(value.grad) for value in values]
    for bank in trainer.optimizer.moved:
        for state in bank.state.values():
            held += state.values()
    return sum(value.nbytes for value in held)


@dataclass
class Trained:
    """What 12 steps were, and what lay on the rank that took them."""

    losses: list
    scores: dict
    digest: str
    bytes: int


def all_of(trainer, losses):
    return Trained(losses, trainer.evaluate(), trainer.digest(), bytes_of(trainer))


@pytest.fixture(scope="module")
def recipe(tiny):
    return tiny(TREATMENT, **ODD)


@pytest.fixture(scope="module")
def folders(recipe, tmp_path_factory):
    """Checkpoints of step 6, by how many ranks."""
    return {ranks: tmp_path_factory.mktemp(f"of-{ranks}") for ranks in (1, 2, 4)}


@pytest.fixture(scope="module")
def alone(recipe, token_folder, folders):
    trainer = Trainer(recipe, on(1), token_folder)
    losses = trained(trainer)
    saved(trainer, folders[1])
    return all_of(trainer, losses + trained(trainer))


@pytest.fixture(scope="module")
def two(recipe, token_folder, folders, alone):
    """Of two ranks: 12 steps on end, the same again, from their checkpoint, and from that of one rank."""

    def train(world):
        trainer = sharded(recipe, token_folder, world)
        losses = trained(trainer)
        saved(trainer, folders[2])
        found = [all_of(trainer, losses + trained(trainer))]
        trainer.restart(recipe, token_folder)
        found.append(all_of(trainer, trained(trainer, 2 * HALF)))
        for ranks in (2, 1):
            trainer.restart(recipe, token_folder)
            trainer.restore(folders[ranks], warn=pytest.fail)
            found.append(all_of(trainer, losses + trained(trainer)))
        return found, trainer.segments

    return on_ranks(2, train)


def test_two_ranks_follow_the_losses_of_one(alone, two):
    for (found, *_), _ in two:
        assert found.losses == pytest.approx(alone.losses, rel=2e-6)
        assert found.scores == pytest.approx(alone.scores, rel=2e-6)


def test_what_lies_on_each_of_two_ranks_is_little_more_than_half(alone, two):
    for (found, *_), _ in two:
        assert found.bytes <= 0.55 * alone.bytes


def test_as_many_ranks_repeat_their_bits_resumed_or_not(two):
    digests = set()
    for (straight, again, resumed, _), _ in two:
        assert straight == again == resumed
        digests.add(resumed.digest)
    assert len(digests) == 1, "ranks say different things"


def test_a_checkpoint_of_one_rank_goes_on_on_two(alone, two):
    for (*_, found), segments in two:
        assert segments == [[0, 1], [HALF, 2]]
        assert found.losses == pytest.approx(alone.losses, rel=2e-6)


def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_holds_what_one_would_save(
    recipe, token_folder, folders, alone, two
):
    trainer = Trainer(recipe, on(1), token_folder)
    trainer.restore(folders[1], warn=pytest.fail)
    wanted = {name: value.clone() for name, value in trainer.tensors().items()}
    trainer.restore(folders[2], warn=pytest.fail)
    assert trainer.segments == [[0, 2], [HALF, 1]]
    found = trainer.tensors()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert trained(trainer) == pytest.approx(alone.losses[HALF:], rel=2e-6)


def test_four_ranks_go_on_from_two_and_measure_in_uneven_turns(
    recipe, token_folder, folders, alone, two
):
    def train(world):
        trainer = sharded(recipe, token_folder, world)
        trainer.restore(folders[2], warn=pytest.fail)
        return all_of(trainer, trained(trainer)), trainer.losses.shape[0]

    found = on_ranks(4, train)
    assert len({one.digest for one, _ in found}) == 1
    for one, rows in found:
        assert rows % 4, "every rank has as many turns of a row"
        assert one.losses == pytest.approx(alone.losses[HALF:], rel=3e-6)
        assert one.scores == pytest.approx(alone.scores, rel=3e-6)
        assert one.bytes <= 0.3 * alone.bytes


def test_a_run_leaves_what_one_rank_leaves(tiny, token_folder, tmp_path):
    """Weights of both kinds, the last state, and the scores of a judge whom only rank 0 asks."""
    recipe = tiny(["muon", {"ema": {}}], budget__tokens=4 * 64)
    how = {"keep_weights": True, "keep_state": True}

    def judge(recipe, weights, settled):
        return {"eval/size": sum(value.norm().item() for value in weights.values())}

    def train(world):
        def make(*given):
            return FullyShardedTrainer(*given, world, small=0)

        return run(
            recipe,
            on(world.size, shard="weights", **how),
            token_folder,
            Record(tmp_path / f"rank-{world.rank}"),
            warm=Warm(rehearse=True, make=make),
            judge=judge if world.rank == 0 else None,
        )

    ours, _ = on_ranks(2, train)
    one = run(recipe, on(1, **how), token_folder, Record(tmp_path / "one"), judge=judge)
    assert ours.run == one.run
    assert ours.metrics == pytest.approx(one.metrics, rel=1e-5)
    for file in ("weights.safetensors", "weights.raw.safetensors"):
        wanted = load_file(tmp_path / "one" / file)
        found = load_file(tmp_path / "rank-0" / file)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    (state,) = checkpoint.listed(state_of(tmp_path / "rank-0"))
    (like,) = checkpoint.listed(state_of(tmp_path / "one"))
    assert load_file(state).keys() == load_file(like).keys()


def test_in_bf16_gathered_weights_have_the_bits_of_whole_ones(tiny, token_folder):
    """Two numbers have one sum, and a weight is rounded once, before it is gathered or behind it."""
    recipe = tiny(["fp8"], optim__clip=None)

    def train(world):
        ours = sharded(recipe, token_folder, world, dtype="bf16")
        losses = trained(ours), ours.digest()
        plain = ShardedTrainer(recipe, on(2, dtype="bf16"), token_folder, world, whole=0)
        return losses, (trained(plain), plain.digest())

    for found, wanted in on_ranks(2, train):
        assert found == wanted


# -- what is cut -----------------------------------------------------------------------------------------------------
def test_a_matrix_is_cut_along_the_first_axis_that_the_ranks_divide(tiny, build):
    """Of 170 rows and 32 columns, on four ranks, the columns; on three only 96 rows are cut."""
    model = build(tiny(["qk_norm", "value_residual"], **ODD))
    block = "blocks.0.attention.qkv.weight", "blocks.0.ffn.inner.gate_up.weight"
    on_four = axes_of(model, 4, small=0)
    assert [on_four[name] for name in block] == [0, 1]
    on_three = axes_of(model, 3, small=0)
    assert [on_three.get(name) for name in block] == [0, None]
    assert all(len(model.get_parameter(name).shape) == 2 for name in on_four)


def test_tables_below_a_size_are_whole_and_matrices_of_any_size_are_cut(tiny, build):
    model = build(tiny())
    named = axes_of(model, 2, small=10**6)
    assert "embedding.table" not in named
    assert "readout.weight" in named


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ranks": 1}, "runtime.ranks=1 is one; add --gpus-per-run 2, or drop it"),
        ({"compile": True}, "runtime.compile=true needs whole weights"),
        ({"replay": True}, "runtime.replay=true needs whole weights"),
        ({"dynamics": 10}, "runtime.dynamics=10 needs whole weights"),
    ],
    ids=str,
)
def test_what_needs_whole_weights_is_refused_by_name(asked, said):
    with pytest.raises(UserError) as refusal:
        settle(Runtime(**{"device": "cpu", "ranks": 2, "shard": "weights"} | asked), 4)
    assert said in str(refusal.value)


def test_on_a_gpu_nothing_is_compiled_or_recorded_unasked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = Runtime(device="cuda", ranks=2, shard="weights")
    settled = settle(asked, 4)
    assert (settled.compile, settled.replay) == (False, False)
    assert settle(replace(asked, compile="blocks"), 4).compile == "blocks"


@pytest.mark.parametrize("asked", ["triton", ("loss",)])
def test_kernels_are_refused_by_name_and_absent_otherwise(tiny, asked):
    recipe, free = tiny(), settle(on(2, shard="weights"), 4)
    served = places(recipe, free).values()
    assert {(one.kernel, one.why) for one in served} == {
        (False, "torch: runtime.shard=weights")
    }
    with pytest.raises(UserError, match="needs whole weights"):
        places(recipe, replace(free, kernels=asked))
