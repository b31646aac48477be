"""The runner, through the command line: what a grid leaves behind, and what a second call adds to it."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from ablab.core.runtime.runtime import Runtime, visible_gpus
from ablab.core.store.metrics import LOGGED
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, Result
from ablab.experiments.run.capacity import default_jobs

CELLS = ["full", "base", "- qk_norm", "- value_residual"]
A_AND_B = {"design": "replicate", "seeds": [0]}  # two runs of one recipe
QUICK = ("--no-mlflow", "--jobs", "1")
OWN = ("--plugins", "plugins", *QUICK)  # with interventions of one's own

# An intervention of a user's own: it multiplies the head outputs by `how(...)`.
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
    source = PLUGIN.format(name=name, body=body.strip())
    path = lab.root / "plugins" / f"{name}.py"
    path.write_text(source)


def each(key: str, rows) -> list:
    """That key of the effects of a report, of results, or of the rows of a plan."""
    return [row[key] for row in rows]


def weights(results, pairs) -> dict:
    return {
        (cell, pair): result["weights"]
        for (cell, pair), result in results.items()
        if pair in pairs
    }


def metrics_of(lab, id: str) -> bytes:
    return (lab.run_folder(id) / "metrics.jsonl").read_bytes()


def only_runs(files) -> dict:
    return {name: stat for name, stat in files.items() if name.startswith("runs/")}


@pytest.fixture(scope="module")
def first(lab):
    """Two seeds of a leave-one-out grid, one worker."""
    ended = lab.run("run", lab.sheet("grid"), *QUICK)
    assert ended.code == 0, ended.err
    return ended


# -- a grid ------------------------------------------------------------------------------------------------------------
def test_a_grid_leaves_results_a_plan_and_a_report(lab, first):
    rows = lab.plan("grid")
    assert each("cell", rows) == CELLS + CELLS
    assert each("pair", rows) == [0] * 4 + [1] * 4
    results = lab.results("grid").values()
    assert each("status", results) == [FINISHED] * 8
    assert each("step", results) == [20] * 8
    assert len(set(each("weights", results))) == 8
    folder = lab.store / "reports" / "grid"
    report = (folder / "report.md").read_text()
    assert all(f"`{cell}`" in report for cell in CELLS)
    assert "Does it run?" in first.out


def test_a_run_folder_is_complete_and_holds_no_litter(lab, first):
    logs = {"metrics.jsonl", "pace.jsonl"}
    complete = {"recipe.yaml", "run.json", "held_out.npz", "result.json"} | logs
    for folder in (lab.store / "runs").iterdir():
        assert {path.name for path in folder.iterdir()} - {".claim"} == complete
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert each("step", map(json.loads, lines)) == [5, 10, 15, 20]


def test_output_that_is_no_terminal_is_plain_lines(lab, first):
    printed = first.out + first.err
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert "[8/8]" in first.err
    assert "8 runs: 0 done already, 8 to train, 1 at a time" in first.err


def test_every_metric_that_a_sheet_may_name_is_one_that_a_run_leaves(lab, first):
    for found in lab.results("grid").values():
        assert set(LOGGED) == found["metrics"].keys()
        result = msgspec.convert(found, Result)
        for name in ("tokens_per_second", "seconds"):
            assert (result.final(name) or 0) > 0
        assert result.final("peak_bytes") is None  # of a CPU


def test_asked_twice_it_trains_nothing_and_says_so(lab, first, ablab):
    before = only_runs(lab.files())
    ended = ablab("run", "grid.yaml", "--no-mlflow")
    assert ended.code == 0
    assert "8 runs: 8 done already, nothing to train" in ended.err
    assert "val/loss" not in ended.err
    assert only_runs(lab.files()) == before
    assert ended.out == first.out


def test_asked_twice_it_loads_no_torch_and_starts_no_process(lab, first):
    code = """
import sys, multiprocessing.process as processes
from ablab.experiments.cli import main as cli
sys.argv = ["ablab", "run", "grid.yaml", "--no-mlflow", "--json"]
try:
    cli.main()
finally:
    print({"torch", "mlflow"} & set(sys.modules), processes.active_children(), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=lab.root,
        env=os.environ | {"ABLAB_STORE": str(lab.store)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == "set() []\n"
    told = json.loads(done.stdout)
    assert told["outcome"]["trained"] == []


def test_another_number_of_workers_gives_the_same_bits(lab, first, new_lab):
    other = new_lab()
    two_workers = ("--no-mlflow", "--jobs", "2", "--json", "--quiet")
    other.sheet("grid")
    ended = other.run("run", "grid.yaml", "--seeds", "0-1", *two_workers)
    assert ended.code == 0
    assert ended.err == ""
    assert len(ended.trained) == 8
    here = lab.results("grid")
    there = other.results("grid")
    assert weights(here, pairs=(0, 1)) == weights(there, pairs=(0, 1))
    assert all(one["contended"].startswith("2 runs at once") for one in there.values())
    assert not any("at once" in one["contended"] for one in here.values())
    for id in each("run", there.values()):
        assert metrics_of(lab, id) == metrics_of(other, id)


def test_seeds_added_later_extend_the_plan_and_the_report(lab, first, ablab):
    two_cells = ("--only", "full", "--only", "base")
    ended = lab.run("run", "grid.yaml", "--seeds", "2", *two_cells, *QUICK, "--json")
    assert ended.code == 0
    assert len(ended.trained) == 2
    assert ended.reused == []
    pairs = {effect["cell"]: effect["n"] for effect in ended.json["effects"]}
    assert pairs == {"full": 3, "base": 3, "- qk_norm": 2, "- value_residual": 2}
    rows = lab.plan("grid")
    assert len(rows) == 12
    assert set(each("pair", rows)) == {0, 1, 2}
    # the file's own seeds again: nobody forgets seed 2
    ablab("run", "grid.yaml", "--no-mlflow", "--quiet")
    assert len(lab.plan("grid")) == 12


def test_a_report_can_be_asked_for_later_by_name_or_by_file(lab, first, ablab):
    by_name = ablab("report", "grid", "--json").json
    by_file = ablab("report", "grid.yaml", "--json").json
    assert by_name == by_file
    assert each("cell", by_name["effects"]) == CELLS
    assert "grid" in ablab("report", "grad").err
    lacking = "experiment 'grid@optim.lr=0.5' has no runs"
    assert lacking in ablab("report", "grid.yaml", "optim.lr=0.5").err


def test_an_override_is_an_experiment_of_its_own_and_shares_what_is_equal(lab, first):
    dose = "with.qk_norm.scale=2.0"
    ended = lab.run("run", "grid.yaml", dose, "--seeds", "0", *QUICK, "--json")
    assert ended.code == 0
    assert ended.json["experiment"] == "grid@with.qk_norm.scale=2"
    assert len(ended.trained) == 2
    assert len(ended.reused) == 2  # base and `- qk_norm` have no such dose
    results = lab.results("grid").values()
    assert set(each("status", results)) == {FINISHED}


# -- interventions of one's own ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def own(new_lab):
    """An arm from the template and one that computes nothing new."""
    lab = new_lab()
    written = lab.run("new", "intervention", "my_idea", "--folder", "plugins")
    assert written.code == 0
    assert (lab.root / "plugins" / "my_idea.py").exists()
    plugin(lab, "nothing", "return y * 1.0")
    lab.sheet("own", arms=["my_idea", "nothing"], design="add_one", seeds=[0])
    return lab, lab.run("run", "own.yaml", *OWN, "--json")


def test_an_intervention_from_a_plugin_folder_trains_in_a_worker(own):
    lab, ended = own
    assert ended.code == 0
    cells = each("cell", ended.json["effects"])
    assert {"base", "+ my_idea"} <= set(cells)
    idea = lab.result("own", "+ my_idea")
    base = lab.result("own", "base")
    assert idea["status"] == FINISHED
    assert idea["weights"] != base["weights"]


def test_an_arm_that_computes_its_references_bits_is_named_and_not_trained(own):
    lab, ended = own
    assert "INERT: + nothing shows no difference from base, in the schedule," in ended.err
    inert = ended.json["outcome"]["inert"]
    assert inert == {"+ nothing": "base"}
    assert ("+ nothing", 0) not in lab.results("own")
    again = lab.run("run", "own.yaml", "--plugins", "plugins", "--no-mlflow")
    assert again.code == 0
    assert "INERT: + nothing" in again.err
    assert "alive" not in again.err  # remembered: no worker is started for it


def test_an_edited_intervention_is_another_run_and_its_liveness_is_asked_anew(own):
    lab, _ = own
    before = lab.results("own")
    plugin(lab, "nothing", "return y * 0.5")
    ended = lab.run("run", "own.yaml", *OWN, "--json")
    assert ended.code == 0
    assert ended.json["outcome"]["inert"] == {}
    assert len(ended.trained) == 1
    after = lab.results("own")
    assert after["base", 0] == before["base", 0]
    assert ("+ nothing", 0) in after


def test_an_operation_that_cannot_repeat_its_bits_names_the_cure(new_lab):
    lab = new_lab()
    scatter = "y.new_zeros(3).put_(torch.tensor([0]), y.new_zeros(1))"
    plugin(lab, "scatters", f"import torch; return y + {scatter}.sum()")
    strict = {"deterministic": True}
    lab.sheet("strict", arms=["scatters"], runtime=strict, **A_AND_B)
    words = ("run", "strict.yaml", *OWN, "--run-inert")
    refused = lab.run(*words)
    allowed = lab.run(*words, "runtime.deterministic=false")
    assert refused.code == 1
    cure = "run it with runtime.deterministic=false"
    assert f"put_ does not have a deterministic implementation; {cure}" in refused.err
    assert allowed.code == 0, allowed.err


# -- failures are data -------------------------------------------------------------------------------------------------
BROKEN = ("run", "broken.yaml", *OWN, "--run-inert", "--json")


@pytest.fixture(scope="module")
def broken(new_lab):
    """Four arms, three of which end badly, in different ways."""
    lab = new_lab()
    poison = "import torch; torch.Tensor.backward = None"  # its process is fit for nothing more
    plugin(lab, "explodes", "return y / 0")
    plugin(lab, "crashes", f'{poison}; raise ValueError("the shapes of my idea")')
    plugin(lab, "swells", 'import torch; raise torch.OutOfMemoryError("CUDA out of memory")')
    arms = ["explodes", "crashes", "swells", "qk_norm"]
    lab.sheet("broken", arms=arms, design="add_one", seeds=[0])
    return lab, lab.run(*BROKEN)


def test_what_ends_badly_is_recorded_and_the_grid_goes_on(broken):
    lab, ended = broken
    results = lab.results("broken")
    assert {cell: result["status"] for (cell, _), result in results.items()} == {
        "base": FINISHED,
        "+ explodes": DIVERGED,
        "+ crashes": FAILED,
        "+ swells": OUT_OF_MEMORY,
        "+ qk_norm": FINISHED,
    }
    assert ended.code == 1
    assert "Traceback" not in ended.err
    told = [line.split(": ") for line in ended.err.splitlines()]
    assert [(who, how) for who, how, *_ in told] == [
        ("+ explodes, seed 0", "DIVERGED"),
        ("+ crashes, seed 0", "FAILED"),
        ("+ swells, seed 0", "OUT_OF_MEMORY"),
    ]
    assert len(ended.failed) == 2
    assert len(ended.trained) == 3


def test_a_diverged_run_says_when_and_how_good_it_was(broken):
    lab, _ = broken
    result = lab.result("broken", "+ explodes")
    assert result["step"] == 5
    assert "at step 5" in result["error"]
    assert "last good loss was 4.1589" in result["error"]  # ln 64: none was logged


def test_a_crash_leaves_its_traceback_beside_the_record(broken):
    lab, _ = broken
    result = lab.result("broken", "+ crashes")
    assert result["error"].startswith("ValueError: the shapes of my idea (see ")
    traceback = lab.run_folder(result["run"]) / "error.txt"
    assert "plugins/crashes.py" in traceback.read_text()


def test_lack_of_memory_names_the_micro_batch_to_try(broken):
    lab, _ = broken
    result = lab.result("broken", "+ swells")
    assert "try runtime.micro_batch=2" in result["error"]


def test_asked_again_failures_are_tried_again_and_divergence_is_not(broken):
    """Damage to what the first call left is named, set aside and mended in the same call."""
    lab, _ = broken
    explodes = lab.result("broken", "+ explodes")
    qk_norm = lab.result("broken", "+ qk_norm")
    torn = lab.run_folder(qk_norm["run"]) / "result.json"
    torn.write_text('{"run": "torn')
    (lab.store / "experiments" / "broken.json").write_text('{"name": "br')
    ended = lab.run(*BROKEN)
    assert ended.code == 1
    assert len(ended.failed) == 2
    assert ended.trained == [qk_norm["run"]]
    assert "result.json is damaged" in ended.err
    assert "broken.json is damaged" in ended.err
    assert "set aside as broken.json.damaged" in ended.err
    mended = lab.result("broken", "+ qk_norm")
    assert mended["weights"] == qk_norm["weights"]
    assert lab.result("broken", "+ explodes") == explodes


def test_each_damaged_record_costs_its_own_run_which_is_trained_again(new_lab):
    """Foreign, not UTF-8, a hole in a log, a folder for a file; and what no second call can change is said."""
    lab = new_lab()
    command = ("run", lab.sheet("grid"), "--seeds", "0", "--json", *QUICK)
    lab.run(*command)
    whole = lab.results("grid")
    full, base, no_qk_norm, last = (lab.run_folder(one["run"]) for one in whole.values())
    (full / "run.json").write_text("[]")
    (full / "result.json").write_bytes((base / "result.json").read_bytes())
    (base / "result.json").write_bytes(b'{"run": "\xff"}')
    log = no_qk_norm / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step"', b'"stop"', 1))
    (last / "result.json").unlink()
    (last / "result.json").mkdir()
    (last / "pace.jsonl").write_bytes(b"\xff\n")
    ended = lab.run(*command)
    assert ended.code == 0, ended.err
    assert len(ended.trained) == 4
    assert f"it is of run '{base.name}'" in ended.err
    assert "utf-8" in ended.err
    assert f"{log} is not what the run left" in ended.err
    assert f"{last / 'result.json'} is damaged" in ended.err
    again = lab.results("grid")
    assert weights(again, pairs=(0,)) == weights(whole, pairs=(0,))
    recipe = (full / "recipe.yaml").read_text()
    recipe_of_that = (no_qk_norm / "recipe.yaml").read_text()
    assert "  clip: 1.0\n" in recipe_of_that  # the default
    (full / "recipe.yaml").unlink()
    (base / "recipe.yaml").write_bytes(b"\xff")
    (no_qk_norm / "recipe.yaml").write_text(recipe_of_that.replace("  clip: 1.0\n", ""))
    about = json.loads((full / "run.json").read_text())
    (full / "run.json").unlink()
    pace = base / "pace.jsonl"
    pace.write_bytes(pace.read_bytes()[:-5])
    (full / "checkpoints").mkdir()  # killed between its result and its last act
    (full / "checkpoints" / "step-00000004-1-0.safetensors").write_bytes(b"a state")
    kept = lab.run(*command, "runtime.keep_weights=true", "runtime.evaluations=2")
    assert kept.trained == []
    assert (full / "recipe.yaml").read_text() == recipe
    assert (no_qk_norm / "recipe.yaml").read_text() == recipe_of_that
    assert not (full / "checkpoints").exists()
    assert "width: 16" in (base / "recipe.yaml").read_text()
    assert f"{base / 'recipe.yaml'} is not UTF-8 text" in kept.err
    assert "runtime.keep_weights=True is asked, but 4 of the runs ended with False" in kept.err
    mended = json.loads((full / "run.json").read_text())
    assert mended.pop("restored") > about["started"]
    lost = {"started", "environment", "at_once"}
    assert mended == {key: value for key, value in about.items() if key not in lost}
    assert f"{full / 'run.json'} is lost or damaged; written again" in kept.err
    unpaced = f"{pace} has lost 1 of 4 lines"
    assert unpaced in kept.err
    assert any(unpaced in line for line in kept.json["warnings"])


def test_when_no_run_finishes_there_is_no_verdict_and_no_crash(new_lab):
    lab = new_lab()
    too_fast = {"optim.lr": 1e30, "optim.clip": None}
    lab.sheet("lost", arms=[], set=too_fast, **A_AND_B)
    ended = lab.run("run", "lost.yaml", *QUICK)
    assert ended.code == 0
    lacking = "no verdict: experiment 'lost' has no finished run (2 diverged)"
    assert lacking in ended.err
    assert "Traceback" not in ended.err
    again = lab.run("run", "lost.yaml", "--no-mlflow", "--json")
    assert again.code == 0
    assert again.json["effects"] == []
    assert "nothing to train" not in again.out


# -- what breaks before it trains --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def unchecked(new_lab):
    """Three arms whose code breaks at the first forward pass, in the liveness check; one of them takes its process."""
    lab = new_lab()
    plugin(lab, "raises", 'raise ValueError("half a letter: \\udc80")')
    plugin(lab, "exits", "import sys; sys.exit()")
    plugin(lab, "dies", "import os; os._exit(7)")
    arms = ["raises", "exits", "dies", "qk_norm"]
    lab.sheet("unchecked", arms=arms, design="add_one", seeds=[0])
    return lab, lab.run("run", "unchecked.yaml", *OWN, "--json")


def test_an_arm_whose_liveness_check_breaks_stops_no_other(unchecked):
    lab, ended = unchecked
    statuses = {
        cell: result["status"] for (cell, _), result in lab.results("unchecked").items()
    }
    lost = dict.fromkeys(["+ raises", "+ exits", "+ dies"], FAILED)
    assert statuses == {"base": FINISHED, "+ qk_norm": FINISHED} | lost
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert len(ended.failed) == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "ValueError: half a letter: \\udc80"),
        ("exits", "SystemExit"),
        ("dies", "the worker died with exit code 7"),
    ],
)
def test_a_broken_liveness_check_names_the_cell_the_plugin_and_the_line(unchecked, name, said):
    lab, ended = unchecked
    [line] = [line for line in ended.err.splitlines() if line.startswith(f"+ {name}: ")]
    source = lab.root / "plugins" / f"{name}.py"
    last = len(source.read_text().rstrip().splitlines())
    assert "the liveness check failed, so it trains unchecked" in line
    assert said in line
    if name != "dies":
        assert line.endswith(f"(raised at {source.resolve()}:{last})")
        error = lab.result("unchecked", f"+ {name}")["error"]
        assert said in error
        assert f"raised at {source.resolve()}:{last}" in error


def test_a_plugin_that_exits_at_its_top_is_an_error_of_the_request(new_lab):
    lab = new_lab()
    lab.sheet("one", arms=[], **A_AND_B)
    (lab.root / "plugins").mkdir()
    (lab.root / "plugins" / "leaves.py").write_text("import sys\nsys.exit()\n")
    ended = lab.run("run", "one.yaml", *OWN)
    assert ended.code == 2
    assert "plugins/leaves.py:2 cannot be imported: SystemExit" in ended.err


@pytest.mark.parametrize("flaw", ["import sys; sys.exit()", "return recipe.modle"])
def test_an_intervention_that_breaks_where_it_is_applied_is_named(new_lab, flaw):
    lab = new_lab()
    plugin(lab, "odd", "return y")
    path = lab.root / "plugins" / "odd.py"
    apply = 'return edit(recipe, "model.attention.on_heads", append(self))'
    path.write_text(path.read_text().replace(apply, flaw))
    lab.sheet("odd", arms=["odd"], design="add_one", seeds=[0])
    ended = lab.run("run", "odd.yaml", *OWN)
    line = path.read_text().splitlines().index(f"        {flaw}") + 1
    assert ended.code == 2
    assert (
        f"cell '+ odd' of odd cannot be built: odd cannot be applied, at {path.resolve()}:{line}"
        in ended.err
    )


@pytest.mark.parametrize("words", [("show", "--cell", "+ odd"), ("run", "--dry-run")])
def test_an_intervention_that_breaks_where_it_is_built_is_named(lab, ablab, words):
    plugin(lab, "odd", "return y")
    path = lab.root / "plugins" / "odd.py"
    path.write_text(path.read_text().replace("return Stage(stage)", "return where.heds"))
    lab.sheet("odd", arms=["odd"], design="add_one", seeds=[0])
    verb, *options = words
    ended = ablab(verb, "odd.yaml", *options, "--plugins", "plugins")
    line = path.read_text().splitlines().index("        return where.heds") + 1
    path.unlink()
    assert ended.code == 2
    assert f"plugin {path.resolve()}:{line} raised AttributeError" in ended.err
    assert ended.err.count("\n") == 1


def test_an_edited_helper_of_a_plugin_is_another_run(new_lab):
    lab = new_lab()
    plugin(lab, "helped", "from plugins._helper import factor; return y * factor")
    helper = lab.root / "plugins" / "_helper.py"
    helper.write_text("factor = 0.9")
    lab.sheet("helped", arms=["helped"], design="add_one", seeds=[0])
    words = ("run", "helped.yaml", *OWN, "--json")
    first = lab.run(*words)
    helper.write_text("factor = 0.8")
    second = lab.run(*words)
    assert len(first.trained) == 2, first.err
    assert len(second.trained) == 1
    assert len(second.reused) == 1


HALVED = '''
"""Half the learning rate, from 20 to 45 % of the run."""
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.language.part import Part


@register("halved", slots=("schedule",), off="the base schedule", source="a test")
class Halved(Part):
    """A test."""

    warmup_steps: int = 3

    def apply(self, recipe):
        return edit(recipe, "schedule", put(self))

    def multiplier(self, t: int, steps: int) -> float:
        from ablab.core.parts.schedule import Cosine

        inside = 0.2 * steps < t < 0.45 * steps
        return Cosine(self.warmup_steps).multiplier(t, steps) * (0.5 if inside else 1.0)
'''


def test_an_arm_that_halves_the_learning_rate_for_a_while_is_trained(new_lab):
    lab = new_lab()
    (lab.root / "plugins").mkdir()
    (lab.root / "plugins" / "halved.py").write_text(HALVED)
    lab.sheet("halved", arms=["halved"], design="add_one", seeds=[0])
    ended = lab.run("run", "halved.yaml", *OWN, "--json")
    assert len(ended.trained) == 2, ended.err
    assert (
        lab.result("halved", "+ halved")["weights"] != lab.result("halved", "base")["weights"]
    )


# -- two at once -------------------------------------------------------------------------------------------------------
def test_two_calls_at_once_train_each_run_once_and_both_end_well(new_lab):
    """Counted where it happens: one byte for each training forward pass of each of the two layers."""
    lab = new_lab()
    count = lab.root / "forwards"
    plugin(lab, "counts", COUNT.format(path=str(count)))
    lab.sheet("twice", arms=["counts"], design="replicate", seeds=[0, 1, 2])
    words = ("run", "twice.yaml", *OWN, "--run-inert", "--json")
    with ThreadPoolExecutor(2) as both:
        one, two = both.map(lambda _: lab.run(*words), range(2))
    assert one.code == two.code == 0
    assert one.json["effects"] == two.json["effects"]
    trained = one.trained + two.trained
    results = lab.results("twice").values()
    assert sorted(trained) == sorted(each("run", results))
    assert len(trained) == 6
    assert count.stat().st_size == 6 * 20 * 2


@pytest.mark.parametrize(
    ("device", "asked", "turns"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("cpu", True, False),
    ],
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
    runtime = {"device": device, "turns": asked, "compile": False, "replay": False}
    lab.sheet("shared", arms=["who"], runtime=runtime, **A_AND_B)
    two_jobs = ("--plugins", "plugins", "--no-mlflow", "--jobs", "2", "--run-inert")
    ended = lab.run("run", "shared.yaml", *two_jobs)
    assert ended.code == 0, ended.err
    trained = who.read_text().split()
    changes = sum(one != other for one, other in itertools.pairwise(trained))
    assert len(set(trained)) == 2
    assert len(trained) == 2 * 2 * (20 + turns)
    assert changes <= 5 if turns else changes > 10


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        ("-1", []),
        ("", []),
        ("0", ["0"]),
        ("2, 3", ["2", "3"]),
        ("1,-1,0", ["1"]),
        ("GPU-12,MIG-3", ["GPU-12", "MIG-3"]),
    ],
)
def test_no_gpu_is_counted_beyond_a_minus_one(monkeypatch, listed, seen):
    """As CUDA reads the list; `-1` alone is how people say that there is none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == seen


@pytest.mark.parametrize(
    ("gpus", "threads", "in_turn", "at_once"),
    [
        ("0", 1, 1, 4),
        ("0,1", 1, 2, 8),
        ("0", 8, 1, 2),
        ("0", 32, 1, 1),
        ("-1", 1, 16, 16),
        ("-1", 32, 1, 1),
    ],
)
def test_as_many_jobs_as_gpus_unless_they_do_not_take_turns(
    monkeypatch, gpus, threads, in_turn, at_once
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert default_jobs(Runtime(threads=threads, turns=True)) == in_turn
    assert default_jobs(Runtime(threads=threads, turns=False)) == at_once


@pytest.mark.parametrize("gpus", ["0", "0,1"])
@pytest.mark.parametrize(
    ("runtime", "limit"),
    [
        ({"device": "auto", "turns": True}, lambda jobs, gpus: min(jobs, gpus)),
        ({"device": "auto", "turns": False}, lambda jobs, gpus: jobs),
        ({"device": "cpu"}, lambda jobs, gpus: jobs),
    ],
    ids=["in turn", "at once", "cpu"],
)
def test_a_forecast_knows_that_jobs_take_turns_on_a_gpu(
    lab, ablab, monkeypatch, runtime, limit, gpus
):
    lab.sheet("asked", seeds=[7], runtime=runtime)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)

    def seconds(jobs: int) -> float:
        dry = ("run", "asked.yaml", "--dry-run", "--json")
        found = ablab(*dry, "--jobs", str(jobs)).json
        return found["seconds"] - found["overhead"]

    alone = seconds(1)
    for jobs in (2, 4):
        speedup = limit(jobs, len(gpus.split(",")))
        assert seconds(jobs) == pytest.approx(alone / speedup, rel=1e-6)


def test_a_forecast_counts_start_up_liveness_and_evaluations(lab, ablab):
    """By hand: twice the evaluations on the held-out tokens cost a third of as many training tokens."""
    lab.sheet("told", seeds=[7])
    dry = ("run", "told.yaml", "--dry-run", "--json")

    def training(evaluations: int) -> float:
        found = ablab(*dry, "--jobs", "1", f"runtime.evaluations={evaluations}").json
        assert found["overhead"] > 8 and found["device"] == "this CPU"
        return found["seconds"] - found["overhead"]

    few, many = training(2), training(4)
    steps_tokens, held_out = 1280, 320
    expected = (steps_tokens + 4 * held_out / 3) / (steps_tokens + 2 * held_out / 3)
    assert many / few == pytest.approx(expected, rel=1e-3)


def test_a_forecast_says_that_a_grid_wants_a_gpu_and_that_its_tokens_are_missing(ablab):
    said = ablab("run", "loo_70m", "--dry-run", "runtime.device=cpu").out
    assert "No GPU is seen here, and this grid wants one: about" in said
    assert "The store lacks the tokens of" in said and "these ids will change" in said
    told = ablab("run", "told.yaml", "--dry-run").out
    assert "wants one" not in told and "lacks" not in told
