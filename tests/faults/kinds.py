"""The kinds of faults: each does its harm to a command or to what it left; what follows is the same command again.

A kind is a function of a `Case`, registered with the scene that it disturbs, the state of the store in which it begins
(fresh, half: a grid killed in its second run, whole: a grid that has ended) and how often the campaign does it.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from processes import Running
from scenes import Lab, Scene

Cure = Callable[[], None]
Harm = Callable[["Case"], Cure | None]
REFUSED = 2  # the exit code of a request that cannot be met
NEVER_SAYS = ("Traceback (most recent call last)",)


@dataclass
class Case:
    """One fault to do."""

    draw: random.Random
    lab: Lab
    scene: Scene
    seconds: float  # that the scene takes undisturbed
    other: Lab  # where another experiment has run: what is taken from there is foreign
    # Set by the harm: the command may refuse with exit code 2 until the cure is applied.
    may_refuse: bool = False
    environment: dict[str, str] = field(default_factory=dict)  # of its commands
    after: tuple[str, ...] = ()  # a command that brings the view up to date in the end
    foreign: list[Path] = field(default_factory=list)  # what is refused until it is moved away
    forgiven: str = ""  # what need not be as it was: what is told of it ends so

    def move_away(self) -> None:
        for path in self.foreign:
            path.unlink()

    def begin(self, **how) -> Running:
        environment = self.environment | how.pop("environment", {})
        return self.scene.start(self.lab, environment=environment, **how)

    def begin_and_wait(self, **how) -> Running:
        """Until a moment anywhere in the command's time."""
        running = self.begin(**how)
        until = time.monotonic() + self.draw.uniform(0, 1.1 * self.seconds)
        while time.monotonic() < until and not running.is_over():
            time.sleep(0.002)
        return running

    def begin_and_log(self, **how) -> Running:
        """Until some run has logged so many lines: a moment in the midst of training."""
        running = self.begin(**how)
        lines = self.draw.randint(1, 50)
        while not running.is_over() and self.logged() < lines:
            time.sleep(0.001)
        return running

    def logged(self) -> int:
        return sum(
            path.read_bytes().count(b"\n") for path in self.lab.files("runs/*/metrics.jsonl")
        )


@dataclass(frozen=True)
class Kind:
    name: str
    does: Harm
    scene: str
    state: str
    times: int


KINDS: dict[str, Kind] = {}


def kind(times: int, scene: str = "grid", state: str = "fresh", name: str = ""):
    """Register a function as a kind of fault."""

    def note(does: Harm) -> Harm:
        called = name or does.__name__
        KINDS[called] = Kind(called, does, scene, state, times)
        return does

    return note


# -- signals -----------------------------------------------------------------------------------------------------------
def signalled(sign: signal.Signals, expected: tuple[int, ...], **how) -> Harm:
    def does(case: Case) -> None:
        moment = case.draw.choice([case.begin_and_wait, case.begin_and_log])
        running = moment(**how)
        running.send(sign)
        check(running.end(), 0, *expected)

    return does


def check(ended, *codes: int) -> None:
    """Even a disturbed command ends with a code that the pages name, and without a traceback."""
    assert ended.code in codes, (ended.code, codes, ended.said)
    assert not any(word in ended.said for word in NEVER_SAYS), ended.said


kind(28, name="runner killed")(signalled(signal.SIGKILL, (-signal.SIGKILL,)))
# 130: before the command has begun to listen, where there is nothing to save.
kind(16, name="runner terminated")(signalled(signal.SIGTERM, (75, 130, -signal.SIGTERM)))
kind(16, name="Ctrl-C")(signalled(signal.SIGINT, (75, 130)))
kind(8, name="a SLURM warning")(signalled(signal.SIGUSR1, (75, -signal.SIGUSR1)))
kind(6, name="runner of two jobs killed", scene="two")(
    signalled(signal.SIGKILL, (-signal.SIGKILL,))
)
kind(6, name="killed while checking that arms are alive", scene="checked")(
    signalled(signal.SIGKILL, (-signal.SIGKILL,))
)
kind(6, name="killed, started anew", scene="grid")(
    signalled(signal.SIGKILL, (-signal.SIGKILL,), anew=True)
)
kind(6, name="Ctrl-C, started anew", scene="grid")(
    signalled(signal.SIGINT, (75, 130, -signal.SIGINT), anew=True)
)
kind(10, name="killed while MLflow is shown", scene="shown")(
    signalled(signal.SIGKILL, (-signal.SIGKILL,))
)
kind(10, name="study killed", scene="study")(signalled(signal.SIGKILL, (-signal.SIGKILL,)))
kind(6, name="study on a journal killed", scene="journal")(
    signalled(signal.SIGKILL, (-signal.SIGKILL,))
)
kind(4, name="study interrupted", scene="study")(signalled(signal.SIGINT, (75, 130)))
kind(8, name="tokenizing killed", scene="tokens")(signalled(signal.SIGKILL, (-signal.SIGKILL,)))
kind(3, name="tokenizing interrupted", scene="tokens")(signalled(signal.SIGINT, (130,)))


@kind(8, name="Ctrl-C twice")
def interrupted_twice(case: Case) -> None:
    running = case.begin_and_wait()
    running.send(signal.SIGINT)
    time.sleep(case.draw.uniform(0, 0.2))
    running.send(signal.SIGINT)
    check(running.end(), 0, 75, 130, -signal.SIGINT)


@kind(14, name="all its processes killed")
def all_killed(case: Case) -> None:
    running = case.begin_and_log()
    running.send_to_all(signal.SIGKILL)
    running.end()


@kind(18, name="worker killed, as for lack of memory")
def worker_killed(case: Case) -> None:
    running = case.begin_and_log()
    for worker in running.workers()[:1]:
        running.send(signal.SIGKILL, worker)
    check(running.end(), 0, 1)


@kind(8, name="stopped for a while")
def stopped(case: Case) -> None:
    """A laptop that sleeps: everything stands still, then goes on."""
    running = case.begin_and_log()
    running.send_to_all(signal.SIGSTOP)
    time.sleep(case.draw.uniform(0.05, 0.5))
    running.send_to_all(signal.SIGCONT)
    check(running.end(), 0)


# -- copies ------------------------------------------------------------------------------------------------------------
@kind(12, name="copies at once")
def copies(case: Case) -> None:
    """Two or three of the same command."""
    together = [case.begin() for _ in range(case.draw.randint(2, 3))]
    for one in together:
        check(one.end(), 0)


@kind(8, name="copies, the first killed")
def copies_and_a_kill(case: Case) -> None:
    first = case.begin_and_log()
    second = case.begin()
    time.sleep(case.draw.uniform(0, 0.3))
    first.send_to_all(signal.SIGKILL)
    first.end()
    check(second.end(), 0)


@kind(4, name="copies of a study", scene="study")
def copies_of_a_study(case: Case) -> None:
    """The second is refused while the first tunes."""
    together = [case.begin() for _ in range(2)]
    codes = [one.end().code for one in together]
    assert set(codes) <= {0, REFUSED}, codes
    assert 0 in codes, codes


@kind(3, name="tokenizing twice at once", scene="tokens")
def tokenizing_twice(case: Case) -> None:
    together = [case.begin() for _ in range(2)]
    assert sorted(one.end().code for one in together) == [0, REFUSED]


# -- disk --------------------------------------------------------------------------------------------------------------
@kind(14, name="files cannot grow")
def files_cannot_grow(case: Case) -> None:
    """As under a quota: a write beyond a size fails with EFBIG."""
    most = int(10 ** case.draw.uniform(2, 4.7))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    case.begin(
        before=limit
    ).end()  # with any code: its own words go into a file, which cannot grow either


@kind(12, name="disk full at a write")
def disk_full(case: Case) -> None:
    check(
        case.begin(before=lambda: fill_disk(after=case.draw.randint(0, 40))).end(),
        0,
        1,
        REFUSED,
    )


@kind(4, name="disk full while tokenizing", scene="tokens")
def disk_full_while_tokenizing(case: Case) -> None:
    most = int(10 ** case.draw.uniform(1, 5))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    case.begin(before=limit).end()


def fill_disk(after: int) -> None:
    """From its `after`-th whole file on, this process and its workers find no room."""
    real = os.fsync
    left = after

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync


@kind(6, name="a small disk, full")
def small_disk(case: Case) -> None:
    """A store on a disk of some hundred KiB, where this user may mount one."""
    store = case.lab.store
    size = case.draw.randint(40, 500)
    kept = store.rename(store.with_name("kept"))
    store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(store)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        store.rmdir()
        kept.rename(store)
        return disk_full(case)
    try:
        with suppress(shutil.Error, OSError):
            shutil.copytree(kept, store, dirs_exist_ok=True)
        check(case.begin().end(), 0, 1, REFUSED)
        shutil.copytree(store, kept, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", str(store)], check=True)
    store.rmdir()
    kept.rename(store)
    if not (store / "data" / "tiny" / "meta.json").exists():
        shutil.copytree(case.other.store / "data", store / "data", dirs_exist_ok=True)


# -- damaged and foreign files -----------------------------------------------------------------------------------------
RECORDS = {  # what a run leaves, and what a store holds besides
    "recipe": "runs/*/recipe.yaml",
    "run": "runs/*/run.json",
    "result": "runs/*/result.json",
    "metrics": "runs/*/metrics.jsonl",
    "pace": "runs/*/pace.jsonl",
    "mark": "runs/*/interrupted.json",
    "held out": "runs/*/held_out.npz",
    "checkpoint": "runs/*/checkpoints/step-*",
    "plan": "experiments/*.json",
    "liveness": "liveness.json",
    "verified": "data/tiny/.verified.json",
    "claim": "runs/*/.claim/*",
    "lock of a plan": "experiments/.*.lock",
}
OF_TOKENS = {
    "train": "data/tiny/train.bin",
    "val": "data/tiny/val.bin",
    "bytes": "data/tiny/token_bytes.npy",
    "meta": "data/tiny/meta.json",
}
OF_A_STUDY = {
    "study": "studies/*.json",
    "plan of trials": "experiments/*@study.json",
    "trials": "optuna.db",
}


# What nobody can know again, and no verdict rests on; that it is lost must be said.
FORGIVEN = {"pace.jsonl": "pace"}


def damage(path: Path, case: Case) -> None:
    """One of many ways in which a file is not what was written there.

    A plan of another sheet is refused: it is not ours to overwrite.
    """
    draw = case.draw
    content = path.read_bytes()
    place = draw.randrange(len(content)) if content else 0
    foreign = case.other.files(str(Path("**") / path.name)) or case.other.files("**/*.json")
    ways: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(content[:place]),
        "emptied": lambda: path.write_bytes(b""),
        "a byte changed": lambda: path.write_bytes(
            content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
        ),
        "not UTF-8": lambda: path.write_bytes(content[:place] + b"\xff\xfe" + content[place:]),
        "zeros": lambda: path.write_bytes(b"\0" * len(content)),
        "noise": lambda: path.write_bytes(draw.randbytes(200)),
        "a list": lambda: path.write_bytes(b"[1, 2]"),
        "a number": lambda: path.write_bytes(b"3\n"),
        "an object": lambda: path.write_bytes(b'{"step": "x", "run": 3, "rows": {}}\n'),
        "deep": lambda: path.write_bytes(b"[" * 100_000),
        "doubled": lambda: path.write_bytes(content + content),
        "a line lost": lambda: path.write_bytes(_without_a_line(content, draw)),
        "deleted": path.unlink,
        "a folder": lambda: (path.unlink(), (path / "inner").mkdir(parents=True)),
        "a dead link": lambda: (path.unlink(), path.symlink_to("nowhere/at/all")),
        "of another": lambda: shutil.copy(draw.choice(foreign), path),
    }
    way = draw.choice(list(ways))
    print(f"[{path.name}: {way}]", end=" ", flush=True)
    case.forgiven = FORGIVEN.get(path.name, case.forgiven)
    ways[way]()
    if way == "of another" and path.parent.name == "experiments":
        case.may_refuse = True
        case.foreign.append(path)


def _without_a_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    if lines:
        del lines[draw.randrange(len(lines))]
    return b"".join(lines)


def damaged(records: dict[str, str], count: int = 1) -> Harm:
    def does(case: Case) -> Cure:
        found: list[Path] = []
        while not found:
            found = case.lab.files(records[case.draw.choice(list(records))])
        for path in case.draw.sample(found, min(count, len(found))):
            damage(path, case)
        return case.move_away

    return does


kind(44, name="a record of ended runs damaged", state="whole")(damaged(RECORDS))
kind(44, name="a record of a run on its way damaged", state="half")(damaged(RECORDS))
kind(12, name="several records damaged", state="half")(damaged(RECORDS, count=3))


@kind(10, name="tokens damaged", state="half")
def tokens_damaged(case: Case) -> Cure:
    """They are what a number is of: they are refused until they are restored."""
    tokens = case.lab.store / "data" / "tiny"
    case.may_refuse = True
    damaged(OF_TOKENS)(case)

    def restore() -> None:
        shutil.rmtree(tokens)
        shutil.copytree(case.other.store / "data" / "tiny", tokens)

    return restore


@kind(8, name="the ledger damaged", state="half")
def ledger_damaged(case: Case) -> Cure:
    """What was registered is refused when it was edited, until it is restored."""
    ledger = case.lab.store / "ledger.jsonl"
    whole = ledger.read_bytes()
    case.may_refuse = True
    damage(ledger, case)

    def restore() -> None:
        shutil.rmtree(ledger) if ledger.is_dir() else ledger.unlink(missing_ok=True)
        ledger.write_bytes(whole)

    return restore


@kind(10, name="a record of a study damaged", scene="study", state="whole")
def study_damaged(case: Case) -> Cure:
    case.may_refuse = True
    damaged(OF_A_STUDY)(case)

    def move_away() -> None:
        trials = case.lab.store / "optuna.db"
        shutil.rmtree(trials) if trials.is_dir() else trials.unlink(missing_ok=True)

    return move_away


@kind(8, name="a journal damaged", scene="journal", state="whole")
def journal_damaged(case: Case) -> Cure:
    case.may_refuse = True
    journal = case.lab.root / "trials.journal"
    damage(journal, case)

    def move_away() -> None:
        shutil.rmtree(journal) if journal.is_dir() else journal.unlink(missing_ok=True)

    return move_away


@kind(8, name="a folder of records gone", state="half")
def folder_gone(case: Case) -> None:
    folders = [*case.lab.store.glob("runs/*"), *case.lab.store.glob("runs/*/checkpoints")]
    folders += [case.lab.store / "experiments", case.lab.store / "runs"]
    shutil.rmtree(case.draw.choice(folders))


@kind(8, name="files changed while it runs")
def changed_while_running(case: Case) -> None:
    """Its own logs and records, cut or gone under its feet; the run may be lost, the next call makes it whole."""
    running = case.begin_and_log()
    found = case.lab.files("runs/*/*.jsonl") + case.lab.files("runs/*/run.json")
    if found and not running.is_over():
        path = case.draw.choice(found)
        case.forgiven = FORGIVEN.get(path.name, "")  # it may be of a run that has ended
        way = case.draw.choice(["cut", "gone"])
        with suppress(FileNotFoundError):
            os.truncate(path, path.stat().st_size // 2) if way == "cut" else path.unlink()
    check(running.end(), 0, 1)


@kind(6, name="the checkpoint of another run", state="half")
def foreign_checkpoint(case: Case) -> None:
    """Under the name of its own, newer than all."""
    (mine, *_) = sorted(case.lab.store.glob("runs/*/checkpoints"))
    stranger = case.draw.choice(case.other.files("**/checkpoints/step-*"))
    tail = stranger.name.split("-", 2)[2]
    shutil.copy(stranger, mine / f"step-{case.draw.choice([1, 9, 19]):08d}-{tail}")


# -- clocks ------------------------------------------------------------------------------------------------------------
@kind(8, name="files dated in the future or the past", state="half")
def odd_dates(case: Case) -> None:
    for path in case.lab.files("**/*"):
        day = case.draw.choice([-4000, -1, 0, 1, 4000])
        when = time.time() + 86400 * day
        os.utime(path, (when, when))


@kind(6, name="the clock set back or forth")
def odd_clock(case: Case) -> None:
    shift = case.draw.choice([-1, 1]) * 10 ** case.draw.uniform(1, 8)
    real = time.time

    def set_clock() -> None:
        time.time = lambda: max(real() + shift, 0.0)

    running = case.begin(before=set_clock)
    wait = time.monotonic() + case.draw.uniform(0.3, 1) * case.seconds
    while time.monotonic() < wait and not running.is_over():
        time.sleep(0.002)
    running.send(signal.SIGKILL)
    running.end()


@kind(4, name="a failure dated in the future", state="half")
def failure_in_the_future(case: Case) -> None:
    for folder in case.lab.store.glob("runs/*"):
        result = {"run": folder.name, "status": "failed", "step": 0, "tokens": 0, "error": "x"}
        path = folder / "result.json"
        if not path.exists():
            path.write_text(json.dumps(result))
            when = time.time() + 86400 * 400
            os.utime(path, (when, when))


# -- memory ------------------------------------------------------------------------------------------------------------
@kind(10, name="memory runs out")
def out_of_memory(case: Case) -> None:
    """No process of it may map more than it has and some MiB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = used + int(2**20 * case.draw.uniform(0.2, 40))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    ended = case.begin(before=limit).end()
    assert ended.code in (0, 1, REFUSED, -signal.SIGABRT, -signal.SIGSEGV), ended


# -- plugins -----------------------------------------------------------------------------------------------------------
BREAKS = {
    "raises at import": ('"""Halve', 'raise ValueError("at import")\n"""Halve'),
    "leaves at import": ('"""Halve', 'import sys; sys.exit()\n"""Halve'),
    "no Python": ("def stage", "def def stage"),
    "raises where it is applied": ("        return edit", "        1 / 0\n        return edit"),
    "raises where it is built": ("        return Stage", "        1 / 0\n        return Stage"),
    "raises in the forward": ("    return y * 0.5", "    1 / 0\n    return y * 0.5"),
    "leaves in the forward": ("    return y * 0.5", "    raise SystemExit\n    return y * 0.5"),
    "dies in the forward": (
        "    return y * 0.5",
        "    import os; os._exit(7)\n    return y * 0.5",
    ),
    "gives nothing": ("    return y * 0.5", "    return None"),
    "is another idea": ("    return y * 0.5", "    return y * 0.25"),
}


@kind(10, name="a plugin that breaks, then mended", scene="own")
def plugin_breaks(case: Case) -> None:
    """What it left under its other identity is another run's; the mended file is the first one."""
    path = case.lab.root / "plugins" / "halved.py"
    whole = path.read_text()
    way = case.draw.choice(list(BREAKS))
    print(f"[{way}]", end=" ", flush=True)
    path.write_text(whole.replace(*BREAKS[way], 1))
    check(case.begin().end(), 0, 1, REFUSED)
    path.write_text(whole)
    shutil.rmtree(case.lab.store / "runs", ignore_errors=True)


@kind(6, name="a plugin changed while it runs", scene="own")
def plugin_changes(case: Case) -> None:
    path = case.lab.root / "plugins" / "halved.py"
    whole = path.read_text()
    running = (
        case.begin_and_log()
    )  # before it has planned, another thought is another run, and a sound one
    path.write_text(whole + "\n# another thought\n")
    check(running.end(), 0, REFUSED)
    path.write_text(whole)


# -- MLflow ------------------------------------------------------------------------------------------------------------
SYNC = ("sync",)


@kind(6, name="MLflow's database damaged", scene="shown", state="whole")
def database_damaged(case: Case) -> None:
    """A view: it is deleted, and made anew from the run folders."""
    database = case.lab.store / "mlflow.db"
    damage(database, case)
    check(case.begin().end(), 0)
    shutil.rmtree(database) if database.is_dir() else database.unlink(missing_ok=True)
    shutil.copy(case.other.root / "empty.db", database)
    shutil.rmtree(case.lab.store / "mlartifacts", ignore_errors=True)
    case.after = SYNC


@kind(4, name="MLflow's database locked", scene="shown")
def database_locked(case: Case) -> None:
    held = sqlite3.connect(case.lab.store / "mlflow.db", isolation_level=None)
    held.execute("begin exclusive")
    running = case.begin_and_log()
    time.sleep(0.3)
    held.execute("rollback")
    held.close()
    check(running.end(), 0)
    case.after = SYNC


def with_server(behaviour: str) -> Harm:
    """MLflow at a server that refuses, hangs, talks nonsense, or dies after the first answers."""

    def does(case: Case) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        uri = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
        if behaviour == "refuses":
            server.close()
        pid = 0
        if behaviour in ("talks nonsense", "hangs up"):
            pid = os.fork()
            if not pid:
                _answer(server, behaviour)
        check(case.begin(environment=uri).end(), 0)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        server.close()

    return does


def _answer(server: socket.socket, behaviour: str) -> None:
    try:
        while True:
            connection, _ = server.accept()
            if behaviour == "talks nonsense":
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{nope")
            connection.close()
    finally:
        os._exit(0)


kind(2, name="MLflow's server refuses", scene="shown")(with_server("refuses"))
kind(2, name="MLflow's server hangs", scene="shown")(with_server("hangs"))
kind(2, name="MLflow's server talks nonsense", scene="shown")(with_server("talks nonsense"))
kind(2, name="MLflow's server hangs up", scene="shown")(with_server("hangs up"))


@kind(6, name="sync killed", scene="shown", state="whole")
def sync_killed(case: Case) -> None:
    """The view is made anew from the folders, and its maker killed at any moment."""
    shutil.copy(case.other.root / "empty.db", case.lab.store / "mlflow.db")
    running = case.lab.start(SYNC)
    until = time.monotonic() + case.draw.uniform(0, case.seconds)
    while time.monotonic() < until and not running.is_over():
        time.sleep(0.002)
    running.send(signal.SIGKILL)
    running.end()
    case.after = SYNC


# -- locks -------------------------------------------------------------------------------------------------------------
@kind(6, name="a run held by another process for a while", state="half")
def held_for_a_while(case: Case) -> None:
    from ablab.core.store.claim import Watch, take

    (folder, *_) = sorted(case.lab.store.glob("runs/*"))
    claim = take(folder / ".claim", Watch())
    assert claim, "nobody holds it"
    running = case.begin()
    time.sleep(case.draw.uniform(0.1, 1))
    claim.release()
    check(running.end(), 0)
