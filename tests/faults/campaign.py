"""Hundreds of seeded faults, each followed by the same command, whose outcome must be the undisturbed one.

    python tests/faults/campaign.py                        all of them (`make faults`), about 330
    python tests/faults/campaign.py --times 0.1            a tenth of each kind, at least one
    python tests/faults/campaign.py --only 'runner killed' --number 13 --keep      one again, and its folder kept

Compared are identities, digests of weights, every line of metrics, plans, reports, kept weights, MLflow's rows and the
names of all files; no process may outlive its command, and nothing may stay in the temporary folder.  Of a loss the
whole difference is printed, and kept as lost.txt in its folder (`--keep`).  The table says how often each kind was
done and survived.  Exit code 1: something was lost.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the order of sums depends on it

sys.path.insert(0, str(Path(__file__).parent))
import kinds  # noqa: E402
import processes  # noqa: E402
import servers  # noqa: E402, F401  registers kinds of its own
from kinds import KINDS, REFUSED, Case, Kind  # noqa: E402
from scenes import SCENES, Lab, Left, Scene, differences, furnish  # noqa: E402

from ablab.experiments.track.mlflow_home import create_database  # noqa: E402


class Lost(Exception):
    """Something is not as in the calm run: all of it, a line each, and what the last command said."""


@dataclass
class Calm:
    """A scene that nobody disturbed."""

    lab: Lab
    left: Left
    temporary: list[str]  # what stays in the temporary folder all the same
    seconds: float


@dataclass
class Campaign:
    root: Path
    seed: int = 0
    keep: bool = False
    calm: dict[str, Calm] = field(default_factory=dict)
    half: dict[str, Lab] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)  # kind -> why

    def prepare(self, scenes: set[str]) -> None:
        """The lab that each fault begins in, and one of another experiment.  scenes: what will be asked."""
        self.fresh = furnish(self.root / "fresh")
        if "shown" in scenes:
            made = self.fresh.run(("list",), before=partial(create_database, self.fresh.store))
            assert made.code == 0, made  # MLflow's empty database, once: 3 s
            shutil.move(self.fresh.store / "mlflow.db", self.fresh.root / "empty.db")
        self.other = self.fresh.copy(self.root / "other")
        sheet = self.other.root / "grid.yaml"
        sheet.write_text(sheet.read_text().replace('"seeds": [0]', '"seeds": [7]'))
        if scenes & {"study", "journal"}:
            assert SCENES["study"].run(self.other).code == 0
        self._kill_late(self.other, SCENES["grid"])

    def calm_of(self, name: str) -> Calm:
        """Of a scene, undisturbed; once."""
        if name not in self.calm:
            lab = self._furnished(self.root / f"calm-{name}", SCENES[name])
            began = time.monotonic()
            ended = SCENES[name].run(lab)
            seconds = time.monotonic() - began
            assert ended.code == 0, ended
            left = SCENES[name].left(lab)
            self.calm[name] = Calm(lab, left, sorted(os.listdir(lab.temporary)), seconds)
        return self.calm[name]

    def _furnished(self, root: Path, scene: Scene) -> Lab:
        lab = self.fresh.copy(root)
        if scene.name == "shown":
            shutil.copy(lab.root / "empty.db", lab.store / "mlflow.db")
        return lab

    def lab_of(self, kind: Kind, root: Path) -> Lab:
        """A copy of the state in which the kind begins."""
        scene = SCENES[kind.scene]
        if kind.state == "fresh":
            return self._furnished(root, scene)
        if kind.state == "whole":
            return self.calm_of(kind.scene).lab.copy(root)
        if kind.scene not in self.half:
            halved = self._furnished(self.root / f"half-{kind.scene}", scene)
            self._kill_late(halved, scene)
            self.half[kind.scene] = halved
        return self.half[kind.scene].copy(root)

    def _kill_late(self, lab: Lab, scene: Scene) -> None:
        """Stop the scene in its second run, with two checkpoints to go on from."""
        running = scene.start(lab, before=_stop_at_the_second_run)
        running.end()
        assert lab.files("runs/*/checkpoints/step-*"), "it was stopped before it saved"
        assert lab.files("runs/*/result.json"), "it was stopped in its first run"

    # -- one fault -------------------------------------------------------------------------------------------------
    def do(self, kind: Kind, number: int) -> None:
        draw = random.Random(f"{self.seed}/{kind.name}/{number}")  # noqa: S311  not a secret
        began = time.monotonic()
        print(f"{kind.name} {number} ", end="", flush=True)
        root = self.root / "fault"
        lost = ""
        try:
            calm = self.calm_of(kind.scene)
            lab = self.lab_of(kind, root)
            case = Case(draw, lab, SCENES[kind.scene], calm.seconds, self.other)
            self._survive(kind, case, calm)
        except servers.NotHere as why:
            self.skipped[kind.name] = str(why)
            print(f"not done: {why}")
            return
        except Exception as loss:
            place = traceback.extract_tb(loss.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            lost = f"{type(loss).__name__} at {where}: {loss}"
        finally:
            if lost and self.keep:
                kept = self.root / f"lost-{kind.name}-{number}".replace(" ", "-")
                shutil.move(root, kept)
                (kept / "lost.txt").write_text(lost + "\n")
            shutil.rmtree(root, ignore_errors=True)
        self.done[kind.name] += 1
        self.survived[kind.name] += not lost
        print(f"LOST: {lost}" if lost else "survived", f"({time.monotonic() - began:.1f} s)")

    def _survive(self, kind: Kind, case: Case, calm: Calm) -> None:
        """Do the harm, give the command again, and compare.  Raises whatever was lost."""
        cure = kind.does(case)
        if case.scene.once:  # it may have ended before it could be disturbed
            shutil.rmtree(case.lab.store / case.scene.once, ignore_errors=True)
        ended = case.scene.run(case.lab, environment=case.environment)
        if cure and case.may_refuse and ended.code == REFUSED:
            kinds.check(ended, REFUSED)
            cure()
            ended = case.scene.run(case.lab, environment=case.environment)
        kinds.check(ended, 0)
        if case.after:
            kinds.check(case.lab.run(case.after), 0)
        left = case.scene.left(case.lab)
        lost = differences(calm.left, left, case.forgiven)
        if case.forgiven and not _said(case.forgiven, ended.said, left):
            lost += differences(calm.left, left)
        litter = sorted(set(os.listdir(case.lab.temporary)) - set(calm.temporary))
        if litter:
            lost.append(f"litter in the temporary folder: {litter}")
        if lost:
            raise Lost("\n  ".join(["", *lost, f"it said: {ended.said}"]))

    # -- what came of it -------------------------------------------------------------------------------------------
    def table(self) -> str:
        rows = [("fault", "times", "survived")]
        for name in KINDS:
            if self.done[name]:
                rows.append((name, str(self.done[name]), str(self.survived[name])))
        rows.append(("all", str(self.done.total()), str(self.survived.total())))
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:<{width}}  {times:>5}  {well:>8}" for name, times, well in rows]
        lines += [f"not done: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def _said(forgiven: str, said: str, left: Left) -> bool:
    """Whether what cannot be restored was named, by the command and by every report."""
    reports = [lines for key, lines in left.items() if key.endswith(f"lost {forgiven}")]
    return forgiven in said and all(reports)


def _stop_at_the_second_run() -> None:
    """In the process of the runner: its second worker's run ends with a kill, at step 12, with two checkpoints."""
    from ablab.core.train import run, trainer

    real = trainer.Trainer.advance
    advanced = Counter[int]()

    def advance(self):
        advanced[0] += 1
        if advanced[0] == 20 + 12:
            os.kill(os.getppid(), 9)
            os.kill(os.getpid(), 9)
        return real(self)

    trainer.Trainer.advance = advance
    run.Loop._is_due = lambda self: self.trainer.step % 3 == 0


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", action="append", help="a kind; repeat for more")
    asked.add_argument("--times", type=float, default=1.0, help="of the usual number (1)")
    asked.add_argument("--most", type=int, help="of each kind")
    asked.add_argument("--number", type=int, help="this one of each kind alone")
    asked.add_argument("--keep", action="store_true", help="keep the folders of what was lost")
    words = asked.parse_args()
    processes.warm_up()
    root = Path(tempfile.mkdtemp(prefix="ablab-faults-"))
    campaign = Campaign(root, words.seed, words.keep)
    try:
        chosen = [kind for kind in KINDS.values() if not words.only or kind.name in words.only]
        campaign.prepare({kind.scene for kind in chosen})
        for kind in chosen:
            times = min(max(round(kind.times * words.times), 1), words.most or kind.times)
            for number in range(times) if words.number is None else [words.number]:
                campaign.do(kind, number)
    finally:
        print(f"\n{campaign.table()}")
        servers.stop()
        if campaign.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 0 if campaign.survived == campaign.done else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # libraries complain of what a process that forked still holds
