"""Value embeddings: a table a chosen layer, read by the token, added to its raw values a key-value head."""

from functools import partial

import numpy as np
import pytest
import torch

from ablab.core.fusion.places import flaw
from ablab.core.model.objective import token_losses
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def embeddings(**dose):
    return {"value_embeddings": dose}


def added(model):
    """Layer -> the stage that adds, where there is one."""
    found = {}
    for layer, block in enumerate(model.blocks):
        stages = block.attention.on_values._modules
        if "value_embeddings" in stages:
            found[layer] = stages["value_embeddings"]
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


def keep_values(kept, kv, _, __, out):
    """A hook on the packed projection: its last `kv` heads of 8 channels."""
    heads = out.unflatten(-1, (-1, 8))
    kept.append(fp64(heads[:, :, -kv:]))


def rows_of(stage, tokens, kv):
    """The stage's row of each token, cut into heads: fp64 [B,T,KV,8]."""
    rows = fp64(stage.table)[tokens.numpy()]
    return rows.reshape(*tokens.shape, kv, 8)


def values_of(model, tokens):
    """Each layer's raw values and the values that attention mixes.  Both [B,T,KV,D], fp64."""
    raw = []
    for block in model.blocks:
        kv = block.attention.heads[2]
        block.attention.qkv.register_forward_hook(partial(keep_values, raw, kv))
    _, cache = model.extend(tokens, None)
    return raw, [fp64(values.transpose(1, 2)) for _, values in cache.blocks]


@pytest.mark.parametrize(
    ("layers", "every", "chosen"),
    [
        (3, 2, [0, 2]),
        (4, 2, [1, 3]),
        (1, 2, [0]),
        (4, 1, [0, 1, 2, 3]),
        (5, 3, [1, 4]),
        (3, 7, [2]),
    ],
)
def test_every_so_many_layers_have_a_table_counted_from_the_last(
    tiny, build, layers, every, chosen
):
    recipe = tiny([embeddings(every=every)], model__layers=layers, model__attention__group=2)
    stages = added(build(recipe))
    assert list(stages) == chosen
    for stage in stages.values():
        assert stage.table.shape == (64, 16)
        assert stage.table.declared.role == "embedding"
        assert stage.strength.declared.role == "vector"


@pytest.mark.parametrize("group", [1, 2])
def test_values_gain_the_strength_times_the_row_of_their_token(tiny, build, batch, group):
    recipe = tiny([embeddings()], model__attention__group=group, model__layers=4)
    model = build(recipe, stirred=0.5)
    tokens = batch(recipe)[:, :-1]
    raw, used = values_of(model, tokens)
    strengths = [stage.strength.item() for stage in added(model).values()]
    assert strengths[0] != strengths[1]
    for layer in (0, 2):
        assert np.array_equal(used[layer], raw[layer])
    for layer, stage in added(model).items():
        rows = rows_of(stage, tokens, 4 // group)
        expected = raw[layer] + stage.strength.item() * rows
        assert apart(used[layer], expected) < 2e-6
        assert apart(used[layer], raw[layer]) > 0.1


def test_it_starts_at_half_of_a_small_row(tiny, build):
    for stage in added(build(tiny(["value_embeddings"]))).values():
        assert stage.strength.item() == 0.5
        assert 0.019 < stage.table.std().item() < 0.021


def test_tables_of_two_layers_start_apart(tiny, build):
    first, last = added(build(tiny(["value_embeddings"]))).values()
    assert apart(fp64(first.table), fp64(last.table)) > 0.01


def test_a_strength_of_zero_is_exactly_the_baseline(tiny, build, batch):
    plain = build(tiny())
    model = build(tiny([embeddings(start=0.0)]))
    tokens = batch(tiny())[:, :-1]
    assert torch.equal(model(tokens), plain(tokens))
    added(model)[2].strength.data += 0.1
    assert not torch.equal(model(tokens), plain(tokens))


def test_strengths_and_the_rows_of_seen_tokens_learn_and_no_other_row(tiny, build):
    model = build(tiny(["value_embeddings"]))
    block = torch.arange(2 * 17).reshape(2, 17)
    descend(model, block)
    seen = block[:, :-1].flatten()
    unseen = torch.ones(64, dtype=torch.bool)
    unseen[seen] = False
    for stage in added(model).values():
        assert stage.strength.grad.abs() > 1e-6
        assert (stage.table.grad[seen].abs().amax(dim=1) > 0).all()
        assert not stage.table.grad[unseen].any()


def test_a_value_residual_beside_it_mixes_the_raw_values(tiny, build, batch):
    """Layer 1's row does not reach layer 3 by the mix."""
    residual = {"value_residual": {"form": "learnable", "own": 0.6, "first": 0.3}}
    recipe = tiny([embeddings(), residual])
    model = build(recipe)
    tokens = batch(recipe)[:, :-1]
    raw, used = values_of(model, tokens)
    mixed = [0.6 * own + 0.3 * raw[0] for own in raw]
    rows = rows_of(added(model)[2], tokens, 4)
    assert apart(used[2], mixed[2] + 0.5 * rows) < 2e-6
    assert apart(used[1], mixed[1]) < 2e-6


def test_a_future_token_changes_no_earlier_logits(tiny, build, batch):
    model = build(tiny(["value_embeddings"]), stirred=0.2)
    tokens = batch(tiny())[:, :-1]
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_decoding_keeps_values_with_their_rows(tiny, build, batch):
    model = build(tiny(["value_embeddings"]), stirred=0.2)
    tokens = batch(tiny())[:, :-1]
    _, whole = model.extend(tokens, None)
    cache = None
    for piece in tokens.split([4, 1, 3, 1, 7], dim=1):
        _, cache = model.extend(piece, cache)
    assert cache.carry == {}
    for ours, theirs in zip(cache.blocks, whole.blocks, strict=True):
        assert apart(fp64(ours[1]), fp64(theirs[1])) < 1e-5


def test_the_attention_kernel_steps_aside_and_the_others_stay(tiny):
    recipe = tiny(["value_embeddings"], model__width=64, model__attention__head_dim=32)
    assert "on_values holds value_embeddings" in flaw("attention", recipe, "fp32")
    assert not any(flaw(place, recipe, "fp32") for place in ("ffn", "loss", "optimizer"))


def test_a_run_learns_with_it_and_moves_all_of_it(tiny, build, token_folder):
    recipe = tiny(["value_embeddings"], optim__lr=0.02)
    trainer, fell = trained(recipe, token_folder)
    assert fell > 0.2
    moved = added(trainer.model)
    for layer, start in added(build(recipe)).items():
        assert apart(fp64(moved[layer].table), fp64(start.table)) > 0.01
        assert moved[layer].strength.item() != 0.5
