"""Where studies are kept: SQLite, a journal file, PostgreSQL; what cannot be opened, or is another study's."""

import importlib.util
import json
import multiprocessing
import re
import subprocess
import sys
import time
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ablab.core.errors import UserError
from ablab.experiments.tune import storage
from ablab.experiments.tune.storage import open_storage

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "faults")]
import valley  # noqa: E402
from postgres import Postgres, free_port, lacking  # noqa: E402

FORK = multiprocessing.get_context("fork")
BLOCK = {"sampler": "tpe", "trials_per_cell": 8}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    if why := lacking():
        pytest.skip(why)
    import tempfile

    with tempfile.TemporaryDirectory(
        prefix="ablab-pg-"
    ) as root:  # pytest's own folders are closed to `nobody`
        server = Postgres(Path(root))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """The trials of a study in a journal file: what every other storage must hold too."""
    root = tmp_path_factory.mktemp("journal")
    return valley.content(
        valley.tune(root, BLOCK, f"journal:{root}/a.journal", **valley.TWO_CELLS)[0]
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_storage_holds_the_same_trials_and_goes_on_with_them(
    tmp_path, request, journal, kind
):
    url = None if kind == "sqlite" else request.getfixturevalue("postgres").url
    half = {**BLOCK, "hours": 0.0}
    assert valley.tune(tmp_path, half, url, **valley.TWO_CELLS)[1].trials == []
    held, _, _ = valley.tune(tmp_path, BLOCK, url, **valley.TWO_CELLS)
    assert len(valley.Formula.trained) == len(journal) == 16
    assert valley.content(held) == journal
    again, _, _ = valley.tune(tmp_path, BLOCK, url, **valley.TWO_CELLS)
    assert valley.Formula.trained == [] and valley.content(again) == journal
    assert (tmp_path / "store" / "optuna.db").exists() == (kind == "sqlite")


def test_a_store_may_be_tuned_again_from_its_runs_when_the_storage_is_lost(tmp_path, journal):
    valley.tune(tmp_path, BLOCK, **valley.TWO_CELLS)
    (tmp_path / "trials.journal").unlink()
    held, _, _ = valley.tune(tmp_path, BLOCK, **valley.TWO_CELLS)
    crashed = {
        one["attrs"]["runs"][0]
        for one in journal
        if one["attrs"]["state"] in ("failed", "out_of_memory")
    }
    assert set(valley.Formula.trained) == crashed and valley.content(held) == journal


# -- what cannot be opened ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////proc/nowhere/optuna.db", "unable to open database file"),
        ("journal:/proc/nowhere/trials", "No such file|nowhere"),
        ("nonsense://x", "nonsense"),
        ("optuna.db", "Could not parse"),
        ("postgresql+pg8000://me:secret@127.0.0.1/db", "No module named 'pg8000'"),
        ("mysql+absent://me:secret@host/db", "absent"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_in_one_line(tmp_path, url, said):
    with pytest.raises(
        UserError,
        match=rf"the Optuna storage .* cannot be opened \(.*({said}).*\); check --storage",
    ) as refusal:
        valley.tune(tmp_path, BLOCK, url)
    assert "\n" not in str(refusal.value) and "secret" not in str(refusal.value)
    assert not (tmp_path / "store" / "studies").exists() and valley.Formula.trained == []


def test_a_server_that_is_not_there_or_refuses_us_is_named_without_the_password(postgres):
    for url, said in (
        (
            f"postgresql+psycopg2://ablab:secret@127.0.0.1:{free_port()}/postgres",
            "Connection refused",
        ),
        (postgres.url.replace("se%3Acret", "wrong"), "password authentication failed"),
        (
            postgres.url.removesuffix("postgres") + "nowhere",
            'database "nowhere" does not exist',
        ),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            open_storage(url)
        assert "\n" not in str(refusal.value) and not {"secret", "wrong", "cret"} & set(
            str(refusal.value).replace(":", " ").split()
        )


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_storage_of_an_older_optuna_is_named_with_its_cure_and_not_touched(
    tmp_path, request, kind
):
    """Optuna would add the tables that an older schema lacks before it looks at the version."""
    import sqlalchemy

    url = f"sqlite:///{tmp_path}/team.db"
    if kind == "postgresql":
        server = request.getfixturevalue("postgres")
        server.create("older")
        url = server.url_of("older")
    open_storage(url)
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text("update alembic_version set version_num = 'v2.6.0.a'")
        )
        connection.execute(sqlalchemy.text("drop table trial_heartbeats"))
    before = sqlalchemy.inspect(engine).get_table_names()
    with pytest.raises(UserError, match="optuna storage upgrade --storage"):
        open_storage(url)
    assert sqlalchemy.inspect(engine).get_table_names() == before
    engine.dispose()


def test_a_file_that_is_no_database_is_named_and_kept(tmp_path):
    (tmp_path / "notes.db").write_text("my notes\n" * 100)
    with pytest.raises(UserError, match="notes.db cannot be opened .*not a database"):
        valley.tune(tmp_path, BLOCK, f"sqlite:///{tmp_path}/notes.db")
    assert (tmp_path / "notes.db").read_text() == "my notes\n" * 100


def test_a_journal_whose_lock_outlived_its_process_opens_within_seconds(tmp_path, monkeypatch):
    """Optuna alone would wait for 30 s."""
    monkeypatch.setattr(storage, "STALE_SECONDS", 3)
    valley.tune(tmp_path, BLOCK)
    (tmp_path / "trials.journal.lock").symlink_to(tmp_path / "trials.journal")
    began = time.monotonic()
    _, record, _ = valley.tune(tmp_path, BLOCK | {"trials_per_cell": 9})
    assert len(record.trials) == 9
    assert 2.9 < time.monotonic() - began < 25


# -- what is damaged or lost meanwhile ---------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", [1, 7, 40, 3000])
def test_a_journal_that_was_cut_goes_on_with_the_trials_that_were_lost(tmp_path, cut):
    whole = valley.content(valley.tune(tmp_path, BLOCK)[0])
    path = tmp_path / "trials.journal"
    path.write_bytes(path.read_bytes()[:-cut])
    cut_short, _, _ = valley.tune(tmp_path, BLOCK)
    assert valley.content(cut_short) == whole
    again, _, _ = valley.tune(tmp_path, BLOCK)
    assert valley.Formula.trained == [] and valley.content(again) == whole


def test_a_file_that_is_no_journal_is_not_cut(tmp_path):
    (tmp_path / "notes").write_text("mine\nnot finished")
    with pytest.raises(UserError, match="notes:1 is damaged .*move that journal away"):
        open_storage(f"journal:{tmp_path}/notes")
    assert (tmp_path / "notes").read_text() == "mine\nnot finished"


def test_a_damaged_line_of_a_journal_is_named_and_the_cure_works(tmp_path):
    whole = valley.content(valley.tune(tmp_path, BLOCK)[0])
    path = tmp_path / "trials.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = b"\xff\xfe{{\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"trials.journal:6 is damaged .*; move") as refusal:
        valley.tune(tmp_path, BLOCK)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    path.rename(tmp_path / "away")
    held, _, _ = valley.tune(tmp_path, BLOCK)
    assert valley.content(held) == whole


@pytest.mark.parametrize("lines", [slice(None), slice(3, 9)])
def test_a_journal_that_says_a_trial_twice_is_refused_and_the_cure_works(tmp_path, lines):
    whole = valley.content(valley.tune(tmp_path, BLOCK)[0])
    path = tmp_path / "trials.journal"
    said = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(said + said[lines]))
    with pytest.raises(
        UserError, match=r"trials.journal:\d+ writes the trial of line \d+ again.*; move"
    ) as refusal:
        valley.tune(tmp_path, BLOCK)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    path.unlink()
    held, _, _ = valley.tune(tmp_path, BLOCK)
    assert valley.content(held) == whole


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        (rb'"value":3.\d', b'"value":1.2'),
        (rb'"optim.lr":0.0\d', b'"optim.lr":0.09'),
        (rb'"runs":\["\w', b'"runs":["0'),
        (rb'"values":{"100":3.\d', b'"values":{"100":1.5'),
        (rb'"complete"', b'"pruned"'),
        (rb'{"op_code":4,[^\n]*\n', b""),
    ],
)
def test_a_trial_that_was_changed_in_its_journal_is_named(tmp_path, said, changed):
    valley.tune(tmp_path, BLOCK)
    path = tmp_path / "trials.journal"
    content = path.read_bytes()
    path.write_bytes(re.sub(said, changed, content, count=1))
    assert path.read_bytes() != content
    with pytest.raises(
        UserError, match=r"trial \d of 'base' is not what ablab wrote.*; move"
    ) as refusal:
        valley.tune(tmp_path, BLOCK)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_study_without_its_spread_is_named(tmp_path):
    valley.tune(tmp_path, BLOCK)
    path = tmp_path / "trials.journal"
    kept = [
        line for line in path.read_bytes().splitlines(keepends=True) if b'"spread"' not in line
    ]
    path.write_bytes(b"".join(kept))
    with pytest.raises(UserError, match="with trials but not how they were spread"):
        valley.tune(tmp_path, BLOCK)


@pytest.mark.parametrize("content", [b"[1, 2]", b"3\n", b'{"op_code": 99}\n', b"{}\n"])
def test_a_journal_of_something_else_is_one_line_and_the_cure_works(tmp_path, content):
    path = tmp_path / "trials.journal"
    path.write_bytes(content)
    with pytest.raises(UserError, match="trials.journal.*") as refusal:
        valley.tune(tmp_path, BLOCK)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == content
    path.unlink()
    assert len(valley.tune(tmp_path, BLOCK)[1].trials) == 8


def test_a_folder_in_the_place_of_a_lock_goes_aside(tmp_path):
    (tmp_path / "store" / "studies" / ".valley.json.lock").mkdir(parents=True)
    (tmp_path / "store" / "experiments" / ".valley@study.json.lock").mkdir(parents=True)
    (tmp_path / "store" / ".optuna.lock").mkdir()
    assert len(valley.tune(tmp_path, BLOCK)[1].trials) == 8


def test_a_folder_in_the_place_of_a_studys_plan_goes_aside(tmp_path):
    valley.tune(tmp_path, BLOCK)
    plan = tmp_path / "store" / "experiments" / "valley@study.json"
    written = plan.read_bytes()
    plan.unlink()
    (plan / "inner").mkdir(parents=True)
    valley.tune(tmp_path, BLOCK)
    assert plan.read_bytes() == written


def lost_in_training(monkeypatch, at: int, how) -> None:
    """`how` is called before run number `at` trains; once."""
    train = valley.Formula._train

    def call(self, run, stops):
        if len(self.trained) == at:
            how()
        train(self, run, stops)

    monkeypatch.setattr(valley.Formula, "_train", call)


def test_a_server_lost_in_the_middle_is_one_line_and_the_same_command_goes_on(
    tmp_path, journal, postgres, monkeypatch
):
    url = postgres.url
    block = BLOCK | {"sampler_seed": 5}
    lost_in_training(monkeypatch, 5, postgres.stop)
    with pytest.raises(UserError, match="the Optuna storage .* was lost") as refusal:
        valley.tune(tmp_path, block, url, name="lost")
    assert "\n" not in str(refusal.value) and "cret" not in str(refusal.value)
    monkeypatch.undo()
    postgres.start()
    held, _, _ = valley.tune(tmp_path, block, url, name="lost")
    undisturbed, _, _ = valley.tune(tmp_path / "other", block, name="lost")
    assert valley.content(held) == valley.content(undisturbed)


def test_a_database_damaged_in_the_middle_is_one_line_and_the_rerun_works(
    tmp_path, monkeypatch
):
    database = tmp_path / "store" / "optuna.db"
    whole: list[bytes] = []

    def damage():
        whole.append(database.read_bytes())
        database.write_bytes(b"none" * 5000)

    lost_in_training(monkeypatch, 5, damage)
    with pytest.raises(UserError, match="the Optuna storage .*optuna.db was lost"):
        valley.tune(tmp_path, BLOCK, None)
    monkeypatch.undo()
    database.write_bytes(whole[0])
    held, record, _ = valley.tune(tmp_path, BLOCK, None)
    assert len(record.trials) == 8
    undisturbed, _, _ = valley.tune(tmp_path / "other", BLOCK)
    assert valley.content(held) == valley.content(undisturbed)


def tune_when_told(root: Path, name: str, pipe: Connection) -> None:
    """Says how many trials it has, or the refusal."""
    pipe.send("ready")
    pipe.recv()
    try:
        _, record, _ = valley.tune(root, {"sampler": "random"}, None, name=name)
        pipe.send(str(len(record.trials)))
    except UserError as refusal:
        pipe.send(str(refusal))


@pytest.mark.parametrize("name", ["valley", None])
def test_two_studies_may_start_on_a_fresh_store_at_once(tmp_path, name):
    """Of one name, too: the second is told so, or comes when the first is done."""
    two = []
    for i in range(2):
        ours, theirs = FORK.Pipe()
        given = (tmp_path, name or f"valley{i}", theirs)
        FORK.Process(target=tune_when_told, args=given, daemon=True).start()
        two.append(ours)
    for one in two:
        assert one.recv() == "ready"
    for one in two:
        one.send("go")
    assert all(one.poll(100) for one in two)
    said = [one.recv() for one in two]
    told = [line for line in said if line != "8"]
    assert len(told) < 2 and all("another process tunes valley" in line for line in told)
    assert name or not told
    for i in range(2):
        one, record, _ = valley.tune(
            tmp_path, {"sampler": "random"}, None, name=name or f"valley{i}"
        )
        assert len(record.trials) == 8 and valley.Formula.trained == []


def test_two_stores_may_start_on_a_fresh_server_at_once(tmp_path, monkeypatch):
    """The slower one finds the tables made."""
    from optuna import storages

    asked = []

    class Late(storages.RDBStorage):
        def __init__(self, url, *how, **options):
            asked.append(url)
            if len(asked) == 1:
                raise RuntimeError('relation "studies" already exists')
            super().__init__(url, *how, **options)

    monkeypatch.setattr(storages, "RDBStorage", Late)
    _, record, _ = valley.tune(tmp_path, BLOCK, None)
    assert len(record.trials) == 8 and len(asked) == 2


@pytest.mark.parametrize("name", ["a b", "a%20b", "100%", "who?", "a?b=c", "#1", "{x}", "ä"])
def test_a_store_of_any_name_holds_its_own_database(tmp_path, name):
    root = tmp_path / name
    _, record, _ = valley.tune(root, BLOCK, None)
    assert (root / "store" / "optuna.db").is_file() and len(record.trials) == 8
    assert [path.name for path in tmp_path.iterdir()] == [name]


# -- whose study it is -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("block", "keys", "said"),
    [
        (
            {"space": {"optim.lr": {"log": [0.001, 0.2]}}},
            {},
            r"'valley/base' whose space is .*\[16, 32, 64\]|whose space is",
        ),
        ({"sampler": "random"}, {}, "whose sampler is tpe, but this one has random"),
        ({"sampler_seed": 3}, {}, "whose sampler_seed is 0, but this one has 3"),
        ({"seeds": [101]}, {}, r"whose seeds is \[100\], but this one has \[101\]"),
        ({"pruner": "median"}, {}, "whose pruner is none, but this one has median"),
        ({"generation": 2}, {}, "whose generation is 4, but this one has 2"),
        (
            {},
            {"metric": {"name": "train/loss"}},
            "whose metric is val/loss, but this one has train/loss",
        ),
        ({}, {"set": {"budget.tokens": 640}}, "whose recipe is [0-9a-f]+, but this one has"),
    ],
)
def test_a_study_made_with_other_facts_is_left_alone_and_the_fact_is_named(
    tmp_path_factory, block, keys, said
):
    root = tmp_path_factory.mktemp("facts")
    valley.tune(root, BLOCK)
    before = (root / "trials.journal").read_bytes()
    with pytest.raises(
        UserError,
        match=rf"(?s)the storage holds a study .*({said}).*; rename the experiment or use another --storage",
    ):
        valley.tune(root, BLOCK | block, **(valley.TWO_CELLS | keys))
    assert (root / "trials.journal").read_bytes() == before and valley.Formula.trained == []


def test_a_study_of_the_other_direction_is_another_study(tmp_path):
    norms = {"name": "train/grad_norm", "better": "lower"}
    valley.tune(tmp_path, BLOCK, metric=norms)
    with pytest.raises(UserError, match="whose better is lower, but this one has higher"):
        valley.tune(tmp_path, BLOCK, metric=norms | {"better": "higher"})


def test_a_grid_with_other_points_is_another_study(tmp_path):
    def space(points: int) -> dict:
        rates = {"log": [0.001, 0.1], "points": points}
        return {"space": {"optim.lr": rates}, "sampler": "grid"}

    valley.tune(tmp_path, space(3))
    with pytest.raises(
        UserError, match=r"whose space is .* 0.1, 3\].*, but this one has .* 0.1, 5\]"
    ):
        valley.tune(tmp_path, space(5))


def test_a_study_that_others_made_is_not_taken_over(tmp_path):
    import optuna

    url = f"journal:{tmp_path}/theirs"
    theirs = optuna.create_study(study_name="valley/base", storage=open_storage(url))
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    before = (tmp_path / "theirs").read_bytes()
    with pytest.raises(UserError, match="holds a study 'valley/base' that ablab did not make"):
        valley.tune(tmp_path, BLOCK, url)
    assert (tmp_path / "theirs").read_bytes() == before


def test_a_larger_budget_adds_trials_and_keeps_the_old_ones(tmp_path):
    small, _, _ = valley.tune(tmp_path, BLOCK)
    old = valley.content(small)
    more, _, _ = valley.tune(tmp_path, BLOCK | {"trials_per_cell": 12})
    assert valley.content(more)[:8] == old
    assert len(valley.content(more)) == 12
    assert len(valley.Formula.trained) == 4


# -- optuna-dashboard --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("optuna_dashboard"), reason="needs optuna-dashboard"
)
def test_optuna_dashboard_opens_the_default_storage(tmp_path):
    valley.tune(tmp_path, BLOCK, None, **valley.TWO_CELLS)
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from optuna_dashboard._cli import main; main()",
        f"sqlite:///{tmp_path}/store/optuna.db",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def fetch(path: str) -> str:
        page = f"http://127.0.0.1:{port}{path}"
        return urllib.request.urlopen(page, timeout=60).read().decode()

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert "<title>Optuna Dashboard</title>" in fetch("/dashboard/")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (
                    "the dashboard did not start"
                )
                time.sleep(0.3)
        studies = {
            one["study_name"]: one["study_id"]
            for one in json.loads(fetch("/api/studies"))["study_summaries"]
        }
        assert set(studies) == {"valley/base", "valley/+ qk_norm"}
        page = json.loads(fetch(f"/api/studies/{studies['valley/base']}?after=0"))
        assert len(page["trials"]) == 8
    finally:
        server.terminate()
        server.wait(60)
