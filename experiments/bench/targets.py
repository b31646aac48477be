"""A measured cost beside its target: what `ablab bench overhead` and `ablab bench study` print and write."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from ablab.core.store.files import write_atomically


@dataclass(frozen=True)
class Cost:
    what: str
    measured: float
    unit: str
    target: float  # not above

    @property
    def ok(self) -> bool:
        return self.measured <= self.target


def show_costs(costs: list[Cost], out: Path | None) -> None:
    """Print a line for each; write all of it as JSON to `out`."""
    width = max(len(cost.what) for cost in costs)
    typer.echo(f"{'what':<{width}}  measured    target  ok")
    for cost in costs:
        measured = f"{cost.measured:>6.3f} {cost.unit:<2}"
        target = f"{cost.target:>5g} {cost.unit:<2}"
        typer.echo(f"{cost.what:<{width}}  {measured}  {target}  {'yes' if cost.ok else 'NO'}")
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    warning = ": busy, so times in seconds are too long" if load > cores else ""
    typer.echo(f"{cores} cores, load {load:.1f}{warning}")
    if out:
        rows = [asdict(cost) | {"ok": cost.ok} for cost in costs]
        told = {
            "machine": platform.machine(),
            "cores": cores,
            "load": load,
            "python": platform.python_version(),
            "rows": rows,
        }
        write_atomically(out, json.dumps(told, indent=1).encode())
