"""`ablab data`: train a tokenizer, fill a token folder, list and verify what is there."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Annotated, Any

import typer

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import check_folder_name

app = typer.Typer(no_args_is_help=True, help="Turn text into token folders (STORE/data/NAME).")

Text = Annotated[
    list[str],
    typer.Argument(
        help="files, folders or quoted globs: .jsonl .ndjson .txt .parquet, also .gz .xz"
    ),
]
Field = Annotated[str, typer.Option(help="JSON key or Parquet column that holds the text")]
Store = Annotated[
    Path, typer.Option(envvar="ABLAB_STORE", help="where runs and token folders live")
]
STORE = Path("ablab-store")


@app.command("train-tokenizer")
def train_tokenizer(
    text: Text,
    out: Annotated[Path, typer.Option(help="the tokenizer.json to write")],
    vocab: Annotated[
        int, typer.Option(help="ids in all, <|endoftext|> and 256 bytes included")
    ] = 32_000,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="read only the first so many bytes of text")
    ] = None,
    field: Field = "text",
) -> None:
    """Train a byte-level BPE.  150 MB of text and 32,000 ids take about 40 s and 0.7 GB on two cores."""
    from ablab.core.data import corpus

    _say_passed_over(text)
    with _clock() as clock:
        read = corpus.train_tokenizer(text, out, vocab, max_bytes, field)
    typer.echo(f"{out}: {vocab:,} ids from {read:,} bytes in {clock()}")


@app.command()
def tokenize(
    text: Text,
    tokenizer: Annotated[Path, typer.Option(help="a byte-level tokenizer.json")],
    name: Annotated[
        str, typer.Option(help="the folder's name in STORE/data, and `data.name` in a recipe")
    ],
    val: Annotated[
        list[str] | None, typer.Option(help="held-out text; repeat for more")
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="without --val: documents held out by hash (0.01)")
    ] = None,
    field: Field = "text",
    store: Store = STORE,
) -> None:
    """Fill STORE/data/NAME with tokens.  About 0.7 M tokens a second on two cores."""
    from ablab.core.data import corpus

    check_folder_name("--name ", name)
    folder = store / "data" / name
    _say_passed_over([*text, *(val or [])])
    with _clock() as clock, _progress() as progress:
        meta = corpus.tokenize(
            text, val or [], tokenizer, folder, val_fraction, field, progress
        )
    typer.echo(
        f"{folder}: {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens, "
        f"{meta.bytes_per_token:.3f} bytes/token, vocab {meta.vocab:,}, digest {meta.digest}, in {clock()}"
    )


def _say_passed_over(text: list[str]) -> None:
    """Text that is left out is left out aloud: on stderr, so that programs read the rest."""
    from ablab.core.data.documents import passed_over

    if others := passed_over(text):
        names = shorten(", ".join(file.name for file in others), 100, placeholder=" ...")
        typer.echo(f"files of no known format, passed over: {len(others)} ({names})", err=True)


@app.command("list")
def list_folders(
    store: Store = STORE,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON list, for programs")
    ] = False,
) -> None:
    """List the token folders of the store; a damaged one is listed with what is wrong."""
    found = sorted((store / "data").glob("[!.]*"))
    rows = [_describe(folder) for folder in found if folder.is_dir()]
    if as_json:
        return typer.echo(json.dumps(rows, indent=1))
    if not rows:
        typer.echo(f"no token folders in {store / 'data'}; fill one with `ablab data tokenize`")
    for row in rows:
        typer.echo(_line(row))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="the folder's name in STORE/data")],
    store: Store = STORE,
) -> None:
    """Hash a token folder again and compare: about a second a gigabyte.  A run does so when a file has changed."""
    from ablab.core.data import corpus

    check_folder_name("NAME ", name)
    folder = store / "data" / name
    with _clock() as clock:
        meta = corpus.verify(folder)
    typer.echo(
        f"{folder}: the contents have the digest that meta.json says, {meta.digest}, in {clock()}"
    )


def _describe(folder: Path) -> dict[str, Any]:
    from ablab.core.data.corpus import load_meta

    try:
        return asdict(load_meta(folder))
    except UserError as flaw:
        return {"name": folder.name, "error": str(flaw)}


def _line(row: dict[str, Any]) -> str:
    name = f"{row['name']:<16}"
    if "error" in row:
        return f"{name}  {row['error']}"
    bytes_per_token = row["train_bytes"] / row["train_tokens"]
    return (
        f"{name}  {row['train_tokens']:>14,} train  {row['val_tokens']:>11,} val tokens  "
        f"{bytes_per_token:.3f} bytes/token  vocab {row['vocab']:>7,}  {row['digest']}"
    )


@contextmanager
def _clock() -> Iterator[Callable[[], str]]:
    """Give a function that says the seconds since."""
    start = perf_counter()
    yield lambda: f"{perf_counter() - start:.1f} s"


@contextmanager
def _progress() -> Iterator[Callable[[int], None] | None]:
    """Give `progress(done_bytes)`: a live line on a terminal, None elsewhere.

    The total is unknown: files are packed.
    """
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import (
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    columns = (DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(SpinnerColumn(), "tokenizing", *columns) as bar:
        task = bar.add_task("", total=None)
        yield lambda done: bar.update(task, completed=done)
