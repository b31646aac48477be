"""The runner, through the command line: what a grid leaves behind, and what a second call adds to it."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import get_args, get_type_hints

import pytest

from ablab.core.runtime.runtime import Runtime, visible_gpus
from ablab.core.store.record import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY
from ablab.experiments.plan.sheets import Metric
from ablab.experiments.run.capacity import default_jobs

CELLS = ["full", "base", "- qk_norm", "- value_residual"]

# Interventions of a user's own: each multiplies the head outputs by `how(...)`.
PLUGIN = '''
"""{name}."""
from ablab.core.language.declare import Stage
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register
from ablab.core.language.part import Part


@register("{name}", slots=("model.attention.on_heads",), off="nothing", source="a test")
class {name}(Part):
    """A test."""

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_heads", append(self))

    def build(self, where):
        return Stage(stage)


def stage(y, x):
    {body}
'''
COUNT = """
    import os, torch
    if torch.is_grad_enabled():
        with open({path!r}, "ab", buffering=0) as file:  # one byte a forward pass, appended in one step
            file.write(b".")
    return y * 0.9
"""


WHO = """
    import os, time, torch
    if torch.is_grad_enabled():
        with open({path!r}, "ab", buffering=0) as file:  # who trains, a line a forward pass
            file.write(b"%d\\n" % os.getpid())
        until = time.monotonic() + 60  # for the other: both train at once, if they may
        while time.monotonic() < until and len(set(open({path!r}).read().split())) < 2:
            time.sleep(0.01)
        time.sleep(0.01)
    return y * 0.9
"""


def plugin(lab, name: str, body: str) -> None:
    (lab.root / "plugins").mkdir(exist_ok=True)
    (lab.root / "plugins" / f"{name}.py").write_text(
        PLUGIN.format(name=name, body=body.strip())
    )


@pytest.fixture(scope="module")
def first(lab):
    """Two seeds of a leave-one-out grid, one worker."""
    ended = lab.run("run", lab.sheet("grid"), "--jobs", "1", "--no-mlflow")
    assert ended.code == 0, ended.err
    return ended


# -- a grid ------------------------------------------------------------------------------------------------------------
def test_a_grid_leaves_results_a_plan_and_a_report(lab, first):
    plan = json.loads((lab.store / "experiments" / "grid.json").read_text())
    assert [(row["cell"], row["pair"]) for row in plan["rows"]] == [
        (cell, seed) for seed in (0, 1) for cell in CELLS
    ]
    results = lab.results("grid")
    assert len(results) == 8 and {result["status"] for result in results.values()} == {FINISHED}
    assert {result["step"] for result in results.values()} == {20} and len(
        {result["weights"] for result in results.values()}
    ) == 8
    report = (lab.store / "reports" / "grid" / "report.md").read_text()
    assert all(f"`{cell}`" in report for cell in CELLS) and "Does it run?" in first.out


def test_a_run_folder_is_complete_and_holds_no_litter(lab, first):
    for folder in (lab.store / "runs").iterdir():
        assert {path.name for path in folder.iterdir()} - {".lock"} == {
            "recipe.yaml",
            "run.json",
            "metrics.jsonl",
            "pace.jsonl",
            "result.json",
        }
        steps = [
            json.loads(line)["step"]
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == [5, 10, 15, 20]


def test_output_that_is_no_terminal_is_plain_lines(lab, first):
    assert "\x1b" not in first.out + first.err and "\r" not in first.out + first.err
    assert (
        "[8/8]" in first.err and "8 runs: 0 done already, 8 to train, 1 at a time" in first.err
    )


def test_every_metric_that_a_sheet_may_name_is_one_that_a_run_leaves(lab, first):
    names = set(get_args(get_type_hints(Metric)["name"]))
    assert names and all(
        names <= result["metrics"].keys() for result in lab.results("grid").values()
    )


def test_asked_twice_it_trains_nothing_and_says_so(lab, first, ablab):
    before = {name: stat for name, stat in lab.files().items() if name.startswith("runs/")}
    ended = ablab("run", "grid.yaml", "--no-mlflow")
    assert (
        ended.code == 0
        and "8 runs: 8 done already, nothing to train" in ended.err
        and "val/loss" not in ended.err
    )
    assert {
        name: stat for name, stat in lab.files().items() if name.startswith("runs/")
    } == before
    assert ended.out == first.out


def test_asked_twice_it_loads_no_torch_and_starts_no_process(lab, first):
    code = (
        "import sys, multiprocessing.process as m; from ablab.experiments.cli import main as cli; sys.argv = ['ablab', 'run', 'grid.yaml', '--no-mlflow', '--json']\n"
        "try: cli.main()\nfinally: print({'torch', 'mlflow'} & set(sys.modules), m.active_children(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=lab.root,
        env=os.environ | {"ABLAB_STORE": str(lab.store)},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and done.stderr == "set() []\n"
        and json.loads(done.stdout)["outcome"]["trained"] == []
    )


def test_another_number_of_workers_gives_the_same_bits(lab, first, new_lab):
    other = new_lab()
    ended = other.run(
        "run",
        other.sheet("grid"),
        "--jobs",
        "2",
        "--no-mlflow",
        "--seeds",
        "0-1",
        "--json",
        "--quiet",
    )
    assert ended.code == 0 and ended.err == "" and len(ended.json["outcome"]["trained"]) == 8
    here, there = lab.results("grid"), other.results("grid")
    assert {key: result["weights"] for key, result in here.items() if key[1] < 2} == {
        key: result["weights"] for key, result in there.items()
    }
    for result in there.values():
        path = f"runs/{result['run']}/metrics.jsonl"
        assert (lab.store / path).read_bytes() == (other.store / path).read_bytes()


def test_seeds_added_later_extend_the_plan_and_the_report(lab, first, ablab):
    ended = lab.run(
        "run",
        "grid.yaml",
        "--seeds",
        "2",
        "--only",
        "full",
        "--only",
        "base",
        "--no-mlflow",
        "--jobs",
        "1",
        "--json",
    )
    assert (
        ended.code == 0
        and len(ended.json["outcome"]["trained"]) == 2
        and ended.json["outcome"]["reused"] == []
    )
    pairs = {effect["cell"]: effect["n"] for effect in ended.json["effects"]}
    assert pairs == {"full": 3, "base": 3, "- qk_norm": 2, "- value_residual": 2}
    plan = json.loads((lab.store / "experiments" / "grid.json").read_text())
    assert len(plan["rows"]) == 12 and {row["pair"] for row in plan["rows"]} == {0, 1, 2}
    ablab(
        "run", "grid.yaml", "--no-mlflow", "--quiet"
    )  # the file's own seeds again: nobody forgets seed 2
    assert len(json.loads((lab.store / "experiments" / "grid.json").read_text())["rows"]) == 12


def test_a_report_can_be_asked_for_later_by_name_or_by_file(lab, first, ablab):
    by_name, by_file = (
        ablab("report", "grid", "--json").json,
        ablab("report", "grid.yaml", "--json").json,
    )
    assert by_name == by_file and [effect["cell"] for effect in by_name["effects"]] == CELLS
    assert (
        "grid" in ablab("report", "grad").err
        and "experiment 'grid@optim.lr=0.5' has no runs"
        in ablab("report", "grid.yaml", "optim.lr=0.5").err
    )


def test_an_override_is_an_experiment_of_its_own_and_shares_what_is_equal(lab, first):
    ended = lab.run(
        "run",
        "grid.yaml",
        "with.qk_norm.scale=2.0",
        "--seeds",
        "0",
        "--no-mlflow",
        "--jobs",
        "1",
        "--json",
    )
    assert ended.code == 0 and ended.json["experiment"] == "grid@with.qk_norm.scale=2"
    assert (
        len(ended.json["outcome"]["trained"]) == 2 and len(ended.json["outcome"]["reused"]) == 2
    )  # base and `- qk_norm` have no such dose
    assert {result["status"] for result in lab.results("grid").values()} == {FINISHED}


# -- interventions of one's own ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def own(new_lab):
    """An arm from the template and one that computes nothing new."""
    lab = new_lab()
    written = lab.run("new", "intervention", "my_idea", "--folder", "plugins")
    assert written.code == 0 and (lab.root / "plugins" / "my_idea.py").exists()
    plugin(lab, "nothing", "return y * 1.0")
    lab.sheet("own", **{"with": ["my_idea", "nothing"], "design": "add_one", "seeds": [0]})
    return lab, lab.run(
        "run", "own.yaml", "--plugins", "plugins", "--no-mlflow", "--jobs", "1", "--json"
    )


def test_an_intervention_from_a_plugin_folder_trains_in_a_worker(own):
    lab, ended = own
    assert ended.code == 0 and {effect["cell"] for effect in ended.json["effects"]} >= {
        "base",
        "+ my_idea",
    }
    results = lab.results("own")
    assert (
        results["+ my_idea", 0]["status"] == FINISHED
        and results["+ my_idea", 0]["weights"] != results["base", 0]["weights"]
    )


def test_an_arm_that_computes_its_references_bits_is_named_and_not_trained(own):
    lab, ended = own
    assert "INERT: + nothing computes the same bits as base" in ended.err and ended.json[
        "outcome"
    ]["inert"] == {"+ nothing": "base"}
    assert ("+ nothing", 0) not in lab.results("own")
    again = lab.run("run", "own.yaml", "--plugins", "plugins", "--no-mlflow")
    assert (
        again.code == 0 and "INERT: + nothing" in again.err and "alive" not in again.err
    )  # remembered: no worker is started for it


def test_an_edited_intervention_is_another_run_and_its_liveness_is_asked_anew(own):
    lab, _ = own
    before = lab.results("own")
    plugin(lab, "nothing", "return y * 0.5")
    ended = lab.run(
        "run", "own.yaml", "--plugins", "plugins", "--no-mlflow", "--jobs", "1", "--json"
    )
    assert (
        ended.code == 0
        and ended.json["outcome"]["inert"] == {}
        and len(ended.json["outcome"]["trained"]) == 1
    )
    assert lab.results("own")["base", 0] == before["base", 0] and (
        "+ nothing",
        0,
    ) in lab.results("own")


def test_an_operation_that_cannot_repeat_its_bits_names_the_cure(new_lab):
    lab = new_lab()
    plugin(
        lab,
        "scatters",
        "import torch; return y + y.new_zeros(3).put_(torch.tensor([0]), y.new_zeros(1)).sum()",
    )
    lab.sheet(
        "strict",
        **{
            "with": ["scatters"],
            "design": "replicate",
            "seeds": [0],
            "runtime": {"deterministic": True},
        },
    )
    words = (
        "run",
        "strict.yaml",
        "--plugins",
        "plugins",
        "--no-mlflow",
        "--jobs",
        "1",
        "--run-inert",
    )
    refused, allowed = lab.run(*words), lab.run(*words, "runtime.deterministic=false")
    assert (
        refused.code == 1
        and "put_ does not have a deterministic implementation; run it with runtime.deterministic=false"
        in refused.err
    )
    assert allowed.code == 0, allowed.err


# -- failures are data -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def broken(new_lab):
    """Four arms, three of which end badly, in different ways."""
    lab = new_lab()
    plugin(lab, "explodes", "return y / 0")
    plugin(
        lab,
        "crashes",
        'import torch; torch.Tensor.backward = None; raise ValueError("the shapes of my idea")',
    )  # and poisons its process
    plugin(lab, "swells", 'import torch; raise torch.OutOfMemoryError("CUDA out of memory")')
    lab.sheet(
        "broken",
        **{
            "with": ["explodes", "crashes", "swells", "qk_norm"],
            "design": "add_one",
            "seeds": [0],
        },
    )
    return lab, lab.run(
        "run",
        "broken.yaml",
        "--plugins",
        "plugins",
        "--no-mlflow",
        "--jobs",
        "1",
        "--run-inert",
        "--json",
    )


def test_what_ends_badly_is_recorded_and_the_grid_goes_on(broken):
    lab, ended = broken
    statuses = {cell: result["status"] for (cell, _), result in lab.results("broken").items()}
    assert statuses == {
        "base": FINISHED,
        "+ explodes": DIVERGED,
        "+ crashes": FAILED,
        "+ swells": OUT_OF_MEMORY,
        "+ qk_norm": FINISHED,
    }
    assert ended.code == 1 and "Traceback" not in ended.err
    assert [line.split(":")[0:2] for line in ended.err.splitlines()] == [
        ["+ explodes, seed 0", " DIVERGED"],
        ["+ crashes, seed 0", " FAILED"],
        ["+ swells, seed 0", " OUT_OF_MEMORY"],
    ]
    assert (
        len(ended.json["outcome"]["failed"]) == 2 and len(ended.json["outcome"]["trained"]) == 3
    )


def test_a_diverged_run_says_when_and_how_good_it_was(broken):
    result = broken[0].results("broken")["+ explodes", 0]
    assert (
        result["step"] == 5
        and "at step 5" in result["error"]
        and "last good loss was 4.1589" in result["error"]
    )  # ln 64: none was logged


def test_a_crash_leaves_its_traceback_beside_the_record(broken):
    lab, _ = broken
    result = lab.results("broken")["+ crashes", 0]
    assert result["error"].startswith("ValueError: the shapes of my idea (see ")
    assert (
        "plugins/crashes.py" in (lab.store / "runs" / result["run"] / "error.txt").read_text()
    )


def test_lack_of_memory_names_the_micro_batch_to_try(broken):
    assert "try runtime.micro_batch=2" in broken[0].results("broken")["+ swells", 0]["error"]


def test_asked_again_failures_are_tried_again_and_divergence_is_not(broken):
    """Damage to what the first call left is named, set aside and mended in the same call."""
    lab, _ = broken
    before = lab.results("broken")
    (lab.store / "runs" / before["+ qk_norm", 0]["run"] / "result.json").write_text(
        '{"run": "torn'
    )
    (lab.store / "experiments" / "broken.json").write_text('{"name": "br')
    ended = lab.run(
        "run",
        "broken.yaml",
        "--plugins",
        "plugins",
        "--no-mlflow",
        "--jobs",
        "1",
        "--run-inert",
        "--json",
    )
    after = lab.results("broken")
    assert (
        ended.code == 1
        and len(ended.json["outcome"]["failed"]) == 2
        and ended.json["outcome"]["trained"] == [before["+ qk_norm", 0]["run"]]
    )
    assert (
        "result.json is damaged" in ended.err
        and "broken.json is damaged" in ended.err
        and "set aside as broken.json.damaged" in ended.err
    )
    assert (
        after["+ qk_norm", 0]["weights"] == before["+ qk_norm", 0]["weights"]
        and after["+ explodes", 0] == before["+ explodes", 0]
    )


def test_when_no_run_finishes_there_is_no_verdict_and_no_crash(new_lab):
    lab = new_lab()
    lab.sheet(
        "lost",
        **{
            "with": [],
            "design": "replicate",
            "seeds": [0],
            "set": {"optim.lr": 1e30, "optim.clip": None},
        },
    )
    ended = lab.run("run", "lost.yaml", "--no-mlflow", "--jobs", "1")
    assert (
        ended.code == 0
        and "no verdict: experiment 'lost' has no finished run (2 diverged)" in ended.err
        and "Traceback" not in ended.err
    )
    again = lab.run("run", "lost.yaml", "--no-mlflow", "--json")
    assert (
        again.code == 0 and again.json["effects"] == [] and "nothing to train" not in again.out
    )


# -- two at once -------------------------------------------------------------------------------------------------------
def test_two_calls_at_once_train_each_run_once_and_both_end_well(new_lab):
    """Counted where it happens: one byte for each training forward pass of each of the two layers."""
    lab = new_lab()
    count = lab.root / "forwards"
    plugin(lab, "counts", COUNT.format(path=str(count)))
    lab.sheet("twice", **{"with": ["counts"], "design": "replicate", "seeds": [0, 1, 2]})
    words = (
        "run",
        "twice.yaml",
        "--plugins",
        "plugins",
        "--no-mlflow",
        "--jobs",
        "1",
        "--run-inert",
        "--json",
    )
    with ThreadPoolExecutor(2) as both:
        one, two = both.map(lambda _: lab.run(*words), range(2))
    assert one.code == two.code == 0 and one.json["effects"] == two.json["effects"]
    trained, others = one.json["outcome"]["trained"], two.json["outcome"]["trained"]
    assert (
        sorted(trained + others)
        == sorted(result["run"] for result in lab.results("twice").values())
        and len(trained + others) == 6
    )
    assert count.stat().st_size == 6 * 20 * 2


@pytest.mark.parametrize(
    ("device", "asked", "turns"),
    [("auto", True, True), ("auto", False, False), ("cpu", True, False)],
)
def test_jobs_that_share_a_gpu_train_in_turn_and_elsewhere_at_once(
    new_lab, monkeypatch, device, asked, turns
):
    """Two runs of 20 steps, two layers each, and on the GPU a rehearsal of one step before a worker's first turn.

    The two lines of one worker's rehearsal may fall anywhere among the other's: four changes, and one between the runs.
    The first forward pass of one waits for that of the other: in turn that is the rehearsal's.
    """
    lab = new_lab()
    who = lab.root / "who"
    plugin(lab, "who", WHO.format(path=str(who)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    lab.sheet(
        "shared",
        **{
            "with": ["who"],
            "design": "replicate",
            "seeds": [0],
            "runtime": {"device": device, "turns": asked, "compile": False, "replay": False},
        },
    )
    ended = lab.run(
        "run",
        "shared.yaml",
        "--plugins",
        "plugins",
        "--no-mlflow",
        "--jobs",
        "2",
        "--run-inert",
    )
    assert ended.code == 0, ended.err
    trained = who.read_text().split()
    changes = sum(one != other for one, other in itertools.pairwise(trained))
    assert len(set(trained)) == 2 and len(trained) == 2 * 2 * (20 + turns)
    assert changes <= 5 if turns else changes > 10


def test_no_gpu_is_counted_beyond_a_minus_one(monkeypatch):
    """As CUDA reads the list; `-1` alone is how people say that there is none."""
    for listed, seen in {
        "-1": [],
        "": [],
        "0": ["0"],
        "2, 3": ["2", "3"],
        "1,-1,0": ["1"],
        "GPU-12,MIG-3": ["GPU-12", "MIG-3"],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert visible_gpus() == seen, listed


def test_as_many_jobs_as_gpus_unless_they_do_not_take_turns(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
    jobs = {}
    for listed, threads in (("0", 1), ("0,1", 1), ("0", 8), ("0", 32), ("-1", 1), ("-1", 32)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        jobs[listed, threads] = [
            default_jobs(Runtime(threads=threads, turns=turns)) for turns in (True, False)
        ]
    assert jobs == {
        ("0", 1): [1, 4],
        ("0,1", 1): [2, 8],
        ("0", 8): [1, 2],
        ("0", 32): [1, 1],
        ("-1", 1): [16, 16],
        ("-1", 32): [1, 1],
    }


def test_a_forecast_knows_that_jobs_take_turns_on_a_gpu(new_lab, monkeypatch):
    lab, seconds = new_lab(), {}
    kinds = {
        "in turn": {"device": "auto"},
        "at once": {"device": "auto", "turns": False},
        "cpu": {"device": "cpu"},
    }
    for kind, runtime in kinds.items():
        lab.sheet("asked", runtime=runtime)
        for gpus in ("0", "0,1"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
            for jobs in (1, 2, 4):
                seconds[kind, gpus, jobs] = lab.run(
                    "run", "asked.yaml", "--dry-run", "--jobs", str(jobs), "--json"
                ).json["seconds"]
    halves = {
        key: round(seconds[key[0], key[1], 1] / value, 6) for key, value in seconds.items()
    }
    assert halves == {
        (kind, g, jobs): min(jobs, len(g.split(",")) if kind == "in turn" else jobs)
        for kind, g, jobs in seconds
    }


