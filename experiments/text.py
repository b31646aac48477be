"""Numbers and tables as text for people."""

import sys
from collections.abc import Iterable, Sequence

import typer

Row = dict[str, str]  # the head of a column -> what stands there


def count(number: int) -> str:
    """12,345 as it is, 1,234,567 as 1.2 M."""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def table(rows: Sequence[Row], spare: Iterable[str] = ()) -> None:
    """A rich table on a terminal, aligned columns elsewhere.

    spare: the columns that a narrow terminal goes without, the first to go first.
    """
    widths = {}
    for head in rows[0]:
        widths[head] = max(len(head), *(len(row[head]) for row in rows))
    if sys.stdout.isatty():
        return _drawn(rows, widths, spare)
    heads = {head: head for head in widths}
    for row in (heads, *rows):
        line = "  ".join(row[head].ljust(width) for head, width in widths.items())
        typer.echo(line.rstrip())


def _drawn(rows: Sequence[Row], widths: dict[str, int], spare: Iterable[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    without = []
    for head in spare:
        gaps = 2 * (len(widths) - 1)
        if sum(widths.values()) + gaps > console.width:
            del widths[head]
            without.append(head)
    drawn = Table(header_style="bold", box=None, pad_edge=False)
    for i, head in enumerate(widths):
        drawn.add_column(head, no_wrap=i == 0)  # the name of an arm is never cut
    for row in rows:
        drawn.add_row(*(row[head].replace("[", "\\[") for head in widths))
    console.print(drawn)
    if without:
        typer.echo(f"(too narrow for: {', '.join(without)})")
