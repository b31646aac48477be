"""`ablab watch`: an experiment's page while it runs."""

from typing import Annotated

import typer

from ablab.experiments.cli.asked import held_name, store_of
from ablab.experiments.cli.options import Name, Overrides, Plugins, Where


def watch(
    name: Name,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8050,
    plugins: Plugins = None,
    store: Where = None,
) -> None:
    """The report as a page on this machine while the grid runs: arms, curves, verdicts so far, time left."""
    where = store_of(store)
    held = held_name(where, name, overrides, plugins)
    from ablab.experiments.track.live_page import serve

    serve(where, held, port, typer.echo)
