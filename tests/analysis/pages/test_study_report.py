import dataclasses
import json

import numpy as np
import pytest

from ablab.analysis.pages import study_report
from ablab.analysis.tuning.transfer import movements, transfer
from ablab.core.errors import UserError
from ablab.core.store import study_record
from ablab.core.store.study_record import LR, WIDTH, StudyRecord, Trial

LRS = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
WIDTHS = (32, 64, 128, 256)
OPTIMA = {"full": lambda width: 0.008, "- muon": lambda width: 0.016 * 32 / width}


def search(optima=OPTIMA, widths=WIDTHS, seeds=("100",), **changed) -> StudyRecord:
    """Parabolas without noise: floor 3 - width/1000, 0.02 per octave^2; seeds differ by 0.004 around them."""
    trials = []
    for cell, optimum in optima.items():
        for number, (width, lr) in enumerate((width, lr) for width in widths for lr in LRS):
            value = 3 - width / 1e3 + 0.02 * float(np.log2(lr / optimum(width))) ** 2
            values = {
                seed: value + 0.004 * (i - (len(seeds) - 1) / 2) for i, seed in enumerate(seeds)
            }
            params = {LR: lr} | ({WIDTH: width} if len(widths) > 1 else {})
            trials.append(
                Trial(
                    cell,
                    number,
                    params,
                    "complete",
                    value,
                    values,
                    [f"{cell}/{number}/{seed}" for seed in seeds],
                    3.0,
                )
            )
    space = {LR: {"log": [0.001, 0.032]}} | (
        {WIDTH: {"choices": list(widths)}} if len(widths) > 1 else {}
    )
    usual = {
        "name": "lr_width",
        "question": "Does the rate move with width?",
        "metric": "val/bits_per_byte",
        "better": "lower",
        "space": space,
        "hard": {LR: (1e-4, 0.3)},
        "base": {LR: 0.007, WIDTH: 64},
        "sampler": "grid",
        "pruner": "none",
        "seeds": [100],
        "trials_per_cell": 24,
        "tuned": "lr_width@tuned",
    }
    return StudyRecord(**usual | changed, trials=trials)


def page(lab, folder, study: StudyRecord) -> str:
    study_record.write(lab.store, study)
    return study_report.write(lab.store, study.name, folder / "out").read_text()


def warnings(lab, study: StudyRecord) -> str:
    study_record.write(lab.store, study)
    return "\n".join(study_report.read(lab.store, study.name).warnings)


def ended(study: StudyRecord, cell: str, state: str, when=lambda trial: True) -> StudyRecord:
    """The same study with some of a cell's trials ended otherwise."""

    def lose(trial):
        return dataclasses.replace(trial, state=state, value=None, values={})

    return dataclasses.replace(
        study,
        trials=[
            lose(trial) if trial.cell == cell and when(trial) else trial
            for trial in study.trials
        ],
    )


def plans(lab, shared: float, tuned: float):
    """The confirmation runs of `- muon`: that much worse at one learning rate for all, and at its own."""
    for name, delta in (("lr_width", shared), ("lr_width@tuned", tuned)):
        ours = dataclasses.replace(lab, name=name, metric="val/bits_per_byte", rows=[])
        ours.cell("full", [2.400, 2.401, 2.402], None).cell(
            "- muon", [2.401 + delta, 2.400 + delta, 2.402 + delta]
        ).write()


def test_the_page_holds_winners_width_pictures_and_every_run(lab, tmp_path):
    text = page(lab, tmp_path, search(importance={"full": {LR: 0.8, WIDTH: 0.2}}))
    assert "Does the rate move with width?" in text
    assert "Sampler: grid, pruner: none" in text
    assert "Trials: 48 complete." in text
    assert "`optim.lr` log [0.001, 0.032]; `model.width` one of 32, 64, 128, 256" in text
    assert (
        "| `- muon` | 24 complete | 0.002 | 256 | 2.7440 | interior | 0.002 | 0.002 to 0.002 |"
        in text
    )
    assert (
        "| `- muon` | 256 | 0.002 | 2.7440 | 0.002 [0.002, 0.002] | 2.8240 | evaluated | 0.0800 | -2.0 |"
        in text
    )
    assert "- `full`: beats lr=0.004 (2.7640) and lr=0.016 (2.7640)" in text
    assert "## Read first" not in text
    for picture in ("lr.png", "lr_width.png", "importance.png", "history.png"):
        assert f"]({picture})" in text
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    assert all(
        f"`{run}`" in text.split("## Trials")[1]
        for trial in search().trials
        for run in trial.runs
    )


def test_a_study_of_the_rate_alone_has_no_word_on_width(lab, tmp_path):
    text = page(lab, tmp_path, search(widths=(64,)))
    assert "Learning rate and width" not in text
    assert "lr_width.png" not in text
    assert "each arm's own" not in text


def test_deltas_at_one_rate_and_at_each_arms_own_stand_side_by_side(lab, tmp_path):
    plans(lab, shared=0.2, tuned=0.0)
    text = page(
        lab,
        tmp_path,
        search(
            widths=(64,), optima={"full": lambda width: 0.008, "- muon": lambda width: 0.004}
        ),
    )
    line = next(
        line
        for line in text.split("each arm's own")[1].splitlines()
        if line.startswith("| `- muon`")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1].startswith("+0.2000 [")
    assert cells[2:4] == ["helps", "optim.lr=0.004"]
    assert cells[4].startswith("+0.0000 [")
    assert cells[5:] == ["inconclusive", "-0.2000"]
    assert "`muon`: helps at the shared setting, inconclusive at each arm's own" in text
    assert "`full`, measured against: optim.lr=0.008" in text


def test_without_runs_of_both_plans_nothing_is_compared(lab, tmp_path):
    dataclasses.replace(lab, name="lr_width", metric="val/bits_per_byte", rows=[]).cell(
        "full", [2.4, 2.41], None
    ).write()
    dataclasses.replace(lab, name="lr_width@tuned", metric="val/bits_per_byte", rows=[]).cell(
        "full", ["missing"], None
    ).write()
    assert "each arm's own" not in page(lab, tmp_path, search(widths=(64,)))


def test_an_own_rate_that_won_at_an_edge_is_doubted(lab, tmp_path):
    plans(lab, shared=0.2, tuned=0.1)
    text = page(
        lab,
        tmp_path,
        search(
            widths=(64,), optima={"full": lambda width: 0.008, "- muon": lambda width: 1e-5}
        ),
    )
    assert (
        "- `- muon`: lr=0.001 won, but it is the edge of the searched range [0.001, 0.032]; widen it"
        in text.split("## Winners")[0]
    )
    assert "`- muon` won at an edge: its delta is still that of an untuned arm" in text
    own = study_report.read(lab.store, "lr_width").tuned[1]
    assert own.verdict == "inadmissible"
    assert own.sentence == "muon: inadmissible, a learning rate behind it won at an edge"


def test_lost_running_pruned_and_unequal_trials_are_told_first(lab):
    study = ended(
        ended(search(widths=(64,)), "- muon", "failed"),
        "full",
        "pruned",
        lambda trial: trial.number == 5,
    )
    first = warnings(lab, ended(study, "full", "running", lambda trial: trial.number == 0))
    assert "`- muon`: no trial finished (6 failed)" in first
    assert "(`full` 5, `- muon` 0); the best of more looks better by luck" in first
    assert "1 trials have no result yet; continue with: ablab study lr_width" in first
    assert "1 trials were pruned" in first


def test_diverged_trials_are_effort_spent(lab):
    assert not warnings(
        lab, ended(search(widths=(64,)), "- muon", "diverged", lambda trial: trial.number > 4)
    )


# Sentences about width.


def sentences(study: StudyRecord, seed_sd: float | None = 0.01) -> dict[str, str]:
    return movements(transfer(study), seed_sd)


def test_a_flat_and_a_drifting_rate_in_words():
    says = sentences(search())
    assert says["full"].startswith("the optimum moves by ")
    assert "octaves over 8x width (0.008 at 32 to 0.008 at 256)" in says["full"]
    assert says["full"].endswith(
        "0.008 transfers from width 64: 3 of 3 others within one step, at no cost"
    )
    assert (
        "the optimum moves by -3.00 [-3.00, -3.00] octaves over 8x width (0.016 at 32 to 0.002 at 256)"
        in says["- muon"]
    )
    assert says["- muon"].endswith(
        "0.008 does not transfer from width 64: 2 of 3 others within one step, at most 0.0800 worse (8.0 seed sd)"
    )


@pytest.mark.parametrize(
    ("seed_sd", "verdict"),
    [
        (0.005, "does not transfer"),
        (0.02, "transfers"),
        (None, "may transfer"),
    ],
)
def test_a_gap_is_judged_by_the_seed_sd(seed_sd, verdict):
    says = sentences(
        search(optima={"full": lambda width: 0.004 if width > 64 else 0.008}), seed_sd
    )["full"]
    assert (
        f"0.008 {verdict} from width 64: 3 of 3 others within one step, at most 0.0200 worse"
        in says
    )
    assert ("give the study a second seed" in says) == (seed_sd is None)


def test_the_seed_sd_comes_from_the_search_or_else_from_the_experiments_own_runs(lab):
    moving = {"full": lambda width: 0.004 if width > 64 else 0.008}
    study_record.write(lab.store, search(optima=moving))
    assert "seed sd unknown" in study_report.read(lab.store, "lr_width").moves["full"]
    plans(lab, 0.1, 0.1)
    # The sd of 2.400, 2.401, 2.402 is 0.001.
    assert "(20.0 seed sd)" in study_report.read(lab.store, "lr_width").moves["full"]
    study_record.write(lab.store, search(optima=moving, seeds=("100", "101")))
    # Two seeds 0.004 apart: 0.0028.
    assert "(7.1 seed sd)" in study_report.read(lab.store, "lr_width").moves["full"]


def test_an_edge_at_one_width_withholds_the_verdict():
    assert (
        "not to be read before the winner at width 256 has neighbours"
        in sentences(search(optima={"full": lambda width: 0.008 if width < 256 else 1e-5}))[
            "full"
        ]
    )


def test_a_rate_that_is_lost_at_another_width_does_not_transfer():
    study = ended(
        search(optima={"full": OPTIMA["- muon"]}),
        "full",
        "diverged",
        lambda trial: trial.params[WIDTH] == 256 and trial.params[LR] > 0.004,
    )
    assert (
        "does not transfer from width 64: 2 of 3 others within one step, no loss at width 256"
        in sentences(study)["full"]
    )


# Other faces, refusals.


def test_an_arm_without_an_ingredient_lacks_its_dose(lab, tmp_path):
    dose = "with.z_loss.weight"
    study = search(widths=(64,), importance={"full": {LR: 0.9, dose: 0.1}, "- muon": {}})
    given = [
        dataclasses.replace(trial, params=trial.params | {dose: 1e-4})
        if trial.cell == "full"
        else trial
        for trial in study.trials
    ]
    text = page(
        lab,
        tmp_path,
        dataclasses.replace(
            study, trials=given, space=study.space | {dose: {"log": [1e-5, 1e-3]}}
        ),
    )
    assert "| `full` | 6 complete | 0.008 | 0.0001 |" in text
    assert "| `- muon` | 6 complete | 0.008 | – |" in text
    assert "importance.png" in text


def test_a_diverged_trial_with_one_good_seed_is_read(lab):
    study = search(widths=(64,))
    half = dataclasses.replace(
        study.trials[-1], state="diverged", value=None, values={"100": 2.5, "101": None}
    )
    assert not warnings(lab, dataclasses.replace(study, trials=[*study.trials[:-1], half]))


def test_json_is_strict_and_says_what_the_table_says(lab):
    plans(lab, 0.2, 0.1)
    study = ended(
        search(),
        "- muon",
        "diverged",
        lambda trial: trial.params[WIDTH] == 256 and trial.params[LR] > 0.004,
    )
    study_record.write(lab.store, study)
    data = json.loads(json.dumps(study_report.as_json(lab.store, "lr_width"), allow_nan=False))
    arm = data["arms"][1]
    assert (data["study"], arm["cell"], arm["trials"], arm["winner"]["params"]) == (
        "lr_width",
        "- muon",
        {"complete": 21, "diverged": 3},
        {LR: 0.002, WIDTH: 256},
    )
    assert arm["winner"]["admissible"] is True
    assert arm["winner"]["neighbours"][1]["params"][LR] == 0.004
    assert data["transfer"][-1]["gap"] is None
    assert data["transfer"][0]["gap"] == 0
    assert len(data["trials"]) == 48
    assert data["deltas"][1]["shared"]["delta"] == pytest.approx(0.2)
    assert data["deltas"][1]["tuned"]["delta"] == pytest.approx(0.1)
    (arm,) = study_report.compared(lab.store, "lr_width")
    assert arm["delta, shared setting"].startswith("+0.2000 [")
    assert arm["delta, own setting"].startswith("+0.1000 [")
    rows = study_report.table(lab.store, "lr_width")
    assert rows[1]["trials"] == "21 complete, 3 diverged"
    assert rows[1]["optim.lr"] == "0.002"
    assert rows[0].keys() == rows[1].keys()
    assert all(isinstance(text, str) for row in rows for text in row.values())


def test_a_study_without_finished_trials_and_one_that_does_not_exist_are_refused_in_one_line(
    lab, tmp_path
):
    with pytest.raises(
        UserError, match="study 'nowhere' has no trials in .*ablab study nowhere"
    ):
        study_report.write(lab.store, "nowhere", tmp_path)
    study_record.write(
        lab.store,
        ended(search(widths=(64,), optima={"full": OPTIMA["full"]}), "full", "diverged"),
    )
    with pytest.raises(UserError, match=r"zero finished trials \(6 diverged\)") as refusal:
        study_report.write(lab.store, "lr_width", tmp_path)
    assert "\n" not in str(refusal.value)
