"""The peer has the recipe's shape, and takes the mean gradient of a batch."""

import pytest
import torch

from ablab.core.model.cost import cost_of
from ablab.core.runtime.runtime import Runtime, settle
from ablab.experiments.bench.phases import Marks


@pytest.mark.parametrize(
    "paths",
    [{}, {"model__tied": True, "model__attention__group": 2}],
    ids=["plain", "tied, grouped"],
)
def test_the_peer_has_the_recipes_shape_and_accumulates_the_mean_gradient(
    tiny, token_folder, paths
):
    pytest.importorskip("transformers")
    from ablab.experiments.bench.hugging_face import HuggingFace

    recipe = tiny(**paths)
    cost = cost_of(recipe)
    weights = []
    for rows in (4, 2):
        settled = settle(Runtime(device="cpu", micro_batch=rows), rows=4)
        peer = HuggingFace(recipe, settled, token_folder, Marks())
        values = list(peer.model.parameters())
        assert peer.flops_per_token == cost.flops_per_token
        assert sum(value.numel() for value in values) == cost.parameters
        peer.step()
        weights.append(torch.cat([value.detach().flatten() for value in values]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5
