"""`ablab sync` and `ablab ui`: the runs in MLflow."""

import json
from typing import Annotated

import typer

from ablab.experiments.cli.asked import store_of
from ablab.experiments.cli.options import Json, Where


def sync(
    names: Annotated[
        list[str] | None, typer.Argument(help="experiments (all in the store)")
    ] = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Rebuild the MLflow view from the run folders; sends only what it lacks."""
    from ablab.experiments.track.mlflow_sync import sync as send

    counts = send(store_of(store), names or None)
    if as_json:
        return typer.echo(json.dumps(counts))
    typer.echo(", ".join(f"{count} {word}" for word, count in counts.items()))


def ui(
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    store: Where = None,
) -> None:
    """The MLflow UI over the local store."""
    from ablab.experiments.track.ui import serve

    serve(store_of(store).root, host, port, typer.echo)
