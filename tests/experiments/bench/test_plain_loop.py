"""The plain loop that a step is compared with: the same model, and no half of the work left out."""

import math
from dataclasses import replace

from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench.plain_loop import PlainLoop
from ablab.experiments.plan.experiment import load

STEPS = 40


def test_the_plain_loop_is_the_tiny_model_and_learns_as_the_trainer_does(
    write_token_folder, tmp_path
):
    """Same parameters, the same cross-entropy within noise after 40 steps on the same text."""
    base = load("quickstart", {"data.name": "tiny", "data.held_out": 300}).base
    recipe = replace(
        base,
        data=replace(base.data, digest=None, vocab=64),
        budget=replace(base.budget, tokens=STEPS * 512),
    )
    # More than an epoch: nothing to learn by heart.
    folder = write_token_folder(tmp_path / "tokens", train=40_000)
    trainer = Trainer(recipe, Runtime(device="cpu"), folder)
    plain = PlainLoop(folder, STEPS, vocab=64)
    parameters = sum(value.numel() for value in trainer.model.parameters())
    assert plain.parameters() == parameters
    for _ in range(STEPS):
        trainer.advance()
        plain.step()
        ours = trainer.close_window() if trainer.step % 10 == 0 else 0.0
    assert abs(ours - plain.window) < 0.05 < math.log(64) - plain.window
    decayed = {
        group["weight_decay"]: sum(value.numel() for value in group["params"])
        for group in plain.optimizer.param_groups
    }
    banks = trainer.optimizer.banks
    hidden = sum(bank.weight.numel() for bank in banks if bank.declared.role == "hidden")
    assert decayed[0.1] == hidden
