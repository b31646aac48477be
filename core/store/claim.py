"""Claims: who holds a run, among processes that share nothing but a folder.  No clock of another host is asked.

A claim is a folder that holds one file, and the name of that file is all it says:

    000007.free                              six owners before this one, who let it go
    000008.3f9c...e1.42.4711.a1b2c3d4.gpu3   held: token, beats, process, kernel and host of the eighth

Taking, beating, taking over and letting go are one rename each of the very name that was read.  A file system renames
a name once, on NFS too; who comes second finds it gone.  So one process wins, an owner whose name has changed knows at
its next beat that it is none any more, and a listing that was out of date costs an attempt and no harm.

An owner beats every BEAT seconds.  An observer who finds the same name at STALE_AFTER looks, BEAT seconds apart on its
own clock, takes it for dead; if it was only asleep, it steps aside before its next write (`Claim.beat`).  An owner of
this kernel whose process is gone is dead at once.
"""

import errno
import os
import re
import secrets
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

from ablab.core.store.files import lock_beside, set_aside, writing

BEAT = 2.0  # seconds
STALE_AFTER = 10  # looks that find no beat
LOOK_AGAIN = 0.02  # seconds, of those who wait for a file

OWNER = r"(?P<token>[0-9a-f]{16})\.(?P<beats>\d+)\.(?P<process>\d+)\.(?P<kernel>[0-9a-f]*)\.(?P<host>.+)"
NAME = re.compile(rf"(?P<number>\d{{6,}})\.(?:free|{OWNER})")
TAKEN = (
    errno.ENOTEMPTY,
    errno.EEXIST,
)  # what renaming a folder onto one that holds something says


class Lost(Exception):
    """The claim is another's: nothing more may be written."""

    def __init__(self, place: Path):
        super().__init__(f"{place} is held by another process")


@dataclass(frozen=True)
class State:
    """What the name of the file says."""

    number: int  # of owners so far: whose is higher came later
    token: str = ""  # of the owner; "": free
    beats: int = 0
    process: int = 0
    kernel: str = ""  # where that is its process
    host: str = ""

    @property
    def name(self) -> str:
        if not self.token:
            return f"{self.number:06d}.free"
        owner = f"{self.process}.{self.kernel}.{self.host}"
        return f"{self.number:06d}.{self.token}.{self.beats}.{owner}"

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone."""
        return self.kernel == _kernel() and not _is_alive(self.process)


def standing(place: Path) -> State | None:
    """None: nobody has held it yet, or somebody has emptied it."""
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        set_aside(place)
        return None
    states = [state for name in names if (state := _state(name))]
    return max(states, key=_age) if states else None


def _state(name: str) -> State | None:
    said = NAME.fullmatch(name)
    if said is None:
        return None
    number = int(said["number"])
    if not said["token"]:
        return State(number)
    return State(
        number,
        said["token"],
        int(said["beats"]),
        int(said["process"]),
        said["kernel"],
        said["host"],
    )


def _age(state: State) -> tuple[int, int]:
    return state.number, state.beats


@dataclass
class Watch:
    """What one process has seen of claims that others hold."""

    seen: dict[Path, tuple[str, float, int]] = field(default_factory=dict)  # name, when, looks

    def is_stale(self, place: Path, state: State) -> bool:
        """Look again.  Time in which nobody looked, asleep or without the disk, counts as one look."""
        now = time.monotonic()
        name, when, looks = self.seen.get(place, ("", 0.0, 0))
        if name != state.name:
            self.seen[place] = (state.name, now, 0)
        elif now - when >= BEAT:
            self.seen[place] = (name, now, looks + 1)
            return looks + 1 >= STALE_AFTER
        return False


# -- taking and keeping ------------------------------------------------------------------------------------------------
def take(place: Path, watch: Watch) -> "Claim | None":
    """The claim, if it is free or its owner dead; None where another holds it.  Raises UserError for a bad disk."""
    with writing(place):
        state = standing(place)
        if state is None:
            return _found(place)
        if state.token and not (state.is_dead or watch.is_stale(place, state)):
            return None
        own = _own(state.number + 1)
        try:
            os.rename(place / state.name, place / own.name)
        except FileNotFoundError:
            return None
        _tidy(place, own)
    return Claim(place, own)


def take_if_dead(place: Path) -> "Claim | None":
    """As `take`, after looking at the owner on another host for as long as it takes to know whether it lives."""
    watch = Watch()
    first = standing(place)
    while (claim := take(place, watch)) is None:
        state = standing(place)
        if state is None or state != first or state.kernel == _kernel():
            return None
        time.sleep(BEAT)
    return claim


def _own(number: int) -> State:
    return State(number, secrets.token_hex(8), 0, os.getpid(), _kernel(), _host())


def _found(place: Path) -> "Claim | None":
    """The first owner makes the folder with its name in it: it appears with both or not at all."""
    own = _own(1)
    apart = place.with_name(f"{place.name}.{own.token}")
    place.parent.mkdir(parents=True, exist_ok=True)
    apart.mkdir()
    try:
        (apart / own.name).touch()
        os.rename(apart, place)
    except OSError as refusal:
        shutil.rmtree(apart, ignore_errors=True)
        if refusal.errno in (*TAKEN, errno.ENOENT):
            return None
        raise
    _tidy(place, own)
    return Claim(place, own)


def _tidy(place: Path, own: State) -> None:
    """Remove what killed or foreign processes left: other names, and folders that never took the place."""
    for name in os.listdir(place):
        if name != own.name:
            _remove(place / name)
    for apart in place.parent.glob(f"{place.name}.{'[0-9a-f]' * 16}"):
        _remove(apart)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Claim:
    """A claim that is ours until it is let go, or lost."""

    def __init__(self, place: Path, state: State):
        self.place = place
        self.state = state
        self.changing = threading.Lock()  # it beats in a thread, and before every write
        self.over = threading.Event()

    def beat(self) -> None:
        """Say that we live, and make sure that it is still ours.  Raises Lost."""
        with self.changing:
            later = replace(self.state, beats=self.state.beats + 1)
            try:
                os.rename(self.place / self.state.name, self.place / later.name)
            except (FileNotFoundError, NotADirectoryError):
                # NFS may do what is asked and lose the answer; asked again, it finds the name gone.
                if not os.path.lexists(self.place / later.name):
                    raise Lost(self.place) from None
            except OSError:
                return  # the disk is away: what is written next says so
            self.state = later

    def is_lost(self) -> bool:
        try:
            self.beat()
        except Lost:
            return True
        return False

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Inside, it beats; at the end it is let go."""
        threading.Thread(target=self._beat_on, daemon=True).start()
        try:
            yield
        finally:
            self.release()

    def _beat_on(self) -> None:
        while not self.over.wait(BEAT):
            if self.is_lost():
                return

    def release(self) -> None:
        """Of a claim that was lost it changes nothing."""
        self.over.set()
        with self.changing, suppress(OSError):
            free = State(self.state.number)
            os.rename(self.place / self.state.name, self.place / free.name)


def place_beside(path: Path) -> Path:
    """Where to claim a file."""
    return path.with_name(f".{path.name}.claim")


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Wait until nobody else changes `path`; inside, nobody does.  For milliseconds: nothing tells who sleeps in here.

    A lock of the system first: of those who wait on this host, it wakes one, and nobody has to look.
    """
    from filelock import FileLock

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_beside(path))
        lock.acquire()
    try:
        watch = Watch()
        while (claim := take(place_beside(path), watch)) is None:
            time.sleep(LOOK_AGAIN)
        with claim.beating():
            yield
    finally:
        lock.release()


# -- who we are --------------------------------------------------------------------------------------------------------
def this_process() -> State:
    """Of no claim: by it, whoever runs on the same kernel can tell whether we live."""
    return _own(0)


@cache
def _host() -> str:
    return re.sub(r"[^\w.-]", "-", socket.gethostname())[:100] or "unknown"


@cache
def _kernel() -> str:
    """Where a process id means something: 8 hex digits of this boot and this process namespace; else of the machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        where = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        where = f"{uuid.getnode()} {_host()}"
    return sha256(where.encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    """A process that has ended, and that nobody has asked for its exit code, is not."""
    try:
        os.kill(process, 0)
        _, _, stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    except ProcessLookupError:
        return False
    except OSError:  # of another user: it is there
        return True
    return stat.split()[0] not in "ZX"
