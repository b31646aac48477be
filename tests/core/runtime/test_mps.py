"""Apple's GPUs, of which there is none here.  What is chosen is tested as it is; how tensors go there, by a fake.

The fake is torch's own device `meta`, which keeps shapes and dtypes and computes nothing.  Like an Apple GPU it meets
no tensor of the host but a number, and here it is refused fp64, which those lack.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablab.core.errors import UserError
from ablab.core.fusion.places import places
from ablab.core.model.transformer import Transformer
from ablab.core.runtime import replay
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.train import evaluate, step, trainer
from ablab.experiments.run.capacity import default_jobs, gpus_for

MPS = Runtime(device="mps")


@pytest.fixture
def on_a_mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_without_one_it_is_refused_with_what_to_do():
    with pytest.raises(
        UserError, match="torch sees no GPU of Apple's here; use runtime.device=cpu"
    ):
        settle(MPS, 4)


def test_it_has_to_be_named(on_a_mac):
    assert settle(Runtime(), 4).device in ("cpu", "cuda")


def test_it_trains_in_fp32_without_compiler_graphs_and_kernels_unless_asked(
    on_a_mac, tiny, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settled = settle(MPS, 4)
    chosen = (settled.device, settled.dtype, settled.compile, settled.replay)
    assert chosen == ("mps", "fp32", False, False)
    assert not settled.deterministic
    assert not any(place.kernel for place in places(tiny(), settled).values())
    assert settle(replace(MPS, dtype="bf16"), 4).dtype == "bf16"


def test_one_gpu_trains_one_run_at_a_time_and_no_run_has_several(on_a_mac):
    assert (default_jobs(MPS), gpus_for(MPS)) == (1, [])
    with pytest.raises(UserError, match="runtime.device=mps is one GPU"):
        settle(replace(MPS, ranks=2), 4)


def test_sums_are_in_the_finest_numbers_that_the_device_has():
    assert replay.finest(torch.device("mps")) == torch.float32
    assert replay.finest(torch.device("cpu")) == torch.float64


class Apple(TorchDispatchMode):
    """Refuses what an Apple GPU would."""

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        made = operation(*given, **(named or {}))
        tensors = [
            one for one in tree_leaves((given, named, made)) if isinstance(one, torch.Tensor)
        ]
        there = [one for one in tensors if one.is_meta]
        if any(one.dtype == torch.float64 for one in there):
            raise TypeError(f"{operation}: there is no fp64 on an Apple GPU")
        return made


class Moved(Transformer):
    """Its parameters keep what is noted on them, as on the way to any device but `meta`, which makes new ones."""

    def to(self, device):
        noted = {name: vars(value) for name, value in self.named_parameters()}
        moved = super().to(device)
        for name, value in moved.named_parameters():
            vars(value).update(noted[name])
        return moved


@pytest.fixture
def fake(on_a_mac, monkeypatch):
    """A trainer takes `meta` for the device that it was given."""
    monkeypatch.setattr(
        trainer, "settle", lambda *asked: replace(settle(*asked), device="meta")
    )
    monkeypatch.setattr(trainer, "Transformer", Moved)
    for module in (step, evaluate):
        monkeypatch.setattr(module, "finest", lambda device: replay.finest(torch.device("mps")))


@pytest.mark.parametrize("treatment", [[], ["qk_norm", "muon", "normuon", "ema", "z_loss"]])
def test_a_step_and_an_evaluation_run_where_nothing_of_the_host_is_met(
    fake, tiny, token_folder, treatment
):
    with Apple():
        training = trainer.Trainer(tiny(treatment), MPS, token_folder)
        norms = [training.advance() for _ in range(2)]
        measured = evaluate.spans_measured(training.nats, training.tokens, 4, training.device)
    assert {one.device.type for one in (*norms, *training.model.parameters())} == {"meta"}
    assert (measured.nats.device.type, measured.sums.dtype) == ("meta", torch.float32)


def test_the_fake_refuses_what_the_host_alone_has():
    with Apple():
        with pytest.raises(TypeError, match="no fp64"):
            torch.zeros(2, dtype=torch.float64, device="meta")
        with pytest.raises(RuntimeError, match="not on the expected device meta"):
            torch.zeros(2, device="meta") + torch.zeros(2)
