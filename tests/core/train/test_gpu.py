"""What only a GPU can show: bf16 and compiled runs, and the same bits again."""

from dataclasses import replace

import pytest
import torch

from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.train.run import run
from ablab.core.train.trainer import Trainer, Warm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

FULL = [
    "qk_norm",
    "gating",
    "value_residual",
    "ln_scaling",
    {"mup": {"base_width": 16}},
    "muon",
    "normuon",
    "cautious_wd",
    "wsd",
    "z_loss",
    "soft_cap",
    "ema",
]
SIZE = {"model__attention__head_dim": 16, "model__width": 64, "budget__tokens": 40 * 64}


def curve(recipe, folder, path, **runtime):
    record = Record(path)
    result = run(recipe, Runtime(log_every=1, **runtime), folder, record)
    return result, [line["train/loss"] for line in record.metrics()]


@pytest.mark.parametrize("treatment", [[], FULL], ids=["base", "full"])
def test_compiled_bf16_follows_the_eager_fp32_cpu_run(tiny, token_folder, tmp_path, treatment):
    recipe = tiny(treatment, **SIZE)
    _, cpu = curve(recipe, token_folder, tmp_path / "cpu", device="cpu")
    result, gpu = curve(recipe, token_folder, tmp_path / "gpu", device="cuda")
    assert result.runtime["dtype"] == "bf16" and result.runtime["compile"] == "blocks"
    assert len(gpu) == 40 and max(abs(a - b) for a, b in zip(cpu, gpu, strict=True)) < 0.05


def test_eager_fp32_logits_on_the_gpu_equal_the_cpu(tiny, build, batch):
    recipe = tiny(FULL, **SIZE)
    model, tokens = build(recipe, stirred=0.1), batch(recipe)[:, :-1]
    on_cpu = model(tokens)
    torch.testing.assert_close(model.cuda()(tokens.cuda()).cpu(), on_cpu, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("treatment", [[], FULL], ids=["base", "full"])
def test_two_runs_on_the_gpu_end_in_the_same_bits(tiny, token_folder, tmp_path, treatment):
    recipe = tiny(treatment, **SIZE)
    first, one = curve(recipe, token_folder, tmp_path / "a", device="cuda")
    again, two = curve(recipe, token_folder, tmp_path / "b", device="cuda")
    assert first.weights == again.weights and one == two


def test_resume_on_the_gpu_equals_never_stopping(tiny, token_folder, tmp_path):
    recipe, runtime = tiny(FULL, **SIZE), Runtime(device="cuda")
    whole = Trainer(recipe, runtime, token_folder)
    for _ in range(9):
        whole.advance()
    stopped = Trainer(recipe, runtime, token_folder)
    for _ in range(5):
        stopped.advance()
    stopped.save(tmp_path)
    stopped.saver.wait()
    resumed = Trainer(recipe, runtime, token_folder)
    resumed.restore(tmp_path, print)
    for _ in range(4):
        resumed.advance()
    assert resumed.digest() == whole.digest()


def test_a_warm_trainer_on_the_gpu_gives_the_bits_of_a_fresh_one(tiny, token_folder):
    runtime, warm = Runtime(device="cuda"), Warm()
    other, recipe = tiny(FULL, **SIZE, seed=5, optim__lr=0.02), tiny(FULL, **SIZE)
    used = warm.trainer_for(other, runtime, token_folder)
    for _ in range(3):
        used.advance()
    again = warm.trainer_for(recipe, runtime, token_folder)
    assert again is used
    fresh = Trainer(recipe, runtime, token_folder)
    for trainer in (again, fresh):
        for _ in range(4):
            trainer.advance()
    assert again.digest() == fresh.digest()


@pytest.mark.parametrize("compile", [False, True, "blocks"])
def test_replayed_steps_are_the_steps_themselves(tiny, token_folder, compile):
    recipe, seen = tiny(FULL, **SIZE), []
    for replay in (False, True):
        trainer = Trainer(
            recipe,
            Runtime(device="cuda", compile=compile, replay=replay, micro_batch=1, recompute=1),
            token_folder,
        )
        norms = [trainer.advance().item() for _ in range(9)]
        assert [bool(one.recordings) for one in trainer.training_step.replayed] == [
            replay,
            replay,
        ]
        seen.append((norms, trainer.close_window(), trainer.evaluate(), trainer.digest()))
    assert seen[0] == seen[1]


def test_a_chain_that_waits_for_the_device_is_not_recorded(tiny, token_folder):
    """The exact polar factor is an SVD, which asks the device whether it converged."""
    trainer = Trainer(
        tiny([{"muon": {"ns": "exact"}}], **SIZE),
        Runtime(device="cuda", compile=False),
        token_folder,
    )
    assert all(trainer.advance().isfinite() for _ in range(6))
    assert trainer.training_step.descend.recordings and not trainer.optimizer.launch.recordings


def test_a_run_reports_the_memory_of_its_replays(tiny, token_folder, tmp_path):
    """Beside it, two graphs keep a workspace of cuBLAS each."""
    recipe, peaks = (
        tiny([], **SIZE | {"model__width": 512, "model__attention__head_dim": 64}),
        [],
    )
    for replay in (False, True):
        warm = Warm()
        for seed in (0, 1):
            runtime = Runtime(device="cuda", compile=False, replay=replay)
            peaks.append(
                run(
                    replace(recipe, seed=seed),
                    runtime,
                    token_folder,
                    Record(tmp_path / f"{replay}{seed}"),
                    warm=warm,
                ).peak_bytes
            )
    assert all(0.99 * peaks[0] < peak < peaks[0] + 256 * 2**20 for peak in peaks), (
        peaks
    )  # the first run also set up libraries


def test_lack_of_gpu_memory_becomes_a_record_that_names_a_micro_batch(
    tiny, token_folder, tmp_path, request
):
    torch.cuda.set_per_process_memory_fraction(0.02)  # others on this GPU keep theirs
    request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.0))
    recipe = tiny([], model__width=8192, model__layers=64, model__attention__head_dim=64)
    result, _ = curve(recipe, token_folder, tmp_path, device="cuda", compile=False)
    assert result.status == "out_of_memory" and "micro_batch=" in result.error
