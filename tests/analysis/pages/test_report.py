import json
from dataclasses import replace

import pytest

from ablab.analysis.pages import report
from ablab.core.errors import UserError
from ablab.core.store.planned import Factors, command
from ablab.core.store.result import DIVERGED

FULL = [3.000, 3.001, 3.002]
WITHOUT = [3.020, 3.022, 3.021]


def page(lab, folder, mixed: bool = False) -> str:
    return report.write(lab.write(), lab.name, folder / "out", mixed).read_text()


def row(text: str, arm: str, section: str) -> list[str]:
    """The cells of an arm's line in a section's table."""
    lines = text.split(f"## {section}")[1].splitlines()
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(f"| `{arm}` |")
    )


def test_the_page_holds_question_verdict_control_numbers_and_pictures(lab, tmp_path):
    lab.treatments = {"full": {"qk_norm": {}, "muon": {}}, "- qk_norm": {"muon": {}}}
    lab.off = {"qk_norm": "queries and keys as projected", "muon": "AdamW"}
    lab.cell("full", FULL, None, points=5)
    lab.cell("- qk_norm", WITHOUT, points=5, speed=1.1e5)
    text = page(
        lab,
        tmp_path,
    )
    assert "Which ingredients still pay?" in text
    assert "`val/loss` in nats/token, lower is better" in text
    says, p, control = row(text, "- qk_norm", "Verdicts")[1:]
    assert says.startswith("qk_norm helps: without it +0.0200 [")
    assert control == "queries and keys as projected"
    numbers = row(text, "- qk_norm", "Numbers")
    assert numbers[1:5] == ["3", "3.0210", "0.0010", "+0.0200"]
    assert numbers[7] == "–"  # no losses were kept
    assert numbers[8:] == [
        p,
        "helps",
        "110,000",
        "1.10",
        "1.10 to 1.10",
        "3 finished",
    ]
    for picture in ("forest.png", "curves.png"):
        assert f"]({picture})" in text
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    assert "Same hyper-parameters, not tuned" in text
    assert "adjusted for all 1\ncomparisons" in text
    assert "## Read first" not in text


def test_the_first_screen_answers_the_question(lab, tmp_path):
    lab.equivalence = 0.01
    lab.cell("full", FULL, None)
    lab.cell("- good", WITHOUT)
    lab.cell("- bad", [2.900, 2.9012, 2.902])
    lab.cell("- same", [3.0001, 3.0012, 3.0018])
    lab.cell("- young", [3.01, "missing", "missing"])
    lab.cell("- lost", [DIVERGED] * 3)
    text = page(lab, tmp_path)
    first = text.partition("## ")[0]
    assert "**`good` helps (by 0.0200 nats/token); `bad` hurts (by 0.0999 nats/token);" in first
    assert "`same` makes no difference that matters" in first
    assert "1 seed cannot tell for `young`" in first
    assert "no run of `lost` finished" in first
    assert "Smallest effect of interest: 0.01." in first
    assert "*Equivalent*: the 90 % interval lies within +-0.01" in text
    assert row(text, "- young", "Numbers")[9] == "too few seeds (+2)"


def test_each_method_is_named_once_with_the_arms_that_it_serves(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT)
    lab.cell("- y", WITHOUT[::-1])
    lab.cell("- z", [*WITHOUT[:2], DIVERGED])
    text = page(lab, tmp_path)
    assert text.count("diffmax (`- x`, `- y`)") == 1
    assert text.count("y ~ arm + seed (`- z`)") == 1


def test_arms_whose_noise_differs_are_named_and_more_seeds_asked_for(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- quiet", [3.1000, 3.1011, 3.1020])
    lab.cell("- loud", [3.1, 3.15, 3.0])
    lab.cell("- usual", WITHOUT)
    text = page(lab, tmp_path)
    assert "the arms' noise differs: the differences of `- loud` have an sd of 0.077" in text
    assert "those of `- quiet` 5.8e-05; from 6 seeds on" in text
    assert "so add 3" in text


def test_every_run_id_is_listed(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", [3.1, "missing", "diverged"])
    text = page(lab, tmp_path)
    assert all(planned.run in text.split("## Runs")[1] for planned in lab.rows)


def test_an_arm_that_drops_two_ingredients_names_both_controls(lab, tmp_path):
    lab.treatments = {"full": {"muon": {}, "normuon": {}}, "- muon (and normuon)": {}}
    lab.off = {"muon": "AdamW", "normuon": "no per-neuron scale"}
    lab.cell("full", FULL, None)
    lab.cell("- muon (and normuon)", WITHOUT)
    text = page(lab, tmp_path)
    assert (
        row(text, "- muon (and normuon)", "Verdicts")[3]
        == "muon: AdamW; normuon: no per-neuron scale"
    )


def test_a_diverged_arm_is_shown_with_its_step_and_reason(lab, tmp_path):
    lab.cell("full", FULL, None, points=5)
    lab.cell("- x", [3.1, 3.2, DIVERGED], points=5, step=41, error="the loss was not finite")
    text = page(lab, tmp_path)
    assert "`- x`: 1 diverged of 3 runs; loo--_x-2 at step 41: the loss was not finite" in text
    assert row(text, "- x", "Numbers")[-1] == "2 finished, 1 diverged"


def test_a_finished_run_far_from_its_arms_other_seeds_is_named_and_counts(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", [3.02, 3.022, 3.5])
    text = page(lab, tmp_path)
    said = "val/loss 3.5000 is far from its arm's other seeds (3.0200 to 3.0220)"
    assert f"`- x`, seed 2: {said}" in text
    assert row(text, "- x", "Numbers")[-1] == "3 finished"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"code": "beef"}, "the runs mix code fingerprints: c0ffee (3 runs), beef (3 runs)"),
        (
            {"runtime": {"device": "cuda", "dtype": "float32"}},
            "the runs mix runtime/dtype: bfloat16 (3 runs), float32 (3 runs)",
        ),
        (
            {"runtime": {"device": "cpu", "dtype": "bfloat16"}},
            "the runs mix runtime/device: cuda (3 runs), cpu (3 runs)",
        ),
        (
            {"runtime": {"device": "cuda"}},
            "the runs mix runtime/dtype: bfloat16 (3 runs), not recorded (3 runs)",
        ),
        (
            {"runtime": {"device": "cuda", "dtype": "bfloat16", "kernels": "torch"}},
            "the runs mix runtime/kernels: not recorded (3 runs), torch (3 runs)",
        ),
    ],
)
def test_arms_that_ran_differently_are_refused_unless_asked_for_then_said_first(
    lab, tmp_path, changed, words
):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT, **changed)
    with pytest.raises(UserError) as refusal:
        page(lab, tmp_path)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("ablab report loo --mixed")
    first, _, rest = page(lab, tmp_path, mixed=True).partition("**`x` helps")
    assert f"**Mixed runs**: {words}" in first
    assert rest


def test_seeds_of_one_arm_that_other_kernels_served_are_refused(lab, tmp_path):
    lab.cell("full", FULL, None, kernels={"attention": "triton"})
    lab.cell("- x", WITHOUT[:2], kernels={"attention": "triton"})
    lab.cell("- x", WITHOUT[2:], kernels={"attention": "torch: no GPU"}, first_seed=2)
    words = r"the runs of `- x` mix kernels: attention by triton \(2 runs\), torch \(1 runs\)"
    with pytest.raises(UserError, match=words):
        page(lab, tmp_path)
    assert "**Mixed runs**" in page(lab, tmp_path, mixed=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": 7}, "the runs mix token counts: 100000000 (3 runs), 7 (3 runs)"),
        (
            {"runtime": {"device": "cuda", "dtype": "bfloat16", "threads": 2}},
            "the runs mix runtime/threads: not recorded (3 runs), 2.0 (3 runs)",
        ),
    ],
)
def test_arms_of_other_lengths_or_settings_are_warned_about(lab, tmp_path, changed, words):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT, **changed)
    text = page(lab, tmp_path)
    assert words in text and "Mixed runs" not in text


def test_a_run_that_finished_without_a_number_costs_its_seed_and_is_named(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT)
    lab.cell("- y", WITHOUT[:2])
    lab.cell("- y", [3.0], metrics={"raw/val/loss": 3.0}, first_seed=2)
    text = page(lab, tmp_path)
    assert "`- y`: 1 runs finished without a finite val/loss; they are left out" in text
    assert row(text, "- y", "Numbers")[-1] == "2 finished, 1 without the metric"


def test_a_result_that_holds_no_number_costs_one_run_and_is_named(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT)
    store = lab.write()
    path = store.run(lab.rows[-1].run).result_path
    path.write_text(path.read_text().replace("3.021", "NaN"))
    text = page(lab, tmp_path)
    assert f"`- x`, seed 2: {path} is damaged" in text
    assert row(text, "- x", "Numbers")[-1] == "2 finished, 1 damaged"


def test_missing_interrupted_and_few_seeds_are_warned_about(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", [3.1, "missing", "interrupted"])
    text = page(lab, tmp_path)
    assert "1 missing, 1 interrupted of 6 runs" in text
    assert "continue with: ablab run loo" in text
    assert "fewer than 3 finished seeds: `- x` (1)" in text
    assert "killed, or still running" in text


def test_runs_that_were_never_started_are_not_called_interrupted(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", [3.1, "missing", "missing"])
    text = page(lab, tmp_path)
    assert "2 missing of 6 runs; continue with: ablab run loo" in text
    assert "interrupted" not in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loo", "ablab run loo"),
        (
            "loo@budget.tokens=20000@optim.lr=0.1",
            "ablab run loo budget.tokens=20000 optim.lr=0.1",
        ),
        ("loo@objective=['z_loss']", """ablab run loo 'objective=['"'"'z_loss'"'"']'"""),
        ("loo@0123456789ab", "ablab run loo ..."),
        ("lr@tuned", "ablab study lr"),
        ("lr@optim.clip=null@study", "ablab study lr optim.clip=null"),
    ],
)
def test_a_message_names_a_command_that_can_be_typed(name, words):
    assert command(name) == words


def test_runs_that_went_on_with_another_number_of_gpus_are_said(lab, tmp_path):
    lab.cell("full", FULL, None, points=5, segments=[[0, 2], [30, 1]])
    lab.cell("- x", WITHOUT, points=5)
    text = page(lab, tmp_path)
    assert "3 of 6 runs went on with another number of GPUs (2 ranks, 1 from step 30 (3" in text


def test_a_shared_machine_is_said_and_no_speed_is_compared(lab, tmp_path):
    lab.cell("full", FULL, None, points=5, contended="2 runs at once")
    lab.cell("- x", WITHOUT, points=5)
    text = page(lab, tmp_path)
    assert (
        f"{len(FULL)} of {len(FULL) + len(WITHOUT)} runs shared their machine (2 runs at once"
        in text
    )
    assert "for those run with --jobs 1 where nothing else runs" in text
    assert {one.tokens_per_second_ratio for one in report.read(lab.store, "loo").effects} == {
        None
    }


def test_another_metric_says_that_no_error_over_text_is_known(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT)
    store = lab.write()
    store.write_plan(
        replace(store.read_plan("loo"), metric="tokens_per_second", better="higher")
    )
    found = report.read(store, "loo")
    assert found.provenance[-1].startswith(
        "`tokens_per_second` is no mean over held-out tokens"
    )
    assert [effect.mean for effect in found.effects] == [1e5, 1e5]


def test_an_arm_with_other_values_names_what_stands_there_without_it(lab):
    lab.cell("base", FULL, None)
    lab.cell("hot", WITHOUT, "base")
    lab.treatments = {"base": {"z_loss": {"weight": 1e-4}}, "hot": {"z_loss": {"weight": 0.5}}}
    store = lab.write()
    store.write_plan(replace(store.read_plan("loo"), settings={"hot": {"optim.lr": 0.1}}))
    found = report.read(store, "loo")
    told = report.off(found.plan, found.effects[1])
    assert told == "z_loss: weight=0.0001; without optim.lr=0.1"


def test_a_pipe_in_a_name_does_not_break_the_table(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("a|b", WITHOUT)
    assert r"| `a\|b` |" in page(lab, tmp_path)


@pytest.mark.parametrize("values", [["missing", "interrupted"], ["diverged"], []])
def test_an_experiment_without_a_finished_run_is_refused_in_one_line(lab, tmp_path, values):
    lab.cell("full", values, None)
    store = lab.write()
    with pytest.raises(UserError, match="'loo' has no finished run .*ablab run loo") as refusal:
        report.write(store, "loo", tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_report_without_logs_or_arms_has_numbers_and_no_pictures(lab, tmp_path):
    lab.cell("only", FULL, None)
    text = page(lab, tmp_path)
    assert row(text, "only", "Numbers")[2] == "3.0010"
    assert ".png" not in text


def test_json_is_strict_and_says_what_the_table_says(lab):
    lab.off = {"x": "nothing in its place"}
    lab.cell("full", FULL, None)
    lab.cell("- x", [3.1, "diverged", "missing"])
    read = report.read(lab.write(), "loo")
    data = json.loads(json.dumps(report.as_json(read), allow_nan=False))
    arm = data["effects"][1]
    assert (arm["cell"], arm["n"], arm["interval"], arm["off"]) == (
        "- x",
        1,
        None,
        "nothing in its place",
    )
    assert data["metric"] == {"name": "val/loss", "unit": "nats/token", "better": "lower"}
    assert data["warnings"] == read.warnings
    assert len(data["runs"]) == 6
    assert data["runs"][4]["val/loss"] is None


def test_table_rows_share_their_headings(lab):
    lab.cell("full", FULL, None)
    lab.cell("- x", ["diverged"] * 3)
    rows = report.table(report.read(lab.write(), "loo").effects)
    assert rows[0].keys() == rows[1].keys()
    assert all(isinstance(text, str) for line in rows for text in line.values())
    assert (rows[0]["ingredient"], rows[1]["ingredient"], rows[1]["delta"]) == (
        "reference",
        "inadmissible",
        "–",
    )


# Arms that other kernels served than their reference.


def served(lab):
    """`- x` without the attention kernel; `- y` as the reference."""
    triton = {"attention": "triton", "ffn": "triton"}
    lab.cell("full", FULL, None, kernels=triton, speed=1.5e5)
    lab.cell("- x", WITHOUT, kernels=triton | {"attention": "torch: no RoPE"}, speed=1e5)
    lab.cell("- y", WITHOUT, kernels=triton, speed=1.2e5)
    return lab


def test_an_arm_served_by_other_kernels_is_named_before_any_number(lab, tmp_path):
    first, _, rest = page(served(lab), tmp_path).partition("## Verdicts")
    assert (
        "- `- x` and `full` were served differently: attention by torch (no RoPE) against triton;"
        in first
    )
    assert "`- y` and" not in first + rest
    assert "ffn" not in first


def test_both_throughputs_are_marked_and_the_mark_is_explained(lab, tmp_path):
    text = page(served(lab), tmp_path)
    assert row(text, "- x", "Numbers")[10:12] == ["100,000 †", "0.67 †"]
    assert row(text, "full", "Numbers")[10:12] == ["150,000 †", "–"]
    assert row(text, "- y", "Numbers")[10:12] == ["120,000", "0.80"]
    assert text.split("## Numbers")[1].count("\n† arm and reference were served by") == 1


def test_arms_served_alike_have_no_mark_and_no_footnote(lab, tmp_path):
    lab.cell("full", FULL, None, kernels={"attention": "triton"})
    lab.cell("- x", WITHOUT, kernels={"attention": "triton"})
    assert "†" not in page(lab, tmp_path)


def test_the_terminal_and_json_tell_who_served(lab):
    found = report.read(served(lab).write(), "loo")
    marks = {
        line["arm"]: line["tokens/s"].endswith("†") for line in report.table(found.effects)
    }
    assert marks == {"full": True, "- x": True, "- y": False}
    arms = {arm["cell"]: arm["service"] for arm in report.as_json(found)["effects"]}
    assert arms["- x"] == {"attention": ("torch: no RoPE", "triton")}
    assert arms["- y"] == {}


# Designs that cross factors.


def test_a_crossed_design_is_answered_by_its_effects(lab, tmp_path):
    cells = {"base": (-1, -1), "+ a": (1, -1), "+ b": (-1, 1), "full": (1, 1)}
    noise = iter([0, 3, -2, 1, -1, 2, 0, -3, 1, -1, 2, -2])
    for name, (a, _) in cells.items():
        values = [3 + 0.01 * seed - 0.01 * a + 1e-4 * next(noise) for seed in range(3)]
        lab.cell(name, values, None if name == "base" else "base")
    lab.factors = Factors(
        names={"a": ["off", "on"], "b": ["off", "on"]},
        levels={cell: {"a": a, "b": b} for cell, (a, b) in cells.items()},
        interactions=[["a", "b"]],
        aliases=["b = c x d"],
    )
    text = page(lab, tmp_path)
    assert "**`a` helps (by 0.02" in text.partition("## ")[0]
    section = "Main effects and interactions"
    assert row(text, "a", section)[1].startswith("a helps: on against off -0.0")
    assert row(text, "b", section)[3] == "c x d"
    assert row(text, "a x b", section)[1].startswith("a x b: inconclusive, ")
    told = json.dumps(report.as_json(report.read(lab.write(), "loo")), allow_nan=False)
    assert [one["term"] for one in json.loads(told)["crossed"]] == ["a", "b", "a x b"]


def test_what_an_arm_saves_or_costs_in_compute_has_an_interval(lab, tmp_path):
    lab.cell("full", FULL, None, points=8)
    lab.cell("- x", WITHOUT, points=8, speed=2e5)
    text = page(lab, tmp_path)
    tokens, flops, seconds = row(text, "- x", "Effect in compute")[1:]
    assert float(tokens.split(" x")[0]) < 1
    assert "[" in tokens and flops == "–"
    assert float(seconds.split(" x")[0]) > float(tokens.split(" x")[0])
    assert "a schedule that still has to decay" in " ".join(text.split())


def test_cells_that_may_be_the_best_are_named(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT)
    lab.cell("- y", [3.0001, 3.0009, 3.002])
    text = page(lab, tmp_path)
    assert "confidence (Hsu's MCB): `- y`, `full`; the other 1 is surely not." in text


def test_without_curves_nothing_is_said_of_compute(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- x", WITHOUT)
    assert "Effect in compute" not in page(lab, tmp_path)
