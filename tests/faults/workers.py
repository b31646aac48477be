"""Five `ablab run` of one sheet on one folder, as on five hosts: two are killed, one sleeps until another has its run.

    python tests/faults/workers.py                24 runs (`make workers`), about half a minute
    python tests/faults/workers.py --seeds 2      6 of them

Each takes the others for processes of hosts that it cannot see, and their clocks differ by hours, so that beats alone
tell who lives.  Every run must finish exactly once, to the ids, bits and report of one undisturbed call; who slept must
step aside without a word in a record.  Exit code 1: something was lost.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the order of sums depends on it

sys.path.insert(0, str(Path(__file__).parent))
import processes  # noqa: E402
from processes import PATIENCE, Running, wait_for  # noqa: E402
from scenes import GRID, Lab, differences, furnish, of_runs  # noqa: E402

from ablab.core.store import claim  # noqa: E402
from ablab.core.store.claim import State, standing  # noqa: E402

WORDS = ("run", "many.yaml", "--run-inert", "--no-mlflow", "--json", "--jobs", "1")
HOSTS = 5
BEAT = 0.2  # seconds: ten times as fast as they are


@dataclass(frozen=True)
class Host:
    """What one of the commands takes itself for, set in its process before it begins."""

    number: int
    finished: Path  # a line for each run that it finished

    @property
    def name(self) -> str:
        return f"host{self.number}"

    def __call__(self) -> None:
        from ablab.core.store.record import Record
        from ablab.experiments.run import workers as local

        claim.BEAT = BEAT
        local.PATIENCE = BEAT / 2
        claim._kernel = lambda: f"{self.number:08x}"
        claim._host = lambda: self.name
        real_time = time.time
        time.time = lambda: real_time() + 3600 * (self.number - 2)
        real_finish = Record.finish

        def finish(record: Record, result) -> None:
            real_finish(record, result)
            with open(self.finished, "a") as file:
                file.write(f"{result.run} {self.name}\n")

        Record.finish = finish


@dataclass
class Workers:
    lab: Lab
    hosts: list[Host]
    running: list[Running]
    runs: int  # that there are

    def holding(self) -> dict[int, Path]:
        """Which host has which claim."""
        names = {host.name: host.number for host in self.hosts}
        found = {}
        for place in sorted(self.lab.store.glob("runs/*/.claim")):
            state = standing(place)
            if state and state.host in names:
                found[names[state.host]] = place
        return found

    def finished(self) -> Counter[str]:
        """Run -> how often it was finished."""
        return Counter(line.split()[0] for line in self.lines())

    def lines(self) -> list[str]:
        path = self.hosts[0].finished
        return path.read_text().splitlines() if path.exists() else []

    def wait_until_another_has(self, place: Path, before: State, by: int) -> float:
        """Seconds until the claim has another owner."""
        since = time.monotonic()

        def passed_on() -> bool:
            state = standing(place)
            return state is not None and state.number > before.number

        wait_for(passed_on, "nobody took the run over", PATIENCE, self.running[by])
        return time.monotonic() - since


def start(lab: Lab, finished: Path, runs: int) -> Workers:
    hosts = [Host(number, finished) for number in range(HOSTS)]
    running = [lab.start(WORDS, before=host) for host in hosts]
    return Workers(lab, hosts, running, runs)


def put_one_to_sleep(workers: Workers) -> tuple[int, Path, State]:
    """The first that is seen with a run, in the midst of it."""
    while True:
        wait_for(workers.holding, "nobody took a run", PATIENCE, workers.running[0])
        for number, place in workers.holding().items():
            workers.running[number].send_to_all(signal.SIGSTOP)
            state = standing(place)
            if state and state.host == workers.hosts[number].name:
                return number, place, state
            workers.running[number].send_to_all(signal.SIGCONT)


def kill_one(workers: Workers, spared: set[int]) -> int:
    """One that has a run, or that waits for that of the sleeper when there is no other left."""
    one = next(iter(set(range(HOSTS)) - spared))

    def holding() -> set[int]:
        held = set(workers.holding()) - spared
        return held or ({one} if len(workers.finished()) >= workers.runs - 1 else set())

    wait_for(holding, "nobody took a run", PATIENCE, workers.running[one])
    killed = min(holding() or {one})
    workers.running[killed].send_to_all(signal.SIGKILL)
    workers.running[killed].end()
    return killed


def disturb(workers: Workers) -> float:
    """Seconds until the run of the one who slept had another owner."""
    asleep, place, state = put_one_to_sleep(workers)
    gone = {asleep}
    for _ in range(2):
        gone.add(kill_one(workers, gone))
    [awake, *_] = set(range(HOSTS)) - gone
    taken = workers.wait_until_another_has(place, state, awake)
    workers.running[asleep].send_to_all(signal.SIGCONT)
    for number in {asleep, *range(HOSTS)} - (gone - {asleep}):
        ended = workers.running[number].end()
        assert ended.code == 0, (number, ended)
    return taken


def campaign(root: Path, seeds: int) -> str:
    """What was seen, in words.  Raises AssertionError."""
    lab = furnish(root / "fresh")
    sheet = GRID | {"seeds": list(range(seeds))}
    (lab.root / "many.yaml").write_text(json.dumps(sheet))
    calm = lab.copy(root / "calm")
    assert calm.run(WORDS).code == 0
    shared = lab.copy(root / "shared")
    workers = start(shared, root / "finished", 3 * seeds)
    began = time.monotonic()
    taken = disturb(workers)
    seconds = time.monotonic() - began
    times = workers.finished()
    assert set(times.values()) == {1}, [run for run, count in times.items() if count > 1]
    differs = differences(of_runs(calm), of_runs(shared))
    assert not differs, differs
    shares = Counter(line.split()[1] for line in workers.lines())
    told = ", ".join(f"{host} {count}" for host, count in sorted(shares.items()))
    return (
        f"{len(times)} runs by {HOSTS} workers in {seconds:.1f} s, each finished once: {told}\n"
        f"a run of the one who slept had another owner after {taken:.1f} s "
        f"({claim.STALE_AFTER} looks, {BEAT} s apart)"
    )


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seeds", type=int, default=8, help="of 3 arms each")
    words = asked.parse_args()
    processes.warm_up(mlflow=False)
    with tempfile.TemporaryDirectory(prefix="ablab-workers-") as root:
        try:
            print(campaign(Path(root), words.seeds))
        except (AssertionError, processes.Hung) as loss:
            where = traceback.extract_tb(loss.__traceback__)[-1].lineno
            print(f"LOST: {loss} (line {where})")
            return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # libraries complain of what a process that forked still holds
