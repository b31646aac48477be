"""Where studies are kept: SQLite, a journal file, PostgreSQL; what cannot be opened, or is another study's."""

import importlib.util
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from glob import glob
from pathlib import Path

import pytest

from ablab.core.errors import UserError
from ablab.experiments.tune.storage import open_storage

sys.path.append(str(Path(__file__).parent))
import valley  # noqa: E402

BINARIES = max(
    glob("/usr/lib/postgresql/*/bin"),
    default=str(Path(shutil.which("initdb") or "/nowhere/initdb").parent),
)
BLOCK = {"sampler": "tpe", "trials_per_cell": 8}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Postgres:
    """A server of our own, on 127.0.0.1, with a password; initdb refuses root, so root hands over to `nobody`."""

    def __init__(self, root: Path):
        self.folder, self.port = root / "data", free_port()
        self.user = (
            {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
            if os.getuid() == 0
            else {}
        )
        secret = root / "secret"
        secret.write_text("se:cret")
        for place in (root, secret):
            if self.user:
                shutil.chown(place, "nobody")
        self._call(
            "initdb",
            "-D",
            self.folder,
            "-U",
            "ablab",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
        )
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._call(
            "pg_ctl", "-D", self.folder, "-w", "-l", root / "log", "-o", options, "start"
        )
        self.url = f"postgresql+psycopg2://ablab:se%3Acret@127.0.0.1:{self.port}/postgres"

    def _call(self, name: str, *words) -> None:
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        done = subprocess.run(
            [f"{BINARIES}/{name}", *map(str, words)], cwd="/", **pipes, **self.user
        )
        assert done.returncode == 0, done.stdout

    def stop(self) -> None:
        self._call("pg_ctl", "-D", self.folder, "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    if not Path(BINARIES, "initdb").exists():
        pytest.skip("PostgreSQL's initdb is not installed here")
    if not importlib.util.find_spec("psycopg2"):
        pytest.skip("needs psycopg2-binary")
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


def test_a_file_that_is_no_database_is_named_and_kept(tmp_path):
    (tmp_path / "notes.db").write_text("my notes\n" * 100)
    with pytest.raises(UserError, match="notes.db cannot be opened .*not a database"):
        valley.tune(tmp_path, BLOCK, f"sqlite:///{tmp_path}/notes.db")
    assert (tmp_path / "notes.db").read_text() == "my notes\n" * 100


def test_a_journal_whose_lock_outlived_its_process_opens_within_seconds(tmp_path):
    valley.tune(tmp_path, BLOCK)
    (tmp_path / "trials.journal.lock").symlink_to(tmp_path / "trials.journal")
    began = time.monotonic()
    _, record, _ = valley.tune(tmp_path, BLOCK | {"trials_per_cell": 9})
    assert len(record.trials) == 9
    assert 4 < time.monotonic() - began < 25


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
        (
            {},
            {"metric": {"name": "val/loss", "better": "higher"}},
            "whose better is lower, but this one has higher",
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
        return urllib.request.urlopen(page, timeout=20).read().decode()

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
        server.wait(10)
