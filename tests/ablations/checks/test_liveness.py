"""Liveness on the path that a GPU serves, and what it leaves; the contracts ask it of every intervention on a CPU."""

import pytest
import torch

from ablab.ablations.checks import liveness
from ablab.ablations.checks.liveness import trace

KERNELS = ("attention", "ffn", "residual", "loss", "newton_schulz", "optimizer")
SHAPE = {
    "model__width": 128,
    "model__attention__head_dim": 64,
    "data__context": 32,
    "budget__tokens": 4 * 4 * 32,
    "schedule__warmup_steps": 1,
}
TOGGLES = (
    "qk_norm",
    "gating",
    "value_residual",
    "z_loss",
    "sliding_window",
    "batch_ramp",
    "soap",
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("toggle", TOGGLES)
def test_on_a_gpu_a_toggle_is_alive_beside_kernels_and_a_trace_repeats(tiny, toggle):
    base = trace(tiny(**SHAPE), "cuda", KERNELS)
    kernels = {"sliding_window": KERNELS[1:], "soap": KERNELS[:5]}.get(toggle, KERNELS)
    recipe = tiny([toggle], **SHAPE)
    found = trace(recipe, "cuda", kernels)
    assert found != base
    assert found == trace(recipe, "cuda", kernels)


def test_before_a_trace_comes_the_one_before_it_goes(tiny, held):
    models = held(liveness, "Transformer")
    for toggle in TOGGLES[:3]:
        trace(tiny([toggle]))
    assert len(models) == 1
