"""Options that several groups of commands take, said once."""

from pathlib import Path
from typing import Annotated

import typer

Plugins = Annotated[list[Path] | None, typer.Option("--plugins", help="a folder with interventions of your own; repeat for more")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
