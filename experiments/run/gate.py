"""What holds an arm back until it is known to be alive: to differ from its reference in what it computes.

The liveness check (ablations/checks/liveness.py) turns a recipe into a trace.  The gate says which traces are wanted,
compares them, and lets the runs through: references at once, the other arms when the last trace is there, and an inert
arm never.  An arm that no trace can judge is let through: one that acts late by its own word, one that reads other
tokens, and one whose trace, or whose reference's, could not be taken.

Where several workers compile what they train, references wait too.  A trace takes seconds and a change of graph 38 s on
an H100: a worker whose trace ended first would begin a seed of the reference and compile what another one compiles,
when an arm of its own is a moment away.
"""

from collections.abc import Callable

from ablab.ablations.design import Cell
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.run.capacity import on_gpus
from ablab.experiments.run.traces import Traces


def path_of(runtime: Runtime) -> str:
    """What decides who computes: `cuda triton bf16`, as asked."""
    device = "cuda" if on_gpus(runtime) else "cpu"
    kernels = "torch" if runtime.shard == "weights" else runtime.kernels
    return f"{device} {kernels} {runtime.dtype}"


class Gate:
    """The gate of some runs of an experiment.

    told: called once, when all traces are there, with cell -> reference for every cell that shows no difference from
    its reference.  runtime: how the runs will be executed; traces are taken on the same path.
    together: nothing begins before the last trace is there.
    """

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        runs: list[PlannedRun],
        told: Callable[[dict[str, str]], None],
        runtime: Runtime,
        together: bool = False,
    ):
        self.runs = runs
        self.told = told
        self.together = together
        self.traces = Traces(store, code_fingerprint(), path_of(runtime))
        # of the cells that are judged
        self.reference_of = {
            cell.name: cell.reference
            for cell in experiment.cells
            if cell.reference
            and not _acts_late(cell, experiment.cell_named[cell.reference])
            and not _reads_other_data(experiment, cell.name, cell.reference)
        }
        self.traced = self._runs_to_trace(experiment)
        stages = [run for chain in self.traced.values() for run in chain]
        # run id -> run, for those whose trace nobody knows
        self.missing = {run.id: run for run in stages if self.traces.get(run.id) is None}

    def passing(self) -> list[PlannedRun]:
        """The runs that wait for no trace: all that are alive, or those of references while a trace is missing."""
        if self.missing:
            return [run for run in self.runs if not self._waits(run)]
        inert = self._judge()
        return [run for run in self.runs if run.cell not in inert]

    def traced_as(self, run: str, trace: str | None) -> list[PlannedRun]:
        """Note one of the missing traces; None: it cannot be taken.  Returns the runs that waited for it."""
        if trace is not None:
            self.traces.put(run, trace)
        del self.missing[run]
        if self.missing:
            return []
        self.traces.save()
        inert = self._judge()
        waiting = (run for run in self.runs if self._waits(run))
        return [run for run in waiting if run.cell not in inert]

    def _waits(self, run: PlannedRun) -> bool:
        """Whether it is held back while a trace is missing."""
        return self.together or run.cell in self.reference_of

    def _runs_to_trace(self, experiment: Experiment) -> dict[str, tuple[PlannedRun, ...]]:
        """Cell -> its stages of the first seed, for every arm that waits here and for its reference."""
        wanted = set()
        for run in self.runs:
            if reference := self.reference_of.get(run.cell):
                wanted |= {run.cell, reference}
        seeds = experiment.sheet.seeds[:1] or [run.pair for run in self.runs[:1]]
        return {
            run.cell: tuple(one for one in run.chain if not one.repeats)
            for run in experiment.runs(seeds)
            if run.cell in wanted
        }

    def _judge(self) -> dict[str, str]:
        """Cell -> reference of the arms whose traces are equal, in every stage."""
        traces = {
            cell: [self.traces.get(run.id) for run in chain]
            for cell, chain in self.traced.items()
        }
        inert = {
            cell: reference
            for cell, reference in self.reference_of.items()
            if cell in traces
            and None not in traces[cell]
            and traces[cell] == traces.get(reference)
        }
        self.told(inert)
        return inert


def _reads_other_data(experiment: Experiment, cell: str, reference: str) -> bool:
    """Whether they read other tokens in some stage: a trace takes its steps on random ones."""
    stages = zip(
        experiment.stage_recipes[cell], experiment.stage_recipes[reference], strict=True
    )
    return any(_tokens_of(ours) != _tokens_of(theirs) for ours, theirs in stages)


def _tokens_of(recipe: Recipe) -> tuple[object, ...]:
    return (recipe.data.name, recipe.data.digest, recipe.data.mix)


def _acts_late(cell: Cell, reference: Cell) -> bool:
    """Whether they differ in an intervention that a few steps may not show."""
    ours, theirs = cell.treatment, reference.treatment
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return any((ours.get(name) or theirs[name]).about.acts_late for name in differing)
