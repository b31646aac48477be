"""`ablab new`: a file to begin with."""

import importlib.util
import shlex
import sys
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
    from ablab.ablations import template
    from ablab.ablations.registry import discover

    discover()
    path = template.write(name, folder)
    typer.echo(f"wrote {path}")
    typer.echo(f"see it:  ablab list --plugins {folder}")
    typer.echo(f"test it: {_contract_tests(folder.absolute(), name)}")


def _contract_tests(folder: Path, name: str) -> str:
    """The command that runs them from any folder; they come with a checkout alone."""
    tests = Path(__file__).resolve().parents[2] / "tests" / "contracts"
    words = f"--plugins {shlex.quote(str(folder))} -k {name}"
    if not tests.is_dir():
        return f"pytest tests/contracts {words}   (in a checkout of ablab)"
    pytest = f"{shlex.quote(sys.executable)} -m pytest"
    lacks = (
        "" if importlib.util.find_spec("pytest") else "   (after: pip install 'ablab[plugins]')"
    )
    return f"{pytest} {shlex.quote(str(tests))} {words}{lacks}"


@app.command()
def design(
    name: Annotated[str, typer.Argument(help="a word such as ladder")],
    folder: Folder = Path("plugins"),
) -> None:
    """Write FOLDER/NAME.py: a function from a treatment to cells; change it into your design."""
    from ablab.ablations import template
    from ablab.ablations.registry import discover

    discover()
    path = template.write_design(name, folder)
    typer.echo(f"wrote {path}")
    typer.echo(
        f"see its cells: ablab run quickstart design={name} --plugins {folder} --dry-run"
    )
