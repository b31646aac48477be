"""The folder that holds everything ablab writes.  No torch here.

STORE/runs/ID/                a run's folder, `Record`; ID is the hash of its recipe
STORE/experiments/NAME.json   the plan: which cells an experiment wants, and which run answers each
STORE/studies/NAME.json       the record of a study (core/store/study_record.py)
STORE/ledger.jsonl            what was asked before the runs, and what was said after them (core/store/ledger.py)
"""

import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.claim import alone_with
from ablab.core.store.files import FLAWS, set_aside, write_atomically, writing
from ablab.core.store.planned import CATALOG, GridPlan, command
from ablab.core.store.record import Record

SHORTEST = 4  # digits of an id that may be typed for all of them
LISTED = 4  # runs in a sentence
SECONDS_TO_APPEAR = 5.0  # of a new file, on another host: NFS asks again after 3 s


class Store:
    """The folder, by what is asked of it."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def run(self, run_id: str) -> Record:
        return Record(self.root / "runs" / run_id, run_id)

    def run_ids(self) -> list[str]:
        """Of every run that has a folder, sorted; what is half removed is none (core/store/inventory.py)."""
        try:
            entries = list((self.root / "runs").iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )

    def id_of(self, beginning: str, unknown: str) -> str:
        """The one run whose id begins so.  Raises UserError: several, or none, where it ends in `unknown`."""
        known = self.run_ids()
        fitting = [run for run in known if run.startswith(beginning)]
        if len(beginning) < SHORTEST or not fitting:
            raise UserError(
                f"{beginning!r:.80} is not the id of one of {len(known)} runs in {self.root}, nor {SHORTEST} or more "
                f"of its first digits; {unknown}"
            )
        if len(fitting) > 1:
            several = ", ".join(fitting[:LISTED])
            raise UserError(
                f"{beginning!r} begins {len(fitting)} runs ({several}); type more of it"
            )
        return fitting[0]

    def plan_path(self, experiment: str) -> Path:
        return self.root / "experiments" / f"{experiment}.json"

    def write_plan(self, plan: GridPlan) -> None:
        """Raises UserError where the plan of that name is of another file; a folder in its place goes aside."""
        self.check_owner(plan.name, plan.sheet, plan.asked)
        path = self.plan_path(plan.name)
        if path.is_dir():
            set_aside(path)
        encoded = msgspec.json.encode(plan)
        write_atomically(path, msgspec.json.format(encoded, indent=1))

    def check_owner(
        self, experiment: str, sheet: str | None, asked: Sequence[str] = ()
    ) -> None:
        """Refuse a sheet whose name has the plan of another that still exists, unless they say the same.

        Refuse likewise a name that was given to something else that was asked of it.
        """
        try:
            plan = self.read_plan(experiment)
        except UserError:  # none, or a damaged one
            return
        owner = plan.sheet
        if plan.asked != list(asked) and _is_renamed([*plan.asked, *asked]):
            held = command(experiment, sheet=owner, asked=plan.asked)
            raise UserError(
                f"experiment {experiment!r} in {self.root} was asked for with other words: {held}; "
                "type these, or give another name"
            )
        if owner and sheet and not _same_sheet(owner, sheet):
            raise UserError(
                f"experiment {experiment!r} in {self.root} is that of {owner}, not of {sheet}; "
                "rename one of the files, or use another --store"
            )

    def change_plan(
        self,
        experiment: str,
        change: Callable[[GridPlan | None], GridPlan],
        say: Callable[[str], None],
    ) -> GridPlan:
        """Write and return `change(the plan as it stands, or None)`; one process at a time.

        A damaged plan is set aside, and `say` is told so.
        """
        path = self.plan_path(experiment)
        with alone_with(path), writing(path):
            plan = change(self._standing_plan(experiment, say))
            self.write_plan(plan)
        return plan

    def _standing_plan(self, experiment: str, say: Callable[[str], None]) -> GridPlan | None:
        path = self.plan_path(experiment)
        if not path.exists():
            return None
        try:
            return self.read_plan(experiment)
        except UserError as damage:
            say(f"{damage}; set aside as {set_aside(path).name}")
            return None

    def read_plan(self, experiment: str) -> GridPlan:
        """UserError when there is none, or a damaged one."""
        path = self.plan_path(experiment)
        again = command(experiment)
        try:
            return msgspec.json.decode(path.read_bytes(), type=GridPlan)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"experiment {experiment!r} has no runs in {self.root} (--store or $ABLAB_STORE names another); "
                f"start it with: {again}"
            ) from None
        except (IsADirectoryError, *FLAWS) as flaw:
            raise UserError(f"{path} is damaged ({flaw}); `{again}` writes it again") from None

    # -- seen from another host ------------------------------------------------------------------------------------
    def leave_token(self) -> str:
        """Leave a file that whoever works on this store elsewhere must see; its name."""
        token = secrets.token_hex(8)
        write_atomically(self._token_path(token), socket.gethostname().encode())
        return token

    def shared_with(self, token: str) -> None:
        """Raises UserError where this is not the store in which the token was left."""
        until = time.monotonic() + SECONDS_TO_APPEAR
        while not self._token_path(token).is_file():
            if time.monotonic() > until:
                raise UserError(
                    f"store {self.root} on {socket.gethostname()} is not the one that the runs are planned in; "
                    "give a --store in a folder that all hosts share, by one path"
                )
            time.sleep(0.1)

    def drop_token(self, token: str) -> None:
        """All have seen it."""
        self._token_path(token).unlink(missing_ok=True)

    def _token_path(self, token: str) -> Path:
        return self.root / ".shared" / token

    def experiments(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "experiments").glob("*.json"))


def _is_renamed(words: Sequence[str]) -> bool:
    return any(word.startswith("name=") for word in words)


def _same_sheet(owner: str, sheet: str) -> bool:
    """Whether a sheet may go on with the plan of `owner`: it is the same file, or was moved, or is a copy."""
    if owner == sheet:
        return True
    if CATALOG in (owner, sheet):
        return owner != CATALOG and not Path(owner).is_file()
    try:
        return Path(owner).read_bytes() == Path(sheet).read_bytes()
    except OSError:  # the owner's file has gone
        return True


def store_root(flag: str | None = None) -> Path:
    """Where ablab writes: the flag, else $ABLAB_STORE, else ./ablab-store."""
    return Path(flag or os.environ.get("ABLAB_STORE") or "ablab-store")
