"""Kernels compiled ahead: all of them, at once, and none a second time."""

import sys

import pytest
import torch

from ablab.core.runtime.runtime import Runtime
from ablab.core.train import trainer
from ablab.core.train.trainer import Trainer


def test_what_was_compiled_ahead_launches_at_once_and_a_flaw_waits_for_its_launch(for_an_h100):
    ahead, then, flaw = for_an_h100("ahead_sm90.py")
    kernels = ahead[1]
    assert int(kernels) >= 17
    assert ahead[:4] == ["ahead", kernels, kernels, "0"]
    assert then[:4] == ["then", "0", "0", kernels]
    assert flaw == ["broken", "CompileTimeAssertionFailure"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_what_was_compiled_ahead_for_the_second_gpu_launches_there():
    from ablab.kernels import swiglu
    from ablab.kernels.ahead import compiling_only

    swiglu._forward.device_caches.clear()
    with torch.cuda.device(1):
        packed = torch.randn(64, 256, device="cuda")
        with compiling_only(2):
            swiglu.swiglu(packed)
        found = swiglu.swiglu(packed)
    torch.testing.assert_close(found, swiglu.reference(packed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "treatment",
    [[], ["qk_norm", "gating", "value_residual", "muon", "normuon", "cautious_wd", "z_loss"]],
    ids=["base", "full"],
)
def test_a_trainer_finds_its_kernels_compiled_and_trains_to_the_same_bits(
    tiny, token_folder, monkeypatch, treatment
):
    from triton import knobs
    from triton.runtime.jit import JITFunction

    recipe = tiny(treatment, model__attention__head_dim=64, model__width=128, data__context=32)
    runtime = Runtime(device="cuda", kernels="triton")
    compiled = []

    def note(**named):
        compiled.append(named["fn"].name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)

    def train():
        """Weights after 5 steps and an evaluation, kernels compiled before them, kernels compiled in them."""
        for value in our_globals():
            if isinstance(value, JITFunction):
                value.device_caches.clear()
        compiled.clear()
        trained = Trainer(recipe, runtime, token_folder)
        before = len(compiled)
        for _ in range(5):
            trained.advance()
        trained.evaluate()
        return trained.digest(), before, len(compiled) - before

    ahead, before, meanwhile = train()
    monkeypatch.setattr(trainer, "compile_kernels", lambda *_: None)
    late, nothing, all_of_them = train()
    assert before == all_of_them > 3
    assert meanwhile == nothing == 0
    assert late == ahead


def our_globals():
    """Whatever the modules of kernels hold."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ablab.kernels"):
            yield from vars(module).values()
