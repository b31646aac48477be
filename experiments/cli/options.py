"""Options that several groups of commands take, said once."""

from pathlib import Path
from typing import Annotated

import typer

Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugins", help="a folder with interventions of your own; repeat for more"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="runs at a time (one a GPU, 4 with runtime.turns=false, else cores/threads); on one GPU they train in turn",
    ),
]
