"""`ablab sync` and `ablab ui`: the runs in MLflow."""

import json
from typing import Annotated

import typer

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.cli.asked import store_of
from ablab.experiments.cli.options import Json, Track, Where
from ablab.experiments.track.chosen import TITLES, tracked


def sync(
    names: Annotated[
        list[str] | None, typer.Argument(help="experiments (all in the store)")
    ] = None,
    track: Track = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Rebuild the MLflow view from the run folders, or that of --track; sends only what it lacks."""
    where = store_of(store)
    shown = tracked(track)
    if not shown:
        raise UserError(
            "--track none: there is no view to bring up to date; name one, or leave it out"
        )
    counts = {name: _synced(name, where, names or []) for name in shown}
    if as_json:
        alone = len(counts) == 1
        return typer.echo(json.dumps(counts[shown[0]] if alone else counts))
    for name, found in counts.items():
        line = ", ".join(f"{count} {word}" for word, count in found.items())
        typer.echo(line if len(counts) == 1 else f"{TITLES[name]}: {line}")


def _synced(name: str, store: Store, experiments: list[str]) -> dict[str, int]:
    """Of one view: the number of runs of each outcome."""
    from ablab.experiments.track.trackers import VIEWS

    return VIEWS[name](store, lambda line: typer.echo(f"warning: {line}", err=True)).sync(
        experiments
    )


def ui(
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    store: Where = None,
) -> None:
    """The MLflow UI over the local store."""
    from ablab.experiments.track.ui import serve

    serve(store_of(store).root, host, port, typer.echo)
