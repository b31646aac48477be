"""The launcher of this machine: worker processes, a GPU each where there are several."""

from collections.abc import Iterable
from pathlib import Path

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import NO_GPU, Runtime
from ablab.core.store.store import Store
from ablab.experiments.run.capacity import default_jobs, gpus_for
from ablab.experiments.run.executor import Executor
from ablab.experiments.run.processes import local_processes
from ablab.experiments.run.service import settle_service


class ThisMachine:
    """A Launcher."""

    def settled(
        self, runtime: Runtime, recipes: Iterable[Recipe], plugins: Iterable[str | Path]
    ) -> Runtime:
        if runtime.device == "cuda" and not gpus_for(runtime):
            raise UserError(NO_GPU)  # a worker would say so too, after seconds
        return settle_service(runtime, recipes, plugins)

    def carried(self, runtime: Runtime) -> int:
        return default_jobs(runtime)

    def start(
        self, store: Store, runtime: Runtime, jobs: int | None, plugins: Iterable[str]
    ) -> Executor:
        return local_processes(runtime, jobs or self.carried(runtime), plugins)
