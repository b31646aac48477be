"""`--launcher slurm`: each run is an element of a job array, submitted by submitit.

The only way between a job and who asked for it is the store, which both see: a job appends what it says to a mailbox,
and looks there for orders.  A job that SLURM preempts, or that comes to the end of its time, saves its run, is requeued
and goes on; one whose node fails is submitted again.  https://github.com/facebookincubator/submitit
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import msgspec

from ablab.core.errors import UserError, one_line
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.files import writing
from ablab.core.store.store import Store
from ablab.experiments.launch.base import LOSSES, Seat, Site, check_keys, optional, saved_of
from ablab.experiments.run.executor import Executor, Listener, Task
from ablab.experiments.run.halting import GRACE
from ablab.experiments.run.messages import (
    Answer,
    Asked,
    Began,
    Busy,
    Done,
    Evaluated,
    Found,
    Halt,
    Halted,
    Job,
    Logged,
    Lost,
    Message,
    Refused,
    Saving,
    Stop,
    Traced,
    Unevaluated,
    Untraced,
    Warned,
)
from ablab.experiments.run.processes import failure
from ablab.experiments.run.this_machine import check_rows
from ablab.experiments.run.workers import Waiting

AT_ONCE = 256  # elements of an array that run at a time, unless array_parallelism says
IN_FLIGHT = 1000  # jobs submitted and not answered: SLURM's usual longest array
MINUTES = 60  # of a job, unless `time` says; longer runs are requeued
REQUEUES = 1000  # each begins where the last one saved
LOOKING = 1.0  # seconds between two looks into the mailboxes
# Seconds that a job waits for a run that another process holds, longer than that one may be silent
# (core/store/claim.py: 20); then it lets others pass, and is submitted again as much later.
PATIENCE = 30.0
# Seconds after a job's end in which its last words may still come to show on a shared folder.
SILENCE = 15.0
GPUS = ("gres", "gpus_per_node", "gpus_per_task", "num_gpus")  # options that ask for some
OURS = ("cluster",)  # slurm; local runs the same jobs on this machine
# States in which a job was ended by SLURM, not by what it did.
OF_SLURM = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "TIMEOUT", "REVOKED", "DEADLINE")


# -- the launcher ------------------------------------------------------------------------------------------------------
class SlurmLauncher:
    """A Launcher.  options: submitit's, of `--slurm KEY=VALUE` and of `slurm:` in a sheet."""

    def __init__(self, options: Mapping[str, Any] = {}):
        self.submitit: Any = optional("submitit", "slurm")
        self.options = dict(options)
        self.generic = self.submitit.AutoExecutor._valid_parameters()
        known = self.submitit.SlurmExecutor._valid_parameters() | self.generic
        check_keys("slurm", options, (*OURS, *sorted(known)))

    def checked(self, runtime: Runtime, recipes: Iterable[Recipe]) -> Runtime:
        check_rows(runtime, recipes)
        if runtime.device == "auto":
            asked = runtime.ranks > 1 or any(self.options.get(key) for key in GPUS)
            runtime = replace(runtime, device="cuda" if asked else "cpu")
        self._check_gpus(runtime)
        if runtime.kernels == "same":
            raise UserError(
                "runtime.kernels=same asks the GPU that will train, and SLURM has not given one yet; "
                "name the places, as ablab show lists them: runtime.kernels=[attention,loss]"
            )
        self._executor(
            Path("slurm"), runtime
        )  # or it says why there is none; it writes nothing
        return runtime

    def settled(
        self, runtime: Runtime, recipes: Iterable[Recipe], plugins: Iterable[str | Path]
    ) -> Runtime:
        return self.checked(runtime, recipes)

    def place(self, runtime: Runtime) -> str:
        devices = "GPUs" if runtime.device == "cuda" else "CPUs"
        return f"{devices} of SLURM, if it has room"

    def _check_gpus(self, runtime: Runtime) -> None:
        """Raises UserError where a job asks for fewer GPUs than its ranks need, in words that we can read."""
        if runtime.device != "cuda" or runtime.ranks == 1:
            return
        for key in GPUS:
            asked = str(self.options.get(key, ""))
            _, _, last = asked.rpartition(":")
            if last.isdigit() and int(last) < runtime.ranks:
                raise UserError(
                    f"--slurm {key}={asked}, but --gpus-per-run {runtime.ranks} (runtime.ranks) gives each of so many "
                    f"ranks a GPU; ask for {runtime.ranks} of them, or drop the first"
                )

    def carried(self, runtime: Runtime) -> int:
        return int(self.options.get("array_parallelism", AT_ONCE))

    def sharing(self, runtime: Runtime, jobs: int) -> str:
        """A job has what SLURM gave it alone."""
        return ""

    def start(
        self, store: Store, runtime: Runtime, jobs: int | None, plugins: Iterable[str]
    ) -> Executor:
        folder = store.root / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"
        with writing(folder):
            folder.mkdir(parents=True)
        return SlurmArrays(
            self._executor(folder, runtime), Site.of(store, plugins), folder, jobs or IN_FLIGHT
        )

    def _executor(self, folder: Path, runtime: Runtime) -> Any:
        """submitit's.  Raises UserError where there is no SLURM, or where it refuses an option."""
        options: dict[str, Any] = {"time": MINUTES, "array_parallelism": AT_ONCE}
        cpus = runtime.threads * runtime.ranks
        options |= {"job_name": "ablab", "cpus_per_task": cpus}
        if runtime.device == "cuda" and not any(self.options.get(key) for key in GPUS):
            options["gpus_per_node"] = runtime.ranks
        options |= self.options
        cluster = options.pop("cluster", "slurm")
        named = {
            key if key in self.generic else f"slurm_{key}": value
            for key, value in options.items()
        }
        often = {f"{cluster}_max_num_timeout": REQUEUES}
        try:
            executor = self.submitit.AutoExecutor(folder, cluster, **often)
            executor.update_parameters(timeout_min=options["time"], **named)
        except Exception as refusal:
            raise UserError(
                f"SLURM cannot be used from here ({one_line(str(refusal))[:140]}); start this on a machine that has "
                "sbatch and srun, or check --slurm"
            ) from None
        return executor


# -- mailboxes ---------------------------------------------------------------------------------------------------------
OF_RUNS = (Began, Logged, Warned, Done, Found, Busy, Lost, Halted, Refused)
OF_OTHERS = (Traced, Untraced, Asked, Evaluated, Unevaluated)
KINDS: dict[str, type] = {kind.__name__: kind for kind in (*OF_RUNS, *OF_OTHERS, Stop, Halt)}


@dataclass(frozen=True)
class Mailbox:
    """A file of the store to which one side appends, a line a message, and which the other reads."""

    path: Path

    def put(self, message: Message | Stop | Halt) -> None:
        """Opened and closed for each, so that a network file system shows it to others."""
        line = json.dumps([type(message).__name__, asdict(message)])
        with open(self.path, "ab") as file:
            file.write(f"{line}\n".encode())

    def after(self, at: int) -> tuple[list[Any], int]:
        """The messages behind this byte, and where the next will begin."""
        try:
            with open(self.path, "rb") as file:
                file.seek(at)
                content = file.read()
        except FileNotFoundError:
            return [], at
        whole = content.rfind(b"\n") + 1  # half a line is still on its way
        return [_message(line) for line in content[:whole].splitlines()], at + whole


def _message(line: bytes) -> Any:
    name, fields = json.loads(line)
    return msgspec.convert(fields, KINDS[name])


# -- in a job ----------------------------------------------------------------------------------------------------------
class ArrayTask:
    """What an element of an array does.  submitit pickles it, and again when its job is requeued."""

    def __init__(self, site: Site, job: Job, patience: float, said: Path, told: Path):
        self.site = site
        self.job = job
        self.patience = patience
        self.said = Mailbox(said)
        self.told = Mailbox(told)
        self.seat: Seat | None = None
        self.thread: Thread | None = None
        self.preempted = False

    def __call__(self) -> None:
        try:
            self.site.check()
        except (
            UserError
        ) as flaw:  # of a store that moved, nobody may hear but who reads the log
            with suppress(OSError):
                self.said.put(Refused(str(flaw)))
            sys.exit(f"ablab: run {self.job.run}: {flaw}")
        self.seat = Seat(self.site)
        self.thread = Thread(target=self._work, args=(self.seat,))
        self.thread.start()
        heard = 0
        while self.thread.is_alive():  # signals come to this thread
            self.thread.join(LOOKING / 2)
            orders, heard = self.told.after(heard)
            for order in orders:
                self.seat.tell(order)
        self.seat.close()

    def _work(self, seat: Seat) -> None:
        until = time.monotonic() + self.patience
        while not self._answered(seat, until):
            time.sleep(LOOKING)

    def _answered(self, seat: Seat, until: float) -> bool:
        """False where another holds the run, and there is time to ask once more."""
        for message in seat.answers(self.job):
            if isinstance(message, Busy) and time.monotonic() < until and not self.preempted:
                return False
            if isinstance(message, Halted) and self.preempted:
                message = Warned(
                    f"SLURM ends its job at step {message.step}; saved and requeued"
                )
            self.said.put(message)
        return True

    def checkpoint(self) -> Any:
        """submitit's question, in a signal handler: what to do when the job is begun again."""
        from submitit.helpers import DelayedSubmission

        self.preempted = True
        if self.seat and self.thread:
            self.seat.tell(Halt())
            self.thread.join(GRACE)
            self.seat.close()
        again = ArrayTask(self.site, self.job, self.patience, self.said.path, self.told.path)
        return DelayedSubmission(again)


# -- its executor ------------------------------------------------------------------------------------------------------
@dataclass
class Flight:
    """A job that is submitted and not answered."""

    job: Job
    submitted: Any  # submitit's job
    said: Mailbox
    told: Mailbox
    heard: int = 0  # bytes
    ended: float | None = None  # since when SLURM says so, on the clock
    told_to_halt: bool = False


class SlurmArrays:
    """An Executor."""

    def __init__(self, executor: Any, site: Site, folder: Path, most: int):
        """most: jobs in flight."""
        self.executor = executor
        self.site = site
        self.folder = folder
        self.most = most
        self.flights: list[Flight] = []
        self.losses: Counter[str] = Counter()  # run id -> jobs that SLURM has ended
        self.given = 0
        self.halting: float | None = None
        self.patience = PATIENCE

    def execute(self, tasks: Iterable[Task], heard: Listener) -> None:
        waiting = Waiting(tasks, self.patience)
        while self._goes_on(waiting):
            self._submit([*self._taken(waiting)])
            for flight in [*self.flights]:
                for message in self._heard_of(flight):
                    if isinstance(message, Answer):
                        self.flights.remove(flight)
                    if isinstance(message, Busy | Lost):
                        waiting.postpone(flight.job, "")
                    waiting.tasks.extend(heard(flight.job, message))
            time.sleep(LOOKING)

    def stop(self, run: str) -> None:
        for flight in self.flights:
            if flight.job.run == run:
                flight.told.put(Stop(run))

    def halt(self) -> None:
        self.halting = time.monotonic()

    def close(self) -> None:
        for flight in self.flights:
            flight.submitted.cancel(check=False)
        until = time.monotonic() + 2 * LOOKING
        while time.monotonic() < until and not all(
            one.submitted.done() for one in self.flights
        ):
            time.sleep(LOOKING / 10)
        self.flights = []
        self.site.leave()

    # -- the steps of `execute` ------------------------------------------------------------------------------------
    def _goes_on(self, waiting: Waiting) -> bool:
        if self.halting is None:
            return bool(waiting or self.flights)
        waiting.clear()
        saving = [one for one in self.flights if isinstance(one.job, Saving)]
        for flight in saving:
            if not flight.told_to_halt:
                flight.told_to_halt = True
                flight.told.put(Halt())
        return bool(saving) and time.monotonic() - self.halting < GRACE

    def _taken(self, waiting: Waiting) -> Iterator[Job]:
        room = self.most - len(self.flights)
        while room > 0 and waiting.is_due:
            if job := waiting.take("", ()).make():
                room -= 1
                yield job

    def _submit(self, jobs: list[Job]) -> None:
        """As one array.  Raises UserError where SLURM refuses it."""
        boxes = []
        for job in jobs:
            self.given += 1
            name = f"{self.given:05}-{job.run}"
            boxes.append((self.folder / f"{name}.said", self.folder / f"{name}.told"))
        calls = [
            ArrayTask(self.site, job, self.patience, *box)
            for job, box in zip(jobs, boxes, strict=True)
        ]
        if not calls:
            return
        try:
            submitted = self.executor.submit_array(calls)
        except Exception as refusal:
            raise UserError(
                f"SLURM refuses the jobs ({one_line(str(refusal))[:160]}); check --slurm partition, gres, time, account"
            ) from None
        for job, one, (said, told) in zip(jobs, submitted, boxes, strict=True):
            self.flights.append(Flight(job, one, Mailbox(said), Mailbox(told)))

    def _heard_of(self, flight: Flight) -> list[Message]:
        messages, flight.heard = flight.said.after(flight.heard)
        if messages or not flight.submitted.done():
            flight.ended = None
            return messages
        flight.ended = flight.ended or time.monotonic()
        if time.monotonic() - flight.ended < SILENCE:
            return []
        return [self._lost(flight)]

    def _lost(self, flight: Flight) -> Message:
        """What is to be said of a job that has ended without an answer."""
        state = str(flight.submitted.state)
        id = flight.submitted.job_id
        run = flight.job.run
        self.losses[run] += 1
        if state.split()[0] in OF_SLURM and self.losses[run] <= LOSSES:
            return Lost(
                f"SLURM ended its job {id} ({state}); submitted again, from {saved_of(flight.job)}"
            )
        return failure(
            flight.job,
            f"its SLURM job {id} ended as {state} without an answer: see {flight.submitted.paths.stderr}; if that is "
            f"not there, its node does not see {self.site.store}, or the store has moved",
        )
