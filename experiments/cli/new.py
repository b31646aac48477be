"""`ablab new`: a file to begin with."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option(help="where to write; name it to --plugins")]
app = typer.Typer(no_args_is_help=True, help="Write a new file from a template.")


@app.command()
def intervention(
    name: Annotated[str, typer.Argument(help="a word such as my_idea")],
    folder: Folder = Path("plugins"),
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


@app.command()
def design(
    name: Annotated[str, typer.Argument(help="a word such as ladder")],
    folder: Folder = Path("plugins"),
) -> None:
    """Write FOLDER/NAME.py: a function from a treatment to cells; change it into your design."""
    from ablab.ablations.registry import discover
    from ablab.ablations.template import write_design

    discover()
    path = write_design(name, folder)
    typer.echo(f"wrote {path}")
    typer.echo(
        f"see its cells: ablab run quickstart design={name} --plugins {folder} --dry-run"
    )
