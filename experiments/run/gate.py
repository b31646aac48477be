"""Which arms compute what their reference computes: asked once for each code and recipe, while the references train."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from ablab.core.runtime.runtime import code_fingerprint
from ablab.core.store.files import write_atomically
from ablab.core.store.record import Store
from ablab.experiments.plan.experiment import Experiment, Run


class Check:
    """The liveness check of some runs.

    told: called once, when all traces are there, with cell -> reference for every cell that computes the bits of its reference.
    """

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        runs: list[Run],
        told: Callable[[dict[str, str]], None],
    ):
        self.runs, self.path, self.code, self.told = (
            runs,
            store.root / "liveness.json",
            code_fingerprint(),
            told,
        )
        self.reference_of = {cell.name: cell.reference for cell in experiment.cells}
        wanted = {
            name
            for run in runs
            if self.reference_of[run.cell]
            for name in (run.cell, self.reference_of[run.cell])
        }
        seeds = experiment.sheet.seeds[:1] or [run.pair for run in runs[:1]]
        self.first = {run.cell: run for run in experiment.runs(seeds) if run.cell in wanted}
        self.known = _read(self.path)
        self.missing = {
            run.id: run for run in self.first.values() if self._key(run.id) not in self.known
        }

    def _key(self, run: str) -> str:
        return f"{run}/{self.code}"

    def at_once(self) -> list[Run]:
        """The runs that wait for no trace: all that are alive, or those of references while a trace is missing."""
        if self.missing:
            return [run for run in self.runs if not self.reference_of[run.cell]]
        inert = self._inert()
        return [run for run in self.runs if run.cell not in inert]

    def heard(self, run: str, trace: str) -> list[Run]:
        """Note one of the missing traces.  Returns the runs that waited for it."""
        self.known[self._key(run)] = trace
        del self.missing[run]
        if self.missing:
            return []
        write_atomically(self.path, msgspec.json.encode(_read(self.path) | self.known))
        inert = self._inert()
        return [
            run for run in self.runs if self.reference_of[run.cell] and run.cell not in inert
        ]

    def _inert(self) -> dict[str, str]:
        trace = {cell: self.known[self._key(run.id)] for cell, run in self.first.items()}
        inert = {
            cell: reference
            for cell in self.first
            if (reference := self.reference_of[cell]) and trace[cell] == trace[reference]
        }
        self.told(inert)
        return inert


def _read(path: Path) -> dict[str, str]:
    """A cache: what cannot be read is computed again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}
