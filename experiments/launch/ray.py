"""`--launcher ray`: runs on the nodes of a Ray cluster, which may join and leave meanwhile.

Each worker is an actor that holds what a run needs, GPUs or a share of one, and keeps a worker process on its node.
Where a node is gone, its runs are given out again: they resume from their last checkpoints, for all nodes and the
machine that asks see one store under one path.  Ray 2.59 and later ask for a token:
https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

import math
import os
import re
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ablab.core.errors import UserError, one_line
from ablab.core.language.parse import parse
from ablab.core.recipe.recipe import Recipe, plain
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.store import Store
from ablab.experiments.launch.base import LOSSES, Seat, Site, check_keys, optional, saved_of
from ablab.experiments.run.executor import Executor
from ablab.experiments.run.messages import (
    Answer,
    Halt,
    Job,
    Lost,
    Message,
    Order,
    Ready,
    Stop,
)
from ablab.experiments.run.processes import failure
from ablab.experiments.run.service import common_of_plain
from ablab.experiments.run.this_machine import check_rows
from ablab.experiments.run.workers import PATIENCE, WorkerHandle, Workers

HEARING = 10.0  # seconds that an actor waits for words before it says that there are none
LOOKING = 2.0  # seconds between two looks at the nodes
REACHING = 5.0  # seconds that an address has to answer
CALLS = 4  # at a time in one actor: a job, who listens to it, an order, the end


# -- what a run needs --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Needs:
    """Options of `--ray KEY=VALUE` and of `ray:` in a sheet; None: as the runtime says."""

    num_gpus: float | None = None  # of each run: 1, 2, ..., or a share as 0.25
    num_cpus: float | None = None

    def settled(self, runtime: Runtime, nodes: Iterable[Mapping[str, Any]]) -> "Needs":
        """Without a None.  nodes: of the cluster, as Ray lists them."""
        there = any(resources_of(node).get("GPU") for node in nodes)
        if runtime.device == "auto":
            wanted = there or runtime.ranks > 1
        else:
            wanted = runtime.device == "cuda"
        gpus = float(wanted * runtime.ranks) if self.num_gpus is None else self.num_gpus
        cpus = runtime.threads * runtime.ranks if self.num_cpus is None else self.num_cpus
        return Needs(gpus, cpus)

    def fit(self, node: Mapping[str, Any]) -> int:
        """How many such runs a node carries at a time.  A share of a GPU lies on one GPU."""
        has = resources_of(node)
        fitting = [math.floor(has.get("CPU", 0) / self.num_cpus)] if self.num_cpus else []
        if self.num_gpus:
            gpus = int(has.get("GPU", 0))
            a_gpu = math.floor(1 / self.num_gpus)
            fitting.append(a_gpu * gpus if a_gpu else math.floor(gpus / self.num_gpus))
        return min(fitting, default=0)


def needs_of(options: Mapping[str, Any]) -> Needs:
    """Raises UserError."""
    check_keys("ray", options, ("num_gpus", "num_cpus"))
    needs: Needs = parse(Needs, dict(options), "ray")
    for key, value in options.items():
        whole = value == int(value)
        if value < 0 or (key == "num_gpus" and value > 1 and not whole):
            raise UserError(
                f"--ray {key}={value} must be 0 or more, and GPUs above one whole: 0.25, 0.5, 1, 2"
            )
    if needs.num_cpus == 0 and not needs.num_gpus:
        raise UserError(
            "--ray num_cpus=0 without GPUs lets a node take any number of runs; give 1"
        )
    return needs


def resources_of(node: Mapping[str, Any]) -> Mapping[str, float]:
    return node["Resources"] if node["Alive"] else {}


# -- the launcher ------------------------------------------------------------------------------------------------------
class RayLauncher:
    """A Launcher.

    address: HOST:6379 on a machine of the cluster, ray://HOST:10001 from any other; "": the cluster of this machine.
    """

    def __init__(self, address: str = "", options: Mapping[str, Any] = {}):
        self.address = address or os.environ.get("RAY_ADDRESS", "auto")
        self.asked = needs_of(options)
        self.ray: Any = optional("ray", "ray")

    def checked(self, runtime: Runtime, recipes: Iterable[Recipe]) -> Runtime:
        check_rows(runtime, recipes)
        needs = self._needs(runtime)
        if runtime.device == "auto":
            runtime = replace(runtime, device="cuda" if needs.num_gpus else "cpu")
        if runtime.device == "cuda" and runtime.ranks > 1 and needs.num_gpus != runtime.ranks:
            raise UserError(
                f"--ray num_gpus={needs.num_gpus:g}, but --gpus-per-run {runtime.ranks} (runtime.ranks) gives each "
                "of so many ranks a GPU; drop the first, or add runtime.device=cpu"
            )
        return runtime

    def settled(
        self, runtime: Runtime, recipes: Iterable[Recipe], plugins: Iterable[str | Path]
    ) -> Runtime:
        asked = list(recipes)
        runtime = self.checked(runtime, asked)
        if runtime.kernels != "same":
            return runtime
        needs = self._needs(runtime)
        self.carried(runtime)
        wanted = [plain(recipe) for recipe in asked]
        asking = self.ray.remote(num_gpus=needs.num_gpus, num_cpus=needs.num_cpus)
        asked = asking(common_of_plain).remote(runtime, wanted, [*map(str, plugins)])
        return replace(runtime, kernels=self.ray.get(asked))

    def place(self, runtime: Runtime) -> str:
        devices = "GPUs" if self._needs(runtime).num_gpus else "CPUs"
        return f"{devices} of the Ray cluster"

    def carried(self, runtime: Runtime) -> int:
        """Raises UserError where no node can have one."""
        needs = self._needs(runtime)
        if carried := sum(map(needs.fit, self.ray.nodes())):
            return carried
        less = "--ray num_gpus=0.5 or runtime.device=cpu"
        if runtime.ranks > 1:
            less = "a smaller --gpus-per-run, or runtime.device=cpu"
        raise UserError(
            f"no node of the Ray cluster has {needs.num_gpus:g} GPUs and {needs.num_cpus:g} CPUs for a run; "
            f"ask for less with {less}, or wait for nodes with --jobs N"
        )

    def sharing(self, runtime: Runtime, jobs: int) -> str:
        """A whole GPU is a run's own; part of one, or a CPU, may have others."""
        part = self._needs(runtime).num_gpus or 0.0
        return "" if part >= 1 else f"runs with {part:g} GPUs each"

    def start(
        self, store: Store, runtime: Runtime, jobs: int | None, plugins: Iterable[str]
    ) -> Executor:
        site = Site.of(store, plugins)
        return RayWorkers(self.ray, site, self._needs(runtime), jobs)

    def _needs(self, runtime: Runtime) -> Needs:
        connect(self.ray, self.address)
        return self.asked.settled(runtime, self.ray.nodes())


def connect(ray: Any, address: str) -> None:
    """Once a process.  Raises UserError where nobody answers there, or asks for a token."""
    if ray.is_initialized():
        return
    check_reachable(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        # It would still print what happens to nodes, to stdout; a Lost says it in a line.
        ray._private.worker._worker_logs_enabled = False
    except Exception as refusal:
        said = one_line(str(refusal))[:100]
        if address in ("auto", "local"):
            raise UserError(
                f"no Ray cluster runs on this machine ({said}); start one with `ray start --head`, or name one: "
                "--address HOST:6379 on a machine of it, ray://HOST:10001 from any other"
            ) from None
        raise UserError(
            f"the Ray cluster at {address} does not let us in ({said}); where it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or ~/.ray/auth_token, as on its nodes; "
            f"else look whether it runs Ray {ray.__version__}, as this machine does"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)  # which Ray has made its own


def check_reachable(address: str) -> None:
    """Ray itself would ask for a minute.  Raises UserError."""
    found = re.fullmatch(r"(?:ray://)?(\[[^]]+\]|[^:/]+):(\d{1,5})", address)
    if not found:
        if address in ("auto", "local"):
            return
        raise UserError(
            f"--address {address!r:.80} must look like HOST:6379 or ray://HOST:10001, or be left out"
        )
    host, port = found[1].strip("[]"), int(found[2])
    try:
        socket.create_connection((host, port), REACHING).close()
    except (OSError, OverflowError) as refusal:
        raise UserError(
            f"nobody answers at {address} ({refusal}); check --address and that the Ray cluster runs: `ray status`"
        ) from None


# -- its executor ------------------------------------------------------------------------------------------------------
class Host:
    """An actor: stands on a node, with a worker process for the jobs that it is given."""

    def __init__(self, site: Site):
        self.seat = Seat(site)
        self.said: SimpleQueue[Ready | Message] = SimpleQueue()
        self.said.put(Ready())

    def take(self, job: Job) -> None:
        for message in self.seat.answers(job):
            self.said.put(message)

    def hear(self) -> tuple[str, list[Ready | Message]]:
        """Where it stands, and what was said since it was asked last."""
        heard = []
        with suppress(Empty):
            heard.append(self.said.get(timeout=HEARING))
            while True:
                heard.append(self.said.get_nowait())
        return socket.gethostname(), heard

    def tell(self, order: Stop | Halt) -> None:
        self.seat.tell(order)

    def close(self) -> None:
        self.seat.close()


@dataclass(eq=False, kw_only=True)
class HostHandle(WorkerHandle):
    actor: Any
    words: Any  # the reference of those that it will say next
    where: str = "that it waited for"  # the name of its machine
    inbox: deque[Ready | Message] = field(default_factory=deque)
    loss: str = ""  # why it is gone

    def tell(self, order: Order) -> None:
        if isinstance(order, Stop | Halt):
            self.actor.tell.remote(order)
        else:
            self.actor.take.remote(order)

    def hear(self) -> Ready | Message | None:
        if not self.inbox:
            return None
        said = self.inbox.popleft()
        self.heard(said)
        self.is_free = self.job is None  # its seat starts another worker where one ends
        return said


class RayWorkers(Workers[HostHandle]):
    """An Executor.  jobs: at a time; None: as many as the nodes carry, however many these become."""

    def __init__(self, ray: Any, site: Site, needs: Needs, jobs: int | None):
        super().__init__(jobs or 0)
        self.ray = ray
        self.site = site
        self.needs = needs
        self.losses: Counter[str] = Counter()  # run id -> machines that it has lost
        self.looked_at = -math.inf  # the nodes, on the clock
        self.fitting = 0

    def carried(self) -> int:
        if self.count:
            return self.count
        if time.monotonic() - self.looked_at > LOOKING:
            self.fitting = sum(map(self.needs.fit, self.ray.nodes()))
            self.looked_at = time.monotonic()
        return self.fitting

    def close(self) -> None:
        if not self.ray.is_initialized():
            return
        ending = [worker.actor.close.remote() for worker in self.workers if worker.was_ready]
        with suppress(self.ray.exceptions.RayError):
            self.ray.wait(
                ending or [self.ray.put(0)], num_returns=max(len(ending), 1), timeout=10
            )
        for worker in self.workers:
            self.ray.kill(worker.actor)
        self.workers = []
        self.site.leave()
        self.ray.shutdown()

    def _start(self, slot: int) -> HostHandle:
        what = self.ray.remote(max_restarts=0, max_concurrency=CALLS)(Host)
        needs = {"num_gpus": self.needs.num_gpus, "num_cpus": self.needs.num_cpus}
        actor = what.options(**needs).remote(self.site)
        return HostHandle(slot=slot, actor=actor, words=actor.hear.remote())

    def _speaking(self) -> list[HostHandle]:
        listening = {worker.words: worker for worker in self.workers}
        if not any(worker.inbox for worker in self.workers):
            self._listen_to(listening)
        return [worker for worker in self.workers if worker.inbox or worker.loss]

    def _listen_to(self, listening: Mapping[Any, HostHandle]) -> None:
        if not listening:
            time.sleep(PATIENCE / 2)
            return
        spoken, _ = self.ray.wait([*listening], timeout=PATIENCE / 2)
        for words in spoken:
            worker = listening[words]
            try:
                worker.where, heard = self.ray.get(words)
            except self.ray.exceptions.RayActorError as loss:
                worker.loss = str(loss)
            else:
                worker.inbox.extend(heard)
                worker.words = worker.actor.hear.remote()

    def _bury(self, worker: HostHandle) -> Answer | None:
        if "creation task" in worker.loss or "failed to import" in worker.loss:
            raise UserError(
                f"a Ray node cannot start a worker; install the same ablab there: {one_line(worker.loss)[-160:]}"
            )
        self.ray.kill(worker.actor)  # it may be out of reach alone
        job = worker.job
        if not job:
            return None
        self.losses[job.run] += 1
        if self.losses[job.run] > LOSSES:
            return failure(
                job, f"its node was lost {LOSSES + 1} times, the last one {worker.where}"
            )
        return Lost(
            f"lost with its node {worker.where}; another takes it over from {saved_of(job)}"
        )
