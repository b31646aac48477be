"""x0 lambdas: before each block, so much of the stream and so much of what entered the first."""

import pytest
import torch

from ablab.core.model.objective import token_losses
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

ROUNDING = 4e-7  # two fp32 products and their sum, each to 6e-8
NANOCHAT = {"x0_lambdas": {"start": "nanochat"}}


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def off(ours, theirs):
    """The largest difference, in units of the largest value."""
    return abs(ours - theirs).max() / abs(theirs).max()


def lambdas(model):
    """(r, z) of each block."""
    stages = [block.on_block["x0_lambdas"] for block in model.blocks]
    return [(stage.stream.item(), stage.first.item()) for stage in stages]


def descend(model, block):
    """Gradients of the mean cross-entropy on rows of tokens, int [B,T+1]."""
    nats = token_losses(model(block[:, :-1]), block[:, 1:])
    nats.mean().backward()


def trained(recipe, token_folder):
    """A trainer at the end of its run, and by how much the held-out loss fell."""
    trainer = Trainer(recipe, Runtime(device="cpu"), token_folder)
    before = trainer.evaluate()["val/loss"]
    for _ in range(recipe.steps):
        trainer.advance()
    return trainer, before - trainer.evaluate()["val/loss"]


def streams_of(model, tokens):
    """What each block's branches read, and what each block leaves.  Both [B,T,W], fp64."""
    read, left = [], []
    for block in model.blocks:
        block.block.register_forward_pre_hook(lambda _, inputs: read.append(fp64(inputs[0])))
        block.register_forward_hook(lambda _, __, out: left.append(fp64(out[0])))
    model(tokens)
    return read, left


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_each_block_reads_r_of_the_stream_and_z_of_the_first(tiny, build, batch, layers):
    recipe = tiny(["x0_lambdas"], model__layers=layers)
    model = build(recipe, stirred=0.3)
    tokens = batch(recipe)[:, :-1]
    read, left = streams_of(model, tokens)
    first = fp64(model.embed(tokens))
    stream = first
    for layer, (r, z) in enumerate(lambdas(model)):
        assert abs(r - 1) > 0.01 and abs(z) > 0.01
        assert off(read[layer], r * stream + z * first) < ROUNDING
        stream = left[layer]
    assert len(set(lambdas(model))) == layers


def test_one_and_zero_are_exactly_the_baseline(tiny, build, batch):
    plain = build(tiny())
    model = build(tiny(["x0_lambdas"]))
    tokens = batch(tiny())[:, :-1]
    assert lambdas(model) == [(1.0, 0.0)] * 3
    assert torch.equal(model(tokens), plain(tokens))
    model.blocks[2].on_block["x0_lambdas"].first.data += 0.1
    assert not torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize(
    ("layers", "stream", "first"),
    [
        (1, [1.15], [0.2]),
        (2, [1.15, 1.05], [0.2, 0.05]),
        (6, [1.15, 1.13, 1.11, 1.09, 1.07, 1.05], [0.2, 0.17, 0.14, 0.11, 0.08, 0.05]),
    ],
)
def test_nanochat_starts_with_less_of_both_the_deeper_the_block(
    tiny, build, layers, stream, first
):
    starts = lambdas(build(tiny([NANOCHAT], model__layers=layers)))
    assert [r for r, _ in starts] == pytest.approx(stream, abs=1e-6)
    assert [z for _, z in starts] == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("listed", ["x0_lambdas", NANOCHAT])
def test_every_number_learns_from_the_first_step(tiny, build, batch, listed):
    model = build(tiny([listed]))
    descend(model, batch(tiny()))
    for one in model.blocks:
        stage = one.on_block["x0_lambdas"]
        for number in (stage.stream, stage.first):
            assert number.declared.role == "vector"
            assert number.grad.abs() > 1e-6


def test_the_first_stream_is_no_part_of_the_decoding_cache(tiny, build, batch):
    model = build(tiny([NANOCHAT]), stirred=0.1)
    tokens = batch(tiny())[:, :-1]
    cache = None
    pieces = []
    for piece in tokens.split([4, 1, 3, 1, 7], dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    assert cache.carry == {}
    assert off(torch.cat(pieces, dim=1), model(tokens)) < 1e-5


def test_no_kernel_steps_aside_for_it(tiny, refusals):
    """It stands between the blocks, and kernels within."""
    recipe = tiny([NANOCHAT], model__width=64, model__attention__head_dim=32)
    assert not refusals(recipe, "fp32")


def test_a_run_learns_with_it_and_moves_all_of_it(tiny, token_folder):
    recipe = tiny(["x0_lambdas"], optim__lr=0.02)
    trainer, fell = trained(recipe, token_folder)
    assert fell > 0.2
    assert all(r != 1 and z != 0 for r, z in lambdas(trainer.model))
