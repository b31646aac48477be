"""The command line: what each command prints, how it ends, and what it does not load."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

LIGHT = """
import sys
sys.argv = ["ablab", *{words!r}]
from ablab.experiments.cli import main as cli
heavy = {{"torch", "mlflow", "optuna", "pandas", "matplotlib", "scipy", "numpy"}}
try:
    cli.main()
finally:
    print(*sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module", autouse=True)
def sheets(lab):
    lab.sheet("grid")
    doses = [{"gating": {"per": "head"}}, "muon", "normuon"]
    lab.sheet("doses", **{"with": doses})


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list"],
        ["show", "quickstart", "--diff", "base"],
        ["run", "quickstart", "--seeds", "0-833", "--dry-run", "--json"],
    ],
    ids=" ".join,
)
def test_looking_loads_nothing_heavy(lab, words):
    """10,008 dry runs among it: 12 cells of quickstart, 834 seeds."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(words=words)],
        cwd=lab.root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.strip() == "", done.stderr
    if "--json" in words:
        found = json.loads(done.stdout)
        assert found["runs"] == found["missing"] == 10_008
        assert len({row["run"] for row in found["rows"]}) == len(found["rows"]) == 10_008


@pytest.mark.parametrize("module", ["ablab.experiments.cli", "ablab.experiments.cli.main"])
def test_python_m_starts_the_same_command_line_where_ablab_is_not_on_the_path(
    lab, ablab, module
):
    words = ("run", "grid.yaml", "--dry-run", "--json")
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=lab.root,
        env=os.environ | {"ABLAB_STORE": str(lab.store)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ablab(*words).json


def test_help_says_how_it_ends(ablab):
    ended = ablab("--help")
    assert ended.code == 0
    for word in ("Exit codes: 0", "1 runs failed", "2 the request", "75", "130", "--debug"):
        assert word in ended.out
    assert ablab().code == 2


def words_of(ended) -> list[str]:
    """The words of a help page, out of their frames."""
    return ended.out.replace("│", " ").split()


def test_help_shows_every_default_and_bracket_that_was_written(ablab):
    """A terminal takes [word] for markup and shows nothing in its place."""
    wanted = {
        "show": "(the first)",
        "run": "(one a GPU, 4 with runtime.turns=false, else",
        "study": "(STORE/optuna.db)",
        "sync": "(all in the store)",
    }
    for command, said in wanted.items():
        assert said in " ".join(words_of(ablab(command, "--help")))
    coords = "".join(words_of(ablab("check", "coords", "--help")))  # wraps within words
    assert "on_qk=[qk_norm]" in coords
    assert "(aquarterofthesmallestwidth)" in coords


def test_list_names_every_intervention_with_its_control(ablab):
    from ablab.core.recipe.intervention import REGISTRY

    listed = ablab("list", "--json").json["interventions"]
    assert [one["name"] for one in listed] == sorted(REGISTRY)
    text = ablab("list").out
    for one in listed:
        assert one["off"] and one["summary"]
        assert f"  {one['name']}" in text
        assert one["off"] in text


def test_list_names_every_experiment_with_its_question(ablab):
    import yaml

    from ablab.experiments.plan.sheets import catalog

    sheets = {name: yaml.safe_load(path.read_text()) for name, path in catalog().items()}
    listed = ablab("list", "--json").json["experiments"]
    assert {one["name"]: one["question"] for one in listed} == {
        name: sheet["question"] for name, sheet in sheets.items()
    }
    assert "quickstart" in sheets


@pytest.mark.parametrize(
    ("columns", "without"),
    [
        (160, []),
        (80, ["x, 95 %", "x reference", "tokens/s", "sd", "runs", "mean", "p (Holm)"]),
    ],
)
def test_a_narrow_terminal_leaves_columns_out_and_says_so_but_cuts_no_name_or_number(
    monkeypatch, capsys, columns, without
):
    from ablab.experiments.cli.printing import SPARE
    from ablab.experiments.text import table

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    row = {
        "arm": "- muon (and normuon)",
        "seeds": "3",
        "mean": "2.7781",
        "sd": "0.0057",
        "delta": "+0.0299",
        "95 % interval": "-0.0213 to +0.0810",
        "p (Holm)": "0.038",
        "ingredient": "too few seeds (+1)",
        "tokens/s": "5,690",
        "x reference": "1.43",
        "x, 95 %": "1.31 to 1.55",
        "runs": "3 finished",
    }
    table([row], SPARE)
    _, line, *note = capsys.readouterr().out.splitlines()
    assert len(line) <= columns
    for head in row.keys() - without:
        assert row[head] in line
    assert note == ([f"(too narrow for: {', '.join(without)})"] if without else [])


def test_show_prints_a_recipe_that_reads_back_as_the_same_run(ablab):
    import yaml

    from ablab.core.language.parse import parse
    from ablab.core.recipe.recipe import Recipe, run_id

    out = ablab("show", "grid.yaml", "--cell", "- qk_norm").out
    read_back = parse(Recipe, yaml.safe_load(out), "")
    assert "cell '- qk_norm', seed 0" in out
    assert f"run {run_id(read_back)}" in out


def test_show_diff_prints_what_differs_and_nothing_else(ablab):
    def differing(*words: str) -> list[str]:
        shown = ablab("show", *words).out.splitlines()
        return [line for line in shown if not line.startswith("#")]

    lines = differing("grid.yaml", "--cell", "full", "--diff", "- qk_norm")
    assert lines
    for line in lines:
        assert line.startswith("model.attention.on_qk.qk_norm.")
        assert ": absent -> " in line
    both_have_it = differing("grid.yaml", "optim.lr=0.5", "--diff", "base")
    assert "optim.lr" not in "".join(both_have_it)
    same = differing("grid.yaml", "--cell", "base", "--diff", "base")
    assert same == ["no difference from base"]


def test_show_diff_writes_a_value_as_yaml_has_it(ablab):
    assert "nesterov: absent -> true\n" in ablab("show", "doses.yaml", "--diff", "base").out


def test_show_counts_parameters_as_the_model_has_them(ablab, build):
    import yaml

    from ablab.core.language.parse import parse
    from ablab.core.recipe.recipe import Recipe

    out = ablab("show", "grid.yaml").out
    model = build(parse(Recipe, yaml.safe_load(out), ""))
    assert f"{sum(value.numel() for value in model.parameters()):,} parameters" in out


def test_an_override_of_a_dose_reaches_the_cells_that_have_it(ablab):
    dose = "with.gating.per=elementwise"
    changed = ablab("show", "doses.yaml", dose, "--diff", "- gating").out
    assert f"# doses@{dose}" in changed
    assert "gating.per: absent -> elementwise" in changed
    without = [
        ablab("show", "doses.yaml", *words, "--cell", "- gating").out.splitlines()[2:]
        for words in ((), (dose,))
    ]
    assert without[0] == without[1]


def test_a_dry_run_writes_nothing_and_knows_what_is_missing(lab, ablab):
    before = lab.files()
    found = ablab("run", "grid.yaml", "--dry-run", "--json").json
    assert (found["runs"], found["missing"]) == (8, 8)
    assert found["tokens"] == 8 * 1280
    assert found["seconds"] > 0
    text = ablab("run", "grid.yaml", "--dry-run").out
    assert "8 runs, 8 missing" in text
    for row in found["rows"]:
        assert row["state"] == "missing"
        assert row["flops"] > 0
        assert row["parameters"] > 0
        assert row["run"] in text
    assert lab.files() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--launcher", "slrm"), "Did you mean 'slurm'?"),
        (("--address", "head:6379"), "add --launcher ray, or drop it"),
        (("--launcher", "slurm", "--slurm", "partitoin=gpu"), "Did you mean 'partition'?"),
        (("--launcher", "slurm"), "start this on a machine that has sbatch and srun"),
        (("--gpus-per-run", "3"), "nearest: 2, 4"),
        (
            ("--gpus-per-run", "64", "--launcher", "slurm"),
            "more than the rows of a micro-batch",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_command_itself_would(ablab, words, said):
    ended = ablab("run", "grid.yaml", "--dry-run", *words)
    assert ended.code == 2
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert said in ended.err


@pytest.mark.parametrize(
    "words", [("run", "grid.yaml"), ("study", "grid.yaml"), ("challenge", "grid.yaml", "full")]
)
def test_every_command_that_trains_takes_a_launcher(ablab, words):
    ended = ablab(*words, "--launcher", "slurm", "--slurm", "partitoin=gpu")
    assert ended.code == 2
    assert "Did you mean 'partition'?" in ended.err


def test_a_dry_run_is_of_the_machines_that_would_train(lab, ablab):
    before = lab.files()
    there = ("--launcher", "slurm", "--slurm", "cluster=local")
    found = ablab("run", "grid.yaml", "--dry-run", "--json", *there).json
    assert (found["device"], found["jobs"]) == ("CPUs of SLURM, if it has room", 256)
    here = ablab("run", "grid.yaml", "--dry-run", "--json", "--jobs", "1").json
    assert here["device"] == "this CPU"
    assert found["device_seconds"] == here["device_seconds"]
    assert found["seconds"] < here["seconds"]
    asked = ablab("run", "grid.yaml", "--dry-run", *there, "--jobs", "3").out
    assert "on CPUs of SLURM, if it has room, 3 at a time" in asked
    assert lab.files() == before


def test_a_dry_run_under_torchrun_leaves_no_rank_waiting(ablab, monkeypatch):
    places = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    for name, value in (places | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    ended = ablab("run", "grid.yaml", "--dry-run")
    assert (ended.code, ended.out) == (0, "")


def test_a_dry_run_counts_a_run_that_two_cells_share_once(lab, ablab):
    from ablab.core.store.result import FINISHED, Result
    from ablab.core.store.store import Store

    first = ablab("run", "grid.yaml", "--dry-run", "--json").json["rows"][0]
    record = Store(lab.store).run(first["run"])
    record.finish(Result(first["run"], FINISHED, 20, 1280, seconds=2.0))
    found = ablab("run", "grid.yaml", "--dry-run", "--json").json
    first = found["rows"][0]
    assert (found["missing"], found["rate"]) == (7, "measured")
    assert first["state"] == "finished"
    # The time it took is the time it is said to take; two evaluations of 320 tokens go forward besides.
    assert first["seconds"] == pytest.approx(2.0 * (1 + 2 * 320 / 1280 / 3))
    record.result_path.unlink()


ONLY = {  # patterns, comma-separated -> cells
    "full": {"full"},
    "qk_norm": {"- qk_norm"},
    "- *": {"- qk_norm", "- value_residual"},
    "!base": {"full", "- qk_norm", "- value_residual"},
    "- *,!*residual": {"- qk_norm"},
    "full,base": {"full", "base"},
    "!full,!base,!qk_norm": {"- value_residual"},
}


@pytest.mark.parametrize("patterns", ONLY)
def test_only_takes_names_words_patterns_and_their_negations(ablab, patterns):
    words = [word for pattern in patterns.split(",") for word in ("--only", pattern)]
    found = ablab("run", "grid.yaml", "--dry-run", "--json", *words).json
    assert {row["cell"] for row in found["rows"]} == ONLY[patterns]
    assert found["runs"] == 2 * len(ONLY[patterns])


@pytest.mark.parametrize(
    "seeds, expected",
    [
        ("0", [0]),
        ("2-4", [2, 3, 4]),
        ("7,1", [7, 1]),
        ("0-1,5,1", [0, 1, 5]),
        (" 3 , 4 ", [3, 4]),
    ],
)
def test_seeds_are_numbers_spans_and_lists_each_once(ablab, seeds, expected):
    words = ("--dry-run", "--json", "--only", "full", "--seeds", seeds)
    found = ablab("run", "grid.yaml", *words).json
    assert [row["seed"] for row in found["rows"]] == expected


def test_a_new_intervention_is_listed_and_shown(lab, ablab):
    ended = ablab("new", "intervention", "my_idea", "--folder", "mine")
    assert ended.code == 0
    assert "ablab list --plugins mine" in ended.out
    listed = ablab("list", "--plugins", "mine", "--json").json["interventions"]
    assert "my_idea" in [one["name"] for one in listed]
    lab.sheet("mine", **{"with": ["my_idea"]})
    shown = ablab("show", "mine.yaml", "--plugins", "mine", "--diff", "base")
    assert "my_idea.start: absent -> 0.0" in shown.out
    again = ablab("new", "intervention", "my_idea", "--folder", "mine")
    assert again.code == 2
    assert "'my_idea' exists already" in again.err


def test_a_bug_is_one_line_with_exit_code_1_and_debug_shows_where(lab, ablab, monkeypatch):
    from ablab.experiments.plan import experiment

    def broken(*words):
        raise KeyError("a bug")

    monkeypatch.setattr(experiment, "load", broken)
    ended = ablab("show", "grid.yaml")
    assert (ended.code, ended.err) == (1, "error: KeyError: 'a bug' (--debug shows where)\n")
    with pytest.raises(KeyError):
        ablab("show", "grid.yaml", "--debug")


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/a/file"),
    ],
)
def test_a_disk_that_refuses_anywhere_is_one_line_with_exit_code_2(ablab, monkeypatch, fault):
    from ablab.experiments.plan import experiment

    def refuse(*words):
        raise fault

    monkeypatch.setattr(experiment, "load", refuse)
    ended = ablab("show", "grid.yaml")
    where = fault.filename or "the disk"
    assert ended.code == 2
    assert ended.err.startswith(f"error: cannot use {where}: {fault.strerror}; free space")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_schedulers_stop_are_one_line_with_exit_code_130(ablab, monkeypatch, sign):
    from ablab.experiments.plan import experiment

    def stopped(*words):
        os.kill(os.getpid(), sign)

    monkeypatch.setattr(experiment, "load", stopped)
    ended = ablab("show", "grid.yaml")
    assert (ended.code, ended.err) == (130, "interrupted; the same command goes on from here\n")


def test_the_coordinate_check_takes_an_intervention_of_ones_own(lab, ablab):
    small = ("data.context=16", "data.batch=4", "data.vocab=64")
    setting = ("--widths", "16,32,48,64", "--steps", "5", "--json")
    words = ("check", "coords", *small, *setting, "--with", "my_check")
    refused = ablab(*words)
    assert refused.code == 2
    assert "my_check" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert ablab("new", "intervention", "my_check").code == 0
    arms = ablab(*words, "--plugins", "plugins").json["arms"]
    assert [arm["name"] for arm in arms] == ["standard", "my_check"]


def test_an_exit_that_somebody_elses_code_asks_for_is_no_success(ablab, monkeypatch):
    monkeypatch.setattr("ablab.experiments.cli.main.app", lambda standalone_mode: sys.exit())
    ended = ablab("list")
    assert ended.code == 1
    assert "error: SystemExit (--debug shows where)" in ended.err


def test_a_second_ctrl_c_and_one_during_the_imports_are_one_line_too(monkeypatch, capsys):
    from ablab.experiments.cli import __main__ as entry
    from ablab.experiments.cli import main as cli

    def interrupted():
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "main", interrupted)
    try:
        with pytest.raises(SystemExit) as end:
            entry.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_lacks_a_sign_shows_another_for_it(lab, encoding):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ablab.experiments.cli",
            "show",
            "grid.yaml",
            "--cell",
            "\u2212 x",
        ],
        cwd=lab.root,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no cell '? x'")


def test_a_store_that_can_only_be_read_shows_its_report(tmp_path, capsys):
    """A file in the place of the folder refuses root, too."""
    from ablab.core.store.planned import GridPlan, Planned
    from ablab.core.store.result import FINISHED, Result
    from ablab.core.store.store import Store
    from ablab.experiments.cli.printing import show_report

    store = Store(tmp_path)
    rows = [Planned("base", seed, seed, f"{seed:016x}") for seed in (0, 1)]
    store.write_plan(GridPlan("demo", "Which?", "val/loss", "lower", "add_one", rows))
    for row in rows:
        record = store.run(row.run)
        record.begin("", {})
        record.finish(Result(row.run, FINISHED, 3, 30, {"val/loss": 3.0 + row.seed}))
    (tmp_path / "reports").write_text("")
    show_report(store, "demo", as_json=False)
    said = capsys.readouterr()
    assert "base" in said.out and "3.5" in said.out and "report:" not in said.out
    assert said.err.startswith("warning: no page is written: cannot write")


def test_a_storage_with_a_password_need_not_stand_on_the_command_line(ablab, monkeypatch):
    monkeypatch.setenv("ABLAB_STORAGE", "nonsense://me:secret@host/db")
    ended = ablab("study", "lr_width_tiny", "--no-mlflow")
    assert ended.code == 2
    assert ended.err.startswith("error: the Optuna storage nonsense://host/db cannot be opened")
