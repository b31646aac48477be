"""The launcher of this machine: worker processes, a GPU each where there are several."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import NO_GPU, Runtime, check_shard, rows_at_once
from ablab.core.store.store import Store
from ablab.experiments.run.capacity import default_jobs, gpus_for, shared_by, strangers_on
from ablab.experiments.run.executor import Executor
from ablab.experiments.run.processes import local_processes
from ablab.experiments.run.service import settle_service
from ablab.experiments.run.torchrun import InThisProcess, ranks_here


def with_ranks_here(runtime: Runtime) -> Runtime:
    """The runtime, with as many ranks as torchrun started.  Raises UserError where that is not what was asked."""
    started = ranks_here()
    if started == 1:
        check_room(runtime)
        return runtime
    if runtime.ranks not in (1, started):
        raise UserError(
            f"--gpus-per-run {runtime.ranks} (runtime.ranks), and torchrun started {started} ranks; drop the first"
        )
    return replace(runtime, ranks=started)


def check_room(runtime: Runtime) -> None:
    """Raises UserError where one run wants more GPUs than there are."""
    there = len(gpus_for(runtime))
    if runtime.ranks == 1 or runtime.device == "cpu" or runtime.ranks <= there:
        return
    asked = f"--gpus-per-run {runtime.ranks} (runtime.ranks)"
    if not there:
        raise UserError(
            f"{asked}, but torch sees no GPU here; drop it, or add runtime.device=cpu for as many processes"
        )
    raise UserError(
        f"{asked}, but there are {there} GPUs here; ask for at most {there}, "
        "or start the ranks of several machines with torchrun"
    )


def check_rows(runtime: Runtime, recipes: Iterable[Recipe]) -> None:
    """Raises UserError where its ranks cannot share the rows of a recipe, or its weights as asked."""
    check_shard(runtime)
    if runtime.ranks > 1:
        for recipe in recipes:
            rows_at_once(runtime, recipe.batches.largest_micro_batch)


class ThisMachine:
    """A Launcher."""

    def __init__(self) -> None:
        self.strangers = (
            0  # processes that computed on its GPUs before a worker of ours was there
        )

    def checked(self, runtime: Runtime, recipes: Iterable[Recipe]) -> Runtime:
        if runtime.device == "cuda" and not gpus_for(runtime):
            raise UserError(NO_GPU)  # a worker would say so too, after seconds
        runtime = with_ranks_here(runtime)
        check_rows(runtime, recipes)
        return runtime

    def settled(
        self, runtime: Runtime, recipes: Iterable[Recipe], plugins: Iterable[str | Path]
    ) -> Runtime:
        asked = list(recipes)
        return settle_service(self.checked(runtime, asked), asked, plugins)

    def place(self, runtime: Runtime) -> str:
        return ""

    def carried(self, runtime: Runtime) -> int:
        return default_jobs(runtime) if ranks_here() == 1 else 1

    def sharing(self, runtime: Runtime, jobs: int) -> str:
        return shared_by(runtime, jobs, self.strangers)

    def start(
        self, store: Store, runtime: Runtime, jobs: int | None, plugins: Iterable[str]
    ) -> Executor:
        self.strangers = strangers_on(gpus_for(runtime))
        if ranks_here() > 1:
            return InThisProcess(runtime)
        return local_processes(runtime, jobs or self.carried(runtime), plugins)
