"""Steps of several shapes: their gradient is the mean over their own tokens, and their rows cut the same windows."""

from dataclasses import dataclass, replace

import pytest
import torch

from ablab.core.data.tokens import Tokens
from ablab.core.language.part import Part
from ablab.core.parts.shape import Phase
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.train.run import run
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu", compile=False, log_every=1, evaluations=2)
# shares of 768 tokens: 12 steps of 16 tokens in two rows, 6 of 32 in one row and a half batch, 6 of 64
GROWING = (Phase(0.25, 2, 8), Phase(0.5, 2, 16), Phase(1.0, 4, 16))


@dataclass(frozen=True)
class Listed(Part):
    listed: tuple[Phase, ...] = GROWING
    kind: str = "listed"

    def phases(self, batch: int, context: int) -> tuple[Phase, ...]:
        return self.listed


def growing(tiny, treatment=(), **paths):
    recipe = tiny(treatment, **paths)
    return replace(recipe, data=replace(recipe.data, shape=Listed()))


def test_rows_of_half_a_window_are_its_halves(tiny, token_folder):
    recipe = growing(tiny)
    tokens, whole = Tokens(recipe, token_folder), Tokens(tiny(), token_folder)
    for t in range(12):
        window = whole.rows(t // 4, t % 4, 1)[0]  # four windows a step there, one here
        first, second = tokens.rows(t, 0, 1)
        assert torch.equal(first, window[:9]) and torch.equal(second, window[8:])
    after = torch.cat([tokens.rows(t, 0, 2) for t in (12, 13)])
    assert torch.equal(after, whole.rows(3, 0, 4))


def test_training_equals_a_plain_loop_over_the_mean_of_each_step(
    tiny, build, token_folder, tmp_path
):
    """A sum divided by the tokens of a full step would be clipped elsewhere and log another norm."""
    recipe = growing(tiny, optim__clip=0.5, optim__lr=0.01, schedule="constant")
    record = Record(tmp_path)
    result = run(recipe, CPU, token_folder, record)
    model, tokens = build(recipe), Tokens(recipe, token_folder)
    hidden = [v for v in model.parameters() if v.declared.role == "hidden"]
    others = [v for v in model.parameters() if v.declared.role != "hidden"]
    groups = [{"params": hidden, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    rule = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-10)
    logged = list(record.metrics())
    assert [line["tokens"] for line in logged] == [
        recipe.tokens_after(t + 1) for t in range(24)
    ]
    assert result.step == recipe.steps == 24 and result.tokens == 768
    for t, line in enumerate(logged):
        block = tokens.rows(t, 0, recipe.batches.at(t).windows)
        logits = model(block[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, block[:, 1:].flatten())
        rule.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rule.step()
        assert abs(line["train/loss"] - loss.item()) < 1e-5, t
        assert abs(line["train/grad_norm"] / norm.item() - 1) < 5e-5, t


def test_micro_batches_keep_one_size_and_change_nothing(tiny, token_folder):
    recipe = growing(tiny, ["muon"], optim__lr=2e-3)
    assert Trainer(recipe, CPU, token_folder).runtime.micro_batch == 1
    even = replace(recipe, data=replace(recipe.data, shape=Listed(GROWING[1:])))
    whole = Trainer(even, CPU, token_folder)
    pieces = Trainer(even, replace(CPU, micro_batch=1), token_folder)
    assert whole.runtime.micro_batch == 2
    for _ in range(14):
        norms = [trainer.advance().item() for trainer in (whole, pieces)]
        assert abs(norms[1] / norms[0] - 1) < 1e-4
    for one, other in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("at", [5, 15])
def test_resuming_in_any_phase_equals_never_stopping(tiny, token_folder, tmp_path, at):
    recipe = growing(tiny, ["ema"])
    whole, stopped, resumed = (Trainer(recipe, CPU, token_folder) for _ in range(3))
    for _ in range(recipe.steps):
        whole.advance()
    for _ in range(at):
        stopped.advance()
    stopped.save(tmp_path)
    stopped.saver.wait()
    resumed.restore(tmp_path, print)
    while resumed.step < recipe.steps:
        resumed.advance()
    assert resumed.digest() == whole.digest()
