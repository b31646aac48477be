"""U-net skips: which block takes the output of which, and how much of it."""

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.model.objective import token_losses
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

ROUNDING = 4e-7  # an fp32 product and a sum, each to 6e-8
# layers -> block: the block whose output it takes, both from 0
PARTNERS = {
    2: {1: 0},
    3: {2: 0},
    4: {2: 1, 3: 0},
    5: {3: 1, 4: 0},
    6: {3: 2, 4: 1, 5: 0},
}
every_depth = pytest.mark.parametrize("layers", PARTNERS)


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def off(ours, theirs):
    """The largest difference, in units of the largest value."""
    return abs(ours - theirs).max() / abs(theirs).max()


def weights(model):
    """Block -> the weight of its skip, where it has one."""
    found = {}
    for layer, block in enumerate(model.blocks):
        for name, value in block.on_block.named_parameters():
            assert name == "unet_skips.weight"
            found[layer] = value
    return found


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


@every_depth
def test_each_block_of_the_later_half_takes_its_partners_output(tiny, build, batch, layers):
    recipe = tiny(["unet_skips"], model__layers=layers)
    model = build(recipe, stirred=0.3)
    tokens = batch(recipe)[:, :-1]
    read, left = streams_of(model, tokens)
    stream = fp64(model.embed(tokens))
    for layer in range(layers):
        expected = stream
        if layer in PARTNERS[layers]:
            weight = weights(model)[layer].item()
            expected = stream + weight * left[PARTNERS[layers][layer]]
            assert abs(weight) > 0.1
            assert off(read[layer], stream) > 0.01
        assert off(read[layer], expected) < ROUNDING, layer
        stream = left[layer]


@every_depth
def test_one_weight_a_skip_starts_at_one_and_none_is_elsewhere(tiny, build, layers):
    found = weights(build(tiny(["unet_skips"], model__layers=layers)))
    assert list(found) == list(PARTNERS[layers])
    for value in found.values():
        assert value.item() == 1
        assert value.declared.role == "vector"


@every_depth
def test_a_weight_of_zero_is_exactly_the_baseline(tiny, build, batch, layers):
    recipe = tiny([{"unet_skips": {"start": 0.0}}], model__layers=layers)
    plain = build(tiny(model__layers=layers))
    model = build(recipe)
    tokens = batch(recipe)[:, :-1]
    assert torch.equal(model(tokens), plain(tokens))
    weights(model)[layers - 1].data += 0.1
    assert not torch.equal(model(tokens), plain(tokens))


@every_depth
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_every_weight_learns_from_the_first_step(tiny, build, batch, layers, start):
    recipe = tiny([{"unet_skips": {"start": start}}], model__layers=layers)
    model = build(recipe)
    descend(model, batch(recipe))
    assert all(value.grad.abs() > 1e-6 for value in weights(model).values())


def test_a_model_of_one_layer_is_refused(tiny, build):
    refusal = "unet_skips joins blocks in pairs, and model.layers=1; use at least 2"
    with pytest.raises(UserError, match=refusal):
        build(tiny(["unet_skips"], model__layers=1))


def test_x0_lambdas_beside_it_scale_the_stream_with_its_skip(tiny, build, batch):
    recipe = tiny(["x0_lambdas", "unet_skips"], model__layers=4)
    model = build(recipe, stirred=0.2)
    tokens = batch(recipe)[:, :-1]
    read, left = streams_of(model, tokens)
    first = fp64(model.embed(tokens))
    for layer, partner in PARTNERS[4].items():
        skipped = left[layer - 1] + weights_beside(model, layer) * left[partner]
        mix = model.blocks[layer].on_block["x0_lambdas"]
        expected = mix.stream.item() * skipped + mix.first.item() * first
        assert off(read[layer], expected) < ROUNDING


def weights_beside(model, layer):
    return model.blocks[layer].on_block["unet_skips"].weight.item()


def test_skips_are_no_part_of_the_decoding_cache(tiny, build, batch):
    recipe = tiny(["unet_skips"], model__layers=4)
    model = build(recipe, stirred=0.1)
    tokens = batch(recipe)[:, :-1]
    cache = None
    pieces = []
    for piece in tokens.split([4, 1, 3, 1, 7], dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    assert cache.carry == {}
    assert off(torch.cat(pieces, dim=1), model(tokens)) < 1e-5


def test_the_stream_keeps_the_activations_dtype(tiny, build, batch):
    recipe = tiny(["unet_skips"], model__layers=4)
    model = build(recipe, dtype=torch.bfloat16, stirred=0.1)
    assert model.trunk(batch(recipe)[:, :-1]).dtype == torch.bfloat16


def test_no_kernel_steps_aside_for_it(tiny, refusals):
    """It stands between the blocks, and kernels within."""
    recipe = tiny(["unet_skips"], model__width=64, model__attention__head_dim=32)
    assert not refusals(recipe, "fp32")


def test_a_run_learns_with_it_and_moves_every_weight(tiny, token_folder):
    recipe = tiny(["unet_skips"], model__layers=4, optim__lr=0.02)
    trainer, fell = trained(recipe, token_folder)
    assert fell > 0.2
    assert all(value.item() != 1 for value in weights(trainer.model).values())
