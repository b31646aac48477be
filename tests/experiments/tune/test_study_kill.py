"""Killed at random moments and resumed, a study holds what an uninterrupted one holds; and it finds a known optimum."""

import json
import math
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from ablab.experiments.tune.confirmation import winners

sys.path.append(str(Path(__file__).parent))
import valley  # noqa: E402

SAID = ("before", "after")
FORK = multiprocessing.get_context(
    "fork"
)  # an interpreter that imports Optuna anew takes a second a kill


def killed(root: Path, url: str, block: dict, kills: int) -> tuple[list[dict], list[int]]:
    """The content of a study that was killed `kills` times, and how many runs had ended at each kill."""
    draw = random.Random(7)
    ended: list[int] = []
    while True:
        ours, theirs = FORK.Pipe()
        words = (theirs, root, url, block, 0.01)
        process = FORK.Process(target=valley.coordinate, args=words)
        process.start()
        theirs.close()
        if len(ended) == kills:
            while (said := ours.recv()) in SAID:
                ours.send("go on")
            process.join(timeout=120)
            assert process.exitcode == 0
            return said, ended
        # It speaks before and after each run and each stored trial: 4 words a trial.
        for _ in range(draw.randint(1, 14)):
            assert ours.recv() in SAID
            ours.send("go on")  # it goes as far as its next word, and no farther
        time.sleep(draw.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done too soon"
        ended.append(len(list((root / "store" / "runs").glob("*/result.json"))))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("storage", "kills", "block"),
    [
        (
            "sqlite",
            20,
            {"sampler": "tpe", "trials_per_cell": 24, "hard": {"optim.lr": [0.0001, 0.5]}},
        ),
        ("journal", 10, {"sampler": "tpe", "trials_per_cell": 24, "pruner": "median"}),
        (
            "sqlite",
            10,
            {
                "sampler": "random",
                "trials_per_cell": 24,
                "pruner": "hyperband",
                "generation": 3,
            },
        ),
    ],
)
def test_a_study_killed_again_and_again_holds_the_trials_of_an_uninterrupted_one(
    tmp_path, storage, kills, block
):
    """Ids, parameters, values, curves, states and their order, for both cells; no trial twice."""
    held, _, _ = valley.tune(tmp_path / "whole", block, **valley.TWO_CELLS)
    whole = json.loads(json.dumps(valley.content(held)))
    url = {"sqlite": f"sqlite:///{tmp_path}/a.db", "journal": f"journal:{tmp_path}/a.journal"}[
        storage
    ]
    found, ended = killed(tmp_path / "killed", url, block, kills)
    assert found == whole
    assert len(ended) == kills
    assert len(set(ended)) >= 4  # the kills were spread over the search
    assert ended[-1] < len(whole)
    assert len(found) >= 48
    assert len({(one["arm"], one["number"]) for one in found}) == len(found)
    states = {one["attrs"]["state"] for one in found}
    assert states >= {"complete", "pruned" if "pruner" in block else "failed"}


def test_a_study_cut_between_two_stored_trials_of_a_generation_goes_on_with_the_rest(
    tmp_path, monkeypatch
):
    block = {"sampler": "tpe", "trials_per_cell": 12, "pruner": "asha"}
    whole, _, _ = valley.tune(tmp_path / "whole", block)
    real = valley.study.CellSearch.tell
    told: list[int | None] = []

    def stop_now_and_then(search, candidate, store):
        if len(told) % 3 == 2:
            told.append(None)
            raise KeyboardInterrupt
        told.append(candidate.number)
        real(search, candidate, store)

    monkeypatch.setattr(valley.study.CellSearch, "tell", stop_now_and_then)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            valley.tune(tmp_path / "cut", block)
    monkeypatch.undo()
    cut, _, _ = valley.tune(tmp_path / "cut", block)
    assert [number for number in told if number is not None] == list(range(10))
    assert valley.content(cut) == valley.content(whole)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_study_finds_a_known_optimum(tmp_path, sampler):
    """In 24 trials of two paths: the best width, half an octave from its rate, 0.0125 from its loss."""
    _, record, _ = valley.tune(tmp_path, {"sampler": sampler, "trials_per_cell": 24})
    best = best_of(record.trials)
    assert best.params["model.width"] == 64
    optimum, loss = valley.OPTIMUM / 4, valley.BEST - 0.1  # of that width
    assert abs(math.log2(best.params["optim.lr"] / optimum)) < 0.5
    assert best.value < loss + 0.0125


def best_of(trials):
    finished = [trial for trial in trials if trial.value is not None]
    return min(finished, key=lambda trial: trial.value)


@pytest.mark.parametrize("pruner", ["none", "median", "asha", "hyperband"])
def test_results_do_not_depend_on_the_order_in_which_runs_end(tmp_path, pruner):
    block = {"sampler": "tpe", "trials_per_cell": 16, "pruner": pruner, "generation": 4}
    one, _, _ = valley.tune(tmp_path / "one", block, jobs=1)
    many, _, _ = valley.tune(tmp_path / "many", block, jobs=7)
    assert valley.content(one) == valley.content(many)
    states = {trial["state"] for trial in valley.content(one)}
    assert ("PRUNED" in states) == (pruner != "none")


def test_a_verdict_that_comes_too_late_for_a_run_changes_no_trial(tmp_path, monkeypatch):
    """A worker hears of it a log or more later, and a short run may end before: the trial is what its curve says."""
    block = {"sampler": "tpe", "trials_per_cell": 16, "pruner": "median"}
    prompt, _, _ = valley.tune(tmp_path / "prompt", block)
    monkeypatch.setattr(valley.study.Generation, "stops", lambda *_: False)
    late, _, _ = valley.tune(tmp_path / "late", block)
    assert shorn(valley.content(late)) == shorn(valley.content(prompt))
    ended = {
        late.store.run(id).result().status
        for one in late.searches[0].stored
        for id in one.user_attrs["told"]["runs"]
    }
    assert "finished" in ended and "pruned" not in ended


def shorn(trials: list[dict]) -> list[dict]:
    """Without the final metrics of the runs, and the seal over them."""
    return [one | {"attrs": one["attrs"] | {"values": None, "seal": None}} for one in trials]


def test_a_second_coordinator_is_refused_while_the_first_runs(tmp_path):
    held, _, _ = valley.tune(tmp_path, {"sampler": "random", "trials_per_cell": 4})
    before = valley.content(held)
    with (
        held._alone(),
        pytest.raises(
            valley.UserError, match="another process tunes valley in .*; wait for it"
        ),
    ):
        valley.tune(tmp_path, {"sampler": "random", "trials_per_cell": 8})
    assert valley.content(held) == before


def test_an_hour_spent_starts_no_generation_and_the_next_call_goes_on(tmp_path):
    block = {"sampler": "random", "trials_per_cell": 8}
    _, record, said = valley.tune(tmp_path, block | {"hours": 0.0})
    assert record.trials == [] and said == [
        "stopped after 0.0 h with 4 proposed trials open; the same command goes on"
    ]
    assert len(valley.tune(tmp_path, block)[1].trials) == 8


def test_after_each_run_the_arms_stand_as_the_storage_will_say(tmp_path):
    held, record, _ = valley.tune(
        tmp_path, {"sampler": "tpe", "trials_per_cell": 12}, **valley.TWO_CELLS
    )
    stood = held.watcher.stood
    assert stood[0][0].total == 12
    done = [sum(line.done for line in lines) for lines in stood]
    assert done == sorted(done)
    assert set(done) == set(range(25))  # one more with every run
    assert [line.cell for line in stood[-1]] == list(record.cells)
    for line in stood[-1]:
        spent = record.cells[line.cell]
        best = best_of(spent)
        assert (line.best, line.at, line.done) == (best.value, best.params, 12)
        unfinished = [trial for trial in spent if trial.state != "complete"]
        assert sum(line.ends.values()) == len(unfinished)


def test_arms_are_confirmed_at_the_experiments_own_width_each_at_its_best_rate_there(tmp_path):
    block = {
        "space": {
            "optim.lr": {"log": [1.5e-3, 2.4e-2], "points": 5},
            "model.width": {"choices": [16, 32, 64]},
        },
        "sampler": "grid",
    }
    held, record, _ = valley.tune(tmp_path, block, **valley.TWO_CELLS)
    assert {best_of(spent).params["model.width"] for spent in record.cells.values()} == {64}
    assert winners(held.experiment, record, held.watcher) == {
        "base": {"optim.lr": 0.012, "model.width": 16},
        "+ qk_norm": {"optim.lr": 0.024, "model.width": 16},
    }
