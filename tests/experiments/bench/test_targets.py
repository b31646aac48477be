"""Costs beside their targets: what is printed is what was measured."""

import json

from ablab.experiments.bench.targets import Cost, show_costs


def test_costs_are_printed_and_written_with_their_verdicts(tmp_path, capsys):
    costs = [
        Cost("a start", 0.3, "s", 0.4),
        Cost("a step", 1.2, "x", 1.05),
    ]
    show_costs(costs, tmp_path / "bench.json")
    _, start, step, *_ = capsys.readouterr().out.splitlines()
    assert start.split() == ["a", "start", "0.300", "s", "0.4", "s", "yes"]
    assert step.split()[-1] == "NO"
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["ok"] for row in written["rows"]] == [True, False]
