"""The benchmark of ablab itself: what it compares with is the same model, and what it prints is what it measured."""

import json
import math

from ablab.experiments.bench.overhead import Row, show_bench


def test_the_plain_loop_is_the_tiny_model_and_learns_as_the_trainer_does(
    write_token_folder, tmp_path
):
    """Same parameters, the same cross-entropy within noise after 40 steps on the same text: no half of the work is left out."""
    from dataclasses import replace

    from ablab.core.runtime.runtime import Runtime
    from ablab.core.train.trainer import Trainer
    from ablab.experiments.bench.plain_loop import PlainLoop
    from ablab.experiments.plan.experiment import load

    base = load("quickstart", {"data.name": "tiny", "data.held_out": 300}).base
    recipe = replace(
        base,
        data=replace(base.data, digest=None, vocab=64),
        budget=replace(base.budget, tokens=40 * 512),
    )
    folder = write_token_folder(
        tmp_path / "tokens", train=40_000
    )  # more than an epoch: nothing to learn by heart
    trainer = Trainer(recipe, Runtime(device="cpu"), folder)
    plain = PlainLoop(folder, 40, vocab=64)
    assert plain.parameters() == sum(value.numel() for value in trainer.model.parameters())
    for _ in range(40):
        trainer.advance()
        plain.step()
        ours = trainer.close_window() if trainer.step % 10 == 0 else 0.0
    assert abs(ours - plain.window) < 0.05 < math.log(64) - plain.window
    groups = {
        group["weight_decay"]: sum(value.numel() for value in group["params"])
        for group in plain.optimizer.param_groups
    }
    hidden = sum(
        bank.weight.numel()
        for bank in trainer.optimizer.banks
        if bank.declared.role == "hidden"
    )
    assert groups[0.1] == hidden


def test_rows_are_printed_and_written_with_their_verdicts(tmp_path, capsys):
    rows = [Row("a start", 0.3, "s", 0.4), Row("a step", 1.2, "x", 1.05)]
    show_bench(rows, tmp_path / "bench.json")
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1].split() == ["a", "start", "0.300", "s", "0.4", "s", "yes"]
        and lines[2].split()[-1] == "NO"
    )
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["ok"] for row in written["rows"]] == [True, False]
