"""`ablab why`: what makes two runs two, and why a cell is not one that the store has."""

import json
import re
from typing import Annotated

import typer

from ablab.experiments.cli.asked import prepare, run_of, store_of
from ablab.experiments.cli.options import Json, Overrides, Plugins, Where

RUN = re.compile(r"[0-9a-f]{4,16}")


def why(
    first: Annotated[str, typer.Argument(help="a run's id, or an experiment")],
    second: Annotated[
        str, typer.Argument(help="another run's id, or a cell of that experiment")
    ],
    overrides: Overrides = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="of the cell (the experiment's first)")
    ] = None,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Name the fields in which two runs differ; or why a cell is not reused: the nearest run, and what differs."""
    from ablab.ablations.registry import discover
    from ablab.experiments.plan.why import why_differ, why_not_reused

    where = store_of(store)
    if RUN.fullmatch(first) and RUN.fullmatch(second):
        discover(plugins or ())
        lines = why_differ(where, first, second)
    else:
        experiment, _ = prepare(first, overrides, plugins, where)
        seeds = experiment.sheet.seeds[:1] or [0]
        runs = experiment.runs(seeds if seed is None else [seed])
        lines = why_not_reused(where, run_of(runs, second.strip()))
    if as_json:
        return typer.echo(json.dumps({"why": lines}, indent=1))
    for line in lines:
        typer.echo(line)
