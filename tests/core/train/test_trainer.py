"""The training loop: equal to a plain torch loop, to itself in micro-batches, and to itself after a kill."""

import hashlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from ablab.core.data.tokens import Tokens
from ablab.core.model.cost import cost_of
from ablab.core.recipe.recipe import structure
from ablab.core.runtime.replay import OnDevice
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record, extent
from ablab.core.store.result import DIVERGED, FINISHED
from ablab.core.train import checkpoint
from ablab.core.train import trainer as trainer_module
from ablab.core.train.banks import Optimizer
from ablab.core.train.run import run, watched_by_nobody
from ablab.core.train.trainer import Trainer, Warm

CPU = Runtime(device="cpu", compile=False, log_every=1, evaluations=3)
FULL = [
    "qk_norm",
    "gating",
    "value_residual",
    "ln_scaling",
    "mup",
    "muon",
    "normuon",
    "cautious_wd",
    "ema",
    "z_loss",
    "wsd",
]


def how(**more) -> Runtime:
    return replace(CPU, **more)


def train(recipe, folder, store, runtime=CPU, **more):
    record = Record(store)
    return run(recipe, runtime, folder, record, **more), record


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


class KilledAt:
    """A log that dies at one step, as a process would: nothing after it is written."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, step, scalars, seconds):
        if step == self.step:
            raise KeyboardInterrupt


def never(said: str):
    raise AssertionError(f"unexpected warning: {said}")


# ---- what a run computes ----


def test_training_equals_a_plain_torch_loop(tiny, build, token_folder, tmp_path):
    """Everything at once: batches, mean loss, clip, schedule, decay of hidden matrices alone, bias-corrected AdamW."""
    recipe = tiny(optim__lr=0.01, optim__clip=0.5)
    result, record = train(recipe, token_folder, tmp_path, how(keep_weights=True))
    model, tokens = build(recipe), Tokens(recipe, token_folder)
    groups = [
        {
            "params": [
                v for v in model.parameters() if (v.declared.role == "hidden") == hidden
            ],
            "weight_decay": 0.1 * hidden,
        }
        for hidden in (True, False)
    ]
    rule, logged, clipped = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10),
        list(record.metrics()),
        0,
    )
    for t in range(1, 13):
        block = tokens.rows(t - 1, 0, 4)
        loss = torch.nn.functional.cross_entropy(
            model(block[:, :-1]).flatten(0, 1), block[:, 1:].flatten()
        )
        rule.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        lr = 0.01 * (t / 3 if t < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (t - 4) / 9)) / 2)
        for group in rule.param_groups:
            group["lr"] = lr
        rule.step()
        line = logged[t - 1]
        assert (line["step"], line["tokens"]) == (t, 64 * t)
        assert (
            abs(line["train/loss"] - loss.item()) < 5e-6
            and abs(line["train/grad_norm"] / norm.item() - 1) < 2e-5
        )
        assert abs(line["optim/lr"] - lr) < 1e-12
        clipped += norm.item() > 0.5
    assert clipped > 6
    from safetensors.torch import load_file

    final = load_file(tmp_path / "weights.safetensors")
    assert final.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert (final[name] - value).abs().max() < 1e-5, (
            name
        )  # measured 8e-7; one step moves by 1e-3 to 1e-2
    assert (result.status, result.step, result.tokens) == (FINISHED, 12, 768)


def test_a_run_learns_what_there_is_to_learn(tiny, token_folder, tmp_path):
    """Independent tokens have an entropy of 3.5 nats; a uniform guess costs ln 64 = 4.16."""
    result, record = train(tiny(budget__tokens=60 * 64, optim__lr=0.01), token_folder, tmp_path)
    first = next(record.metrics())
    assert 4.0 < first["train/loss"] < 4.9 and result.metrics["val/loss"] < 3.95
    assert first["train/loss"] - result.metrics["train/loss"] > 0.2


def test_the_same_recipe_gives_the_same_bits_and_another_seed_gives_others(
    tiny, token_folder, tmp_path
):
    digests = [
        train(tiny(FULL, seed=seed), token_folder, tmp_path / f"{i}")[0].weights
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 16


# ---- micro-batches ----


@pytest.mark.parametrize("treatment", [[], FULL])
def test_micro_batches_of_one_row_give_the_full_batch_and_the_same_schedule(
    tiny, token_folder, treatment
):
    recipe = tiny(treatment, optim__lr=2e-3)
    whole, pieces = (Trainer(recipe, how(micro_batch=rows), token_folder) for rows in (None, 1))
    start = weights(whole)
    for _ in range(6):
        norms = [trainer.advance().item() for trainer in (whole, pieces)]
        assert abs(norms[1] / norms[0] - 1) < 1e-4
    assert whole.step == pieces.step == 6
    assert abs(whole.close_window() - pieces.close_window()) < 1e-6
    for name, value in weights(pieces).items():
        assert (value - weights(whole)[name]).abs().max() < 1e-5, name
        assert not torch.equal(value, start[name]) or name.endswith(".scale"), name


def test_the_logged_schedule_does_not_depend_on_micro_batches(tiny, token_folder, tmp_path):
    logs = [
        list(
            train(tiny(), token_folder, tmp_path / str(rows), how(micro_batch=rows))[
                1
            ].metrics()
        )
        for rows in (4, 2, 1)
    ]
    for field in ("step", "tokens", "optim/lr"):
        assert (
            [line[field] for line in logs[0]]
            == [line[field] for line in logs[1]]
            == [line[field] for line in logs[2]]
        )
    assert len(logs[0]) == 12


# ---- resuming ----


@pytest.fixture(scope="module")
def uninterrupted(tiny, token_folder, tmp_path_factory):
    return train(
        tiny(FULL),
        token_folder,
        tmp_path_factory.mktemp("whole"),
        how(save_seconds=0.0, keep_weights=True),
    )


def same(one, other) -> None:
    """Two runs (result, record): equal weights' bits, final numbers, losses kept and metrics file."""
    assert one[0].weights == other[0].weights and one[0].metrics == other[0].metrics
    assert one[0].held_out == other[0].held_out != ""
    assert one[1].metrics_path.read_bytes() == other[1].metrics_path.read_bytes()
    assert (one[1].folder / "weights.safetensors").read_bytes() == (
        other[1].folder / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("log_every", [1, 5])
def test_resume_at_step_7_equals_never_stopping(tiny, token_folder, tmp_path, log_every):
    """Killed in step 8; with log_every 5 the kill falls between two log lines, so the open window must be saved too."""
    recipe, runtime = (
        tiny(FULL),
        how(save_seconds=0.0, keep_weights=True, log_every=log_every, evaluations=3),
    )
    whole = train(recipe, token_folder, tmp_path / "whole", runtime)
    advance = Trainer.advance

    def killed(self):
        if self.step == 7:
            raise KeyboardInterrupt
        return advance(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "advance", killed)
        train(recipe, token_folder, tmp_path / "cut", runtime)
    assert checkpoint.newest(tmp_path / "cut" / "checkpoints", never)[0] == 7
    same(whole, train(recipe, token_folder, tmp_path / "cut", runtime, warn=never))


def test_a_line_logged_after_the_last_checkpoint_is_forgotten(
    tiny, token_folder, tmp_path, uninterrupted
):
    """Killed after step 8 was logged and before it was saved: the log goes back to step 7."""
    recipe, runtime = tiny(FULL), how(save_seconds=0.0, keep_weights=True)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, token_folder, tmp_path, runtime, log=KilledAt(8))
    assert [line["step"] for line in Record(tmp_path).metrics()][-1] == 8
    assert checkpoint.newest(tmp_path / "checkpoints", never)[0] == 7
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "train/lo')  # torn by the kill
    same(uninterrupted, train(recipe, token_folder, tmp_path, runtime, warn=never))


def test_a_damaged_newest_checkpoint_costs_one_step_and_changes_nothing(
    tiny, token_folder, tmp_path, uninterrupted
):
    recipe, runtime, said = tiny(FULL), how(save_seconds=0.0, keep_weights=True), []
    with pytest.raises(KeyboardInterrupt):
        train(recipe, token_folder, tmp_path, runtime, log=KilledAt(8))
    newest = checkpoint.listed(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    same(uninterrupted, train(recipe, token_folder, tmp_path, runtime, warn=said.append))
    assert len(said) == 1 and newest.name in said[0] and "damaged" in said[0]


def stopped_at_8(recipe, folder, store, runtime) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, store, runtime, log=KilledAt(8))
    assert len(checkpoint.listed(store / "checkpoints")) == 2


@pytest.mark.parametrize("other", ["code", "dtype", "micro_batch", "torch", "run", "name"])
def test_a_checkpoint_of_another_code_runtime_machine_or_run_is_never_taken(
    tiny, token_folder, tmp_path, uninterrupted, monkeypatch, other
):
    """The run ends as one that never saw it; who else wrote the checkpoint is said."""
    recipe, said = tiny(FULL), []
    runtime = how(save_seconds=0.0, keep_weights=True)
    with monkeypatch.context() as patch:
        if other == "code":
            patch.setattr(trainer_module, "code_fingerprint", lambda: "0" * 12)
        if other == "torch":
            patch.setattr(trainer_module, "environment", lambda: {"torch": "1.0"})
        before = {"dtype": how(dtype="bf16"), "micro_batch": how(micro_batch=2)}
        first = replace(before.get(other, runtime), save_seconds=0.0)
        seed = 1 if other == "run" else 0
        stopped_at_8(tiny(FULL, seed=seed), token_folder, tmp_path, first)
    if other == "name":
        for path in checkpoint.listed(tmp_path / "checkpoints"):
            path.rename(str(path).replace("step-0000000", "step-0000001"))
    same(uninterrupted, train(recipe, token_folder, tmp_path, runtime, warn=said.append))
    words = {
        "code": "other code (000000000000, now",
        "dtype": "trained with dtype=bf16, now fp32",
        "micro_batch": "trained with micro_batch=2, now 4",
        "torch": "trained with torch=1.0, now",
        "run": "is of run",
        "name": "renamed (it holds step 7)",
    }
    assert len(said) == 2 and words[other] in said[0]


def test_how_often_a_run_is_looked_at_may_change_between_its_halves(
    tiny, token_folder, tmp_path, uninterrupted
):
    stopped_at_8(tiny(FULL), token_folder, tmp_path, how(save_seconds=0.0))
    runtime = how(save_seconds=9.0, keep_weights=True, turns=False)
    same(uninterrupted, train(tiny(FULL), token_folder, tmp_path, runtime, warn=never))


@pytest.mark.parametrize("flaw", ["step-abc", "folder", "no stamp", "no watch"])
def test_what_is_no_checkpoint_is_set_aside_and_the_run_goes_on(
    tiny, token_folder, tmp_path, uninterrupted, flaw
):
    stopped_at_8(tiny(FULL), token_folder, tmp_path, how(save_seconds=0.0))
    folder = tmp_path / "checkpoints"
    _, tensors = checkpoint.newest(folder, never)
    if flaw == "step-abc":
        (folder / "step-abc-00000000.safetensors").write_bytes(b"")
    if flaw == "folder":
        (folder / "step-00000009-00000000.safetensors").mkdir()
    if flaw == "no stamp":
        checkpoint.write(folder, 9, tensors)
    if flaw == "no watch":
        own = Trainer(tiny(FULL), CPU, token_folder)
        del tensors["watch"]
        checkpoint.write(folder, 9, tensors, own.origin(extent(b"")))
    said = []
    runtime = how(keep_weights=True)
    same(uninterrupted, train(tiny(FULL), token_folder, tmp_path, runtime, warn=said.append))
    assert len(said) == 1 and "set aside" in said[0]


# ---- holes in the log ----


def whole_lines(record) -> list[bytes]:
    return record.metrics_path.read_bytes().splitlines(keepends=True)


LOGS = {
    "cut": lambda lines: lines[:3],
    "emptied": lambda lines: [],
    "doubled": lambda lines: lines + lines,
    "a hole": lambda lines: lines[:2] + lines[3:],
    "not UTF-8": lambda lines: [lines[0].replace(b"tokens", b"tok\xffns"), *lines[1:]],
    "no step": lambda lines: [b'{"tokens": 1}\n', *lines[1:]],
}


@pytest.mark.parametrize("damage", LOGS)
@pytest.mark.parametrize("when", ["meanwhile", "between"])
def test_a_log_with_a_hole_ends_as_one_that_nobody_touched(
    tiny, token_folder, tmp_path, uninterrupted, damage, when
):
    """Damaged while the run goes on it is written again; damaged between two halves the run starts over."""
    recipe, said, record = tiny(FULL), [], Record(tmp_path)
    runtime = how(save_seconds=0.0, keep_weights=True)

    def damaged():
        record.metrics_path.write_bytes(b"".join(LOGS[damage](whole_lines(record))))

    def at_8(step, scalars, seconds):
        if step == 8:
            damaged()

    if when == "meanwhile":
        log = at_8
    else:
        log = watched_by_nobody
        stopped_at_8(recipe, token_folder, tmp_path, runtime)
        damaged()
    same(
        uninterrupted, train(recipe, token_folder, tmp_path, runtime, log=log, warn=said.append)
    )
    harmless = (
        when == "between" and damage == "doubled"
    )  # what follows the last save goes anyway
    assert bool(said) != harmless
    assert all("metrics.jsonl" in line for line in said)


def test_a_run_folder_that_is_removed_meanwhile_is_there_again_at_the_end(
    tiny, token_folder, tmp_path, uninterrupted
):
    folder = tmp_path / "run"

    def remove(step, scalars, seconds):
        if step == 8:
            shutil.rmtree(folder)

    runtime = how(save_seconds=0.0, keep_weights=True)
    again = train(tiny(FULL), token_folder, folder, runtime, log=remove, warn=print)
    same(uninterrupted, again)
    before, after = (
        {p.name for p in one[1].folder.iterdir()} for one in (uninterrupted, again)
    )
    assert before == after


def test_a_result_holds_the_digest_of_its_log(uninterrupted):
    result, record = uninterrupted
    logged = record.metrics_path.read_bytes()
    assert result.log == hashlib.sha256(logged).hexdigest()[:16]


def test_a_record_says_what_its_run_takes(tiny, token_folder, tmp_path):
    recipe = tiny()
    record = Record(tmp_path / "run")
    result = run(recipe, CPU, token_folder, record)
    size = record.about()["size"]
    assert (size["steps"], size["tokens"]) == (result.step, result.tokens)
    cost = cost_of(recipe)
    assert size["parameters"] == cost.parameters
    assert size["flops_per_token"] == cost.flops_per_token


def test_a_finished_run_leaves_no_checkpoints(uninterrupted):
    assert checkpoint.listed(uninterrupted[1].folder / "checkpoints") == []
    assert uninterrupted[1].result() == uninterrupted[0]


# ---- starting again ----

SAME_STRUCTURE = {
    "seed": {"seed": 5},
    "rate": {"optim__lr": 0.02},
    "schedule": {"schedule": {"kind": "constant", "warmup_steps": 1}},
    "budget": {"budget__tokens": 9 * 64},
    "held_out": {"data__held_out": 100},
    "init": {"parametrization__gain": 0.5},
}
TOGGLES = {"mup": ["mup"], "wsd": ["wsd"], "ema": ["ema"]}


@pytest.mark.parametrize("before", ["finished", "diverged", "broken"])
def test_a_warm_trainer_gives_the_bits_of_a_fresh_one(
    tiny, token_folder, tmp_path, monkeypatch, before
):
    """Whatever the run before it left behind: momenta, gradients, averages, a window of NaN."""
    matrices, warm = ["muon", "normuon", "cautious_wd", "value_residual"], Warm()
    if before == "broken":  # in step 3, between the backward pass and the update
        step = Optimizer.step

        def broken(self, t, fraction):
            if t == 3:
                raise RuntimeError("the cable came loose")
            return step(self, t, fraction)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cable"):
            patch.setattr(Optimizer, "step", broken)
            train(tiny([*matrices, "ema"]), token_folder, tmp_path / "first", warm=warm)
    else:
        first = tiny([*matrices, "ema"], optim__lr=1e30 if before == "diverged" else 3e-3)
        assert train(first, token_folder, tmp_path / "first", warm=warm)[0].status == before
    kept = warm.trainer
    recipes = {name: tiny(matrices, **paths) for name, paths in SAME_STRUCTURE.items()} | {
        name: tiny(matrices + toggle) for name, toggle in TOGGLES.items()
    }
    for name in recipes if before == "finished" else ("seed", "ema"):
        recipe = recipes[name]
        again, fresh = (
            train(recipe, token_folder, tmp_path / name, warm=warm),
            train(recipe, token_folder, tmp_path / f"{name}-fresh"),
        )
        assert warm.trainer is kept, name
        assert again[0].weights == fresh[0].weights and again[0].metrics == fresh[0].metrics, (
            name
        )
        assert again[1].metrics_path.read_bytes() == fresh[1].metrics_path.read_bytes(), name
    assert len({structure(recipe, CPU) for recipe in recipes.values()}) == 1


def test_a_rehearsal_leaves_nothing_behind(tiny, token_folder, tmp_path, monkeypatch):
    steps, step = [], Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda self: steps.append(self.step) or step(self))
    recipe = tiny(["muon", "normuon", "cautious_wd", "ema"])
    fresh, rehearsed = (
        train(recipe, token_folder, tmp_path / "fresh"),
        train(recipe, token_folder, tmp_path / "rehearsed", warm=Warm(rehearse=True)),
    )
    assert steps == [*range(12), 0, *range(12)]
    assert (
        fresh[0].weights == rehearsed[0].weights
        and fresh[1].metrics_path.read_bytes() == rehearsed[1].metrics_path.read_bytes()
    )


def test_what_the_graphs_see_needs_another_trainer(tiny, token_folder, tmp_path):
    """A shared trainer would silently train the other model."""
    paths = [
        {"model__width": 64},
        {"model__tied": True},
        {"model__norm_eps": 1e-5},
        {"data__batch": 8},
        {"data__context": 8},
        {"optim__clip": None},
        {"optim__clip": 0.5},
        {"optim__chains__hidden__steps__decay__rate": 0.2},
        {"optim__chains__vector__lr": 0.5},
    ]
    treatments = [
        ["muon"],
        [{"muon": {"lr": 2.0}}],
        ["muon", "normuon"],
        ["cautious_wd"],
        ["qk_norm"],
        ["z_loss"],
        [{"z_loss": {"weight": 0.5}}],
        ["soft_cap"],
        [{"mup": {"readout": "multiplier"}}],
        [{"mup": {"alpha_in": 3.0}}],
        ["relu2"],
        ["ln_scaling"],
    ]
    others = [tiny(**one) for one in paths] + [tiny(one) for one in treatments]
    keys = [structure(recipe, CPU) for recipe in (tiny(), *others)]
    assert len(set(keys)) == len(keys)
    assert structure(tiny(), how(micro_batch=2)) != keys[0]
    warm = Warm()
    for recipe in (tiny(), tiny(["qk_norm"]), tiny()):
        again, fresh = (
            train(
                recipe, token_folder, tmp_path / f"{len(list(tmp_path.iterdir()))}", warm=one
            )[0]
            for one in (warm, None)
        )
        assert again.weights == fresh.weights


# ---- ends ----


def test_a_run_that_diverges_becomes_a_record_with_its_step_and_last_good_loss(
    tiny, token_folder, tmp_path
):
    result, record = train(tiny(optim__lr=1e30, optim__clip=None), token_folder, tmp_path)
    lines = list(record.metrics())
    assert result.status == DIVERGED and 1 < result.step < 12 and record.result() == result
    assert len(lines) == result.step - 1 and math.isfinite(lines[-1]["train/loss"])
    assert (
        f"at step {result.step}" in result.error
        and f"{lines[-1]['train/loss']:.4f}" in result.error
    )
    assert (
        result.metrics == {}
        and result.weights == ""
        and checkpoint.listed(tmp_path / "checkpoints") == []
    )


def test_every_number_of_a_diverging_run_can_be_read_again(tiny, token_folder, tmp_path):
    """The last update may be the one that breaks the weights: the training loss is finite, the held-out loss is not."""
    for steps in (1, 2, 3):
        for lr in (1e12, 1e20, 1e30, 3e38):
            recipe = tiny(
                optim__lr=lr, optim__clip=None, schedule="constant", budget__tokens=64 * steps
            )
            result, record = train(recipe, token_folder, tmp_path / f"{steps}-{lr}")
            assert record.result() == result
            numbers = [
                *result.metrics.values(),
                *(value for line in record.metrics() for value in line.values()),
            ]
            assert all(
                isinstance(value, (int, float)) and math.isfinite(value) for value in numbers
            ), (steps, lr, numbers)


def test_an_error_in_the_loop_is_not_swallowed(tiny, token_folder, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "advance", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tiny(), token_folder, tmp_path)
    assert Record(tmp_path).result() is None


def test_lack_of_memory_becomes_a_record(tiny, token_folder, tmp_path, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Card:
        total_memory = 2**34

    monkeypatch.setattr(Trainer, "advance", full)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**33)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**33)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**31, 2**34))
    result, record = train(tiny(), token_folder, tmp_path)
    assert result.status == "out_of_memory" and record.result() == result
    assert (
        "8.0 GiB of 16.0 in use, 6.0 by others, at" in result.error
        and "try runtime.micro_batch=2" in result.error
    )


class Recorded:
    """As a CUDA graph that holds memory: a recorder that has recorded one call."""

    height = 0

    def record(self, function, like):
        return self


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_evaluation_without_memory_is_repeated_without_the_graphs_that_hold_it(
    tiny, token_folder, monkeypatch
):
    trainer, held = Trainer(tiny(), CPU, token_folder), []
    wanted, loss = trainer.evaluate(), trainer._held_out_loss
    descend = OnDevice(trainer.training_step.descend, trainer.device, Recorded())
    descend.recordings[torch.Size([4, 17])] = Recorded()
    trainer.training_step.descend = descend

    def full_once():
        held.append(len(descend.recordings))
        return out_of_memory() if descend.recordings else loss()

    monkeypatch.setattr(trainer, "_held_out_loss", full_once)
    assert trainer.evaluate() == wanted
    assert held == [1, 0] and descend.recorder is None
    monkeypatch.setattr(trainer, "_held_out_loss", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.evaluate()


# ---- evaluating ----


@pytest.mark.parametrize("treatment", [[], [{"ema": {"mix": 0.7}}]])
def test_evaluation_leaves_the_weights_and_the_next_steps_untouched(
    tiny, token_folder, treatment
):
    looked, blind = (Trainer(tiny(treatment), CPU, token_folder) for _ in range(2))
    for trainer in (looked, blind):
        for _ in range(5):
            trainer.advance()
            if trainer is looked:
                before = trainer.digest()
                scores = trainer.evaluate()
                assert trainer.digest() == before and scores == trainer.evaluate()
    assert looked.digest() == blind.digest()


def test_evaluations_are_evenly_spaced_and_the_last_is_after_the_last_step(
    tiny, token_folder, tmp_path
):
    for count, expected in {
        1: [12],
        3: [4, 8, 12],
        5: [3, 5, 8, 10, 12],
        40: list(range(1, 13)),
    }.items():
        result, record = train(
            tiny(), token_folder, tmp_path / str(count), how(evaluations=count, log_every=7)
        )
        lines = list(record.metrics())
        assert [line["step"] for line in lines if "val/loss" in line] == expected
        assert {line["step"] for line in lines} == {7, *expected}
        assert result.metrics["val/loss"] == lines[-1]["val/loss"]


def test_ema_reports_its_average_as_val_and_the_raw_weights_as_raw_val(
    tiny, token_folder, tmp_path
):
    """The raw numbers are those of the same run without EMA, bit for bit: training does not change."""
    plain, averaged = (
        train(tiny(treatment, optim__lr=0.02), token_folder, tmp_path / str(len(treatment)))[0]
        for treatment in ([], [{"ema": {"horizon": 5}}])
    )
    assert plain.weights == averaged.weights
    for name in ("val/loss", "val/bits_per_byte"):
        assert (
            averaged.metrics[f"raw/{name}"] == plain.metrics[name]
            and f"raw/{name}" not in plain.metrics
        )
        assert abs(averaged.metrics[name] - plain.metrics[name]) > 1e-3


def test_kept_weights_are_those_that_were_evaluated_and_the_trained_ones_stand_beside(
    tiny, token_folder, tmp_path
):
    from safetensors import safe_open
    from safetensors.torch import load_file

    recipe = tiny([{"ema": {"horizon": 5}}], optim__lr=0.02)
    result, _ = train(recipe, token_folder, tmp_path, how(keep_weights=True))
    trainer = Trainer(recipe, CPU, token_folder)
    names = {"weights": ("evaluated", "val/loss"), "weights.raw": ("weights", "raw/val/loss")}
    for file, (digest, loss) in names.items():
        path = tmp_path / f"{file}.safetensors"
        kept = load_file(path)
        with torch.no_grad():
            for name, value in trainer.model.named_parameters():
                value.copy_(kept[name])
        assert trainer._held_out()["loss"] == result.metrics[loss]
        assert trainer.digest() == getattr(result, digest)
        assert safe_open(path, "pt").metadata() == {"digest": getattr(result, digest)}
    assert result.evaluated != result.weights


@pytest.mark.parametrize("treatment", [[], [{"ema": {"horizon": 5}}]])
def test_the_kept_losses_are_those_that_the_metrics_sum(
    tiny, token_folder, tmp_path, treatment
):
    """To the 2^-11 of float16; with an average, those of the average."""
    recipe = tiny(treatment, optim__lr=0.02)
    result, record = train(recipe, token_folder, tmp_path)
    kept = record.held_out(result.held_out)
    nats = kept.nats.astype(float)
    text = kept.bytes > 0
    assert kept.nats.shape == (20, 16) and not text.all()
    assert abs(nats.mean() / result.metrics["val/loss"] - 1) < 2**-11
    bits_per_byte = nats[text].sum() / math.log(2) / kept.bytes.sum()
    assert abs(bits_per_byte / result.metrics["val/bits_per_byte"] - 1) < 2**-11


def test_only_a_finished_run_keeps_losses(tiny, token_folder, tmp_path):
    recipe = tiny(optim__lr=1e9, optim__clip=None)
    result, record = train(recipe, token_folder, tmp_path)
    assert result.status == DIVERGED and result.held_out == ""
    assert not record.held_out_path.exists()


def test_windows_of_the_training_loss_are_even_whenever_evaluations_fall(
    tiny, token_folder, tmp_path
):
    """12 steps, windows of 5: one of 5, then one of 7, for a rest of 2 would be a spike; evaluations close none."""
    each, windows = (
        list(train(tiny(), token_folder, tmp_path / str(every), how(**settings))[1].metrics())
        for every, settings in (
            (1, {"log_every": 1, "evaluations": 1}),
            (5, {"log_every": 5, "evaluations": 3}),
        )
    )
    means = {line["step"]: line["train/loss"] for line in windows if "train/loss" in line}
    assert list(means) == [5, 12]
    assert [line["step"] for line in windows if "val/loss" in line] == [4, 8, 12]
    losses = [line["train/loss"] for line in each]
    assert abs(means[5] - sum(losses[:5]) / 5) < 1e-9
    assert abs(means[12] - sum(losses[5:]) / 7) < 1e-9


def test_the_mean_loss_of_a_window_is_over_all_its_tokens(tiny, token_folder, tmp_path):
    each, windows = (
        [
            line["train/loss"]
            for line in train(
                tiny(), token_folder, tmp_path / str(every), how(log_every=every, evaluations=1)
            )[1].metrics()
        ]
        for every in (1, 4)
    )
    assert len(windows) == 3
    for i, value in enumerate(windows):
        assert abs(value - sum(each[4 * i : 4 * i + 4]) / 4) < 1e-9


def test_the_metrics_file_holds_nothing_that_depends_on_the_clock(tiny, token_folder, tmp_path):
    result, record = train(tiny(), token_folder, tmp_path)
    fields = set().union(*record.metrics())
    assert fields == {
        "step",
        "tokens",
        "train/loss",
        "train/grad_norm",
        "optim/lr",
        "val/loss",
        "val/bits_per_byte",
    }
    assert {"seconds", "tokens_per_second"} < set(next(record.pace())) and result.seconds > 0
    assert json.loads((tmp_path / "run.json").read_text())["runtime"]["device"] == "cpu"
