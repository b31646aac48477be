"""`ablab new`: a file to begin with."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Write a new file from a template.")


@app.command()
def intervention(
    name: Annotated[str, typer.Argument(help="a word such as my_idea")],
    folder: Annotated[Path, typer.Option(help="where to write; name it to --plugins")] = Path(
        "plugins"
    ),
) -> None:
    """Write FOLDER/NAME.py: a neutral intervention that passes the contract tests; change it into yours."""
    from ablab.ablations.registry import discover
    from ablab.ablations.template import write

    discover()
    path = write(name, folder)
    typer.echo(f"wrote {path}")
    typer.echo(f"see it:  ablab list --plugins {folder}")
    typer.echo(
        f"test it: pytest tests/contracts --plugins {folder.absolute()} -k {name}   (in a checkout of ablab)"
    )
