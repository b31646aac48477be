"""`ablab data`: train a tokenizer, fill token folders from text or arrays, mix them, look into them, verify them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import check_folder_name
from ablab.experiments.cli.data_progress import progress

if TYPE_CHECKING:
    from ablab.core.data.folder import Meta

app = typer.Typer(no_args_is_help=True, help="Turn text into token folders (STORE/data/NAME).")

Text = Annotated[
    list[str],
    typer.Argument(
        help="files, folders or quoted globs: .jsonl .ndjson .txt .parquet, also .gz .xz .zst; "
        "or hf:OWNER/NAME[:CONFIG[:SPLIT]]"
    ),
]
Field = Annotated[str, typer.Option(help="JSON key or Parquet column that holds the text")]
Split = Annotated[
    str | None,
    typer.Option(
        help="of .txt: `lines`, `paragraphs` (parted by blank lines), or the words between documents; "
        "without it a file is one document"
    ),
]
Store = Annotated[
    Path, typer.Option(envvar="ABLAB_STORE", help="where runs and token folders live")
]
Name = Annotated[
    str, typer.Option(help="the folder's name in STORE/data, and `data.name` in a recipe")
]
Tokenizer = Annotated[
    str,
    typer.Option(
        help="byte-level: a tokenizer.json, a folder that holds one, or a name on the Hub (gpt2)"
    ),
]
End = Annotated[str, typer.Option(help="the special token that ends a document")]
FolderName = Annotated[str, typer.Argument(help="the folder's name in STORE/data")]
STORE = Path("ablab-store")
SIDES: tuple[Literal["train", "val"], ...] = ("train", "val")
ENDOFTEXT = "<|endoftext|>"


class HoldOut(StrEnum):
    hash = "hash"
    tail = "tail"


class Side(StrEnum):
    train = "train"
    val = "val"


class RawType(StrEnum):
    uint16 = "uint16"
    uint32 = "uint32"


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
    split: Split = None,
) -> None:
    """Train a byte-level BPE.  150 MB of text and 32,000 ids take about 40 s and 0.7 GB on two cores."""
    from ablab.core.data import corpus

    with _clock() as clock, _saying_how_it_is_read(text, split):
        read = corpus.train_tokenizer(text, out, vocab, max_bytes, field, _split(split))
    typer.echo(f"{out}: {vocab:,} ids from {read:,} bytes in {clock()}")


@app.command()
def tokenize(
    text: Text,
    tokenizer: Tokenizer,
    name: Name,
    val: Annotated[
        list[str] | None, typer.Option(help="held-out text; repeat for more")
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="without --val: the share of documents held out (0.01)")
    ] = None,
    hold_out: Annotated[
        HoldOut, typer.Option(help="without --val: by hash of the text, or the last documents")
    ] = HoldOut.hash,
    field: Field = "text",
    split: Split = None,
    skip_bad: Annotated[
        int,
        typer.Option(min=0, help="rows without text to pass over, at most; they are listed"),
    ] = 0,
    end_of_text: End = ENDOFTEXT,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="processes (all cores); the tokens do not depend on it"),
    ] = None,
    store: Store = STORE,
) -> None:
    """Fill STORE/data/NAME with tokens, by all cores; a killed call goes on from what it had finished."""
    from ablab.core.data import corpus
    from ablab.core.data.blocks import Reading
    from ablab.core.data.hub import tokenizer_file
    from ablab.core.data.workers import cores

    check_folder_name("--name ", name)
    folder = store / "data" / name
    reading = _saying_how_it_is_read([*text, *(val or [])], split)
    settings = corpus.Settings(
        reading=Reading(field, _split(split)),
        hold_out=hold_out.value,
        end_of_text=end_of_text,
        skip_bad=skip_bad,
        jobs=jobs or cores(),
    )
    found = tokenizer_file(tokenizer)
    with _clock() as clock, reading, progress() as watch:
        meta = corpus.tokenize(
            text, val or [], found, folder, val_fraction, field, watch, settings
        )
    _say_skipped(folder, meta)
    typer.echo(f"{_filled(folder, meta)}, in {clock()}")


@app.command("import")
def import_(
    arrays: Annotated[
        list[Path],
        typer.Argument(help="tokens: .npy, .npz (values, offsets), raw .bin, or folders"),
    ],
    tokenizer: Tokenizer,
    name: Name,
    val: Annotated[
        list[Path] | None, typer.Option(help="held-out arrays; repeat for more")
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(help="without --val: the share of documents held out, the last ones"),
    ] = 0.01,
    dtype: Annotated[
        RawType | None,
        typer.Option(help="of .bin files (the smallest that holds the vocabulary)"),
    ] = None,
    end_of_text: End = ENDOFTEXT,
    store: Store = STORE,
) -> None:
    """Fill STORE/data/NAME with tokens that were made elsewhere, such as published corpora."""
    from ablab.core.data import corpus
    from ablab.core.data.arrays import Arrays, array_files
    from ablab.core.data.hub import tokenizer_file

    check_folder_name("--name ", name)
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must lie between 0 and 1; try 0.01")
    folder = store / "data" / name
    asked = Arrays(
        array_files(arrays),
        array_files(val or []),
        end_of_text,
        val_fraction,
        dtype.value if dtype else None,
    )
    with _clock() as clock:
        meta = corpus.import_arrays(asked, tokenizer_file(tokenizer), folder)
    typer.echo(f"{_filled(folder, meta)}, in {clock()}")


@app.command()
def mix(
    file: Annotated[
        Path,
        typer.Argument(
            help='JSON or YAML: {"SOURCE": tokens, ...}, or {weights: {...}, tokens: N, epochs: E}'
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="the config to write, for the `base` of a sheet: mix.yaml"),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="of a run, where the file does not say it")
    ] = None,
    store: Store = STORE,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON list, for programs")
    ] = False,
) -> None:
    """Check a mix of token folders: what each gives to a run, and in how many epochs."""
    from ablab.core.data.mixfile import config_of, portions, read_mix
    from ablab.core.store.files import write_atomically

    told = read_mix(file)
    found = portions(told, store / "data", int(tokens) if tokens else None)
    if out and out.exists():
        raise UserError(f"{out} exists already; delete it or choose another --out")
    if out:
        check_folder_name("--out ", out.stem)
        write_atomically(out, config_of(told, out.stem, found).encode())
    if as_json:
        rows = [
            {
                "source": one.source,
                "share": one.share,
                "tokens": one.asked,
                "epochs": one.epochs,
            }
            for one in found
        ]
        return typer.echo(json.dumps(rows, indent=1))
    for one in found:
        asked = "" if one.asked is None else f"{one.asked:>17,} of "
        epochs = "" if one.epochs is None else f"  {one.epochs:.2f} epochs"
        typer.echo(f"{one.source:<24} {one.share:7.2%} {asked}{one.there:,} tokens{epochs}")
    if out:
        typer.echo(f"{out}: name it in a sheet, base: [base, size/70m, {out.stem}]")


def _split(told: str | None) -> str | None:
    """`\\n` as it is typed in a shell."""
    if told == "":
        raise UserError(
            "--split '' parts nothing; write lines, paragraphs, or the words between documents"
        )
    return told.replace("\\n", "\n").replace("\\t", "\t") if told else None


def _filled(folder: Path, meta: "Meta") -> str:
    return (
        f"{folder}: {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens, "
        f"{meta.bytes_per_token:.3f} bytes/token, vocab {meta.vocab:,}, digest {meta.digest}"
    )


@contextmanager
def _saying_how_it_is_read(text: list[str], split: str | None) -> Iterator[None]:
    """What is left out, and what is one document, is said once it is read: on stderr, so that programs read the rest.

    A refusal stays one line; one that speaks of documents ends with what a .txt is.
    """
    from ablab.core.data.documents import passed_over, whole_texts

    whole = [] if split else whole_texts(text)
    more = ", ..." if whole[1:] else ""
    hint = (
        f"each .txt is one document: {len(whole)} ({whole[0].name}{more}); "
        "--split lines, paragraphs or 'WORDS BETWEEN' cuts them"
        if whole
        else ""
    )
    try:
        yield
    except UserError as refusal:
        if hint and "document" in str(refusal):
            raise UserError(f"{refusal}; {hint}") from None
        raise
    if others := passed_over(text):
        names = shorten(", ".join(file.name for file in others), 100, placeholder=" ...")
        typer.echo(f"files of no known format, passed over: {len(others)} ({names})", err=True)
    if hint:
        typer.echo(hint, err=True)


def _say_skipped(folder: Path, meta: "Meta") -> None:
    if not meta.skipped:
        return
    listed = folder / "skipped.txt"
    typer.echo(f"rows without text, passed over: {meta.skipped} ({listed})", err=True)
    for line in listed.read_text().splitlines()[:5]:
        typer.echo(f"  {line}", err=True)


@app.command("list")
def list_folders(
    store: Store = STORE,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON list, for programs")
    ] = False,
) -> None:
    """List the token folders of the store; copies and damaged ones are listed as such."""
    found = sorted((store / "data").glob("[!.]*"))
    rows = [_describe(folder) for folder in found if folder.is_dir()]
    _note_copies(rows)
    if as_json:
        return typer.echo(json.dumps(rows, indent=1))
    if not rows:
        typer.echo(f"no token folders in {store / 'data'}; fill one with `ablab data tokenize`")
    for row in rows:
        typer.echo(_line(row))


@app.command()
def verify(
    name: FolderName,
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


@app.command()
def show(
    name: FolderName,
    store: Store = STORE,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object, for programs")
    ] = False,
) -> None:
    """What a token folder holds: counts, digests, shards, and how its text begins."""
    from ablab.core.data.reading import Folder

    check_folder_name("NAME ", name)
    found = Folder(store / "data" / name)
    meta = found.meta
    begins = {side: found.passage(side, 0, 64).text for side in SIDES}
    if as_json:
        return typer.echo(json.dumps(asdict(meta) | {"begins": begins}, indent=1))
    typer.echo(f"{meta.name}: {meta.dtype}, vocab {meta.vocab:,}, digest {meta.digest}")
    for side in SIDES:
        typer.echo(f"  {side}: {_counts(meta, side)}")
        typer.echo(f"    {shorten(begins[side], 160, placeholder=' ...')}")
    if meta.text:
        typer.echo(
            f"  text {meta.text}, tokenizer {meta.tokenizer}, rows passed over: {meta.skipped}"
        )


def _counts(meta: "Meta", side: Literal["train", "val"]) -> str:
    train = side == "train"
    tokens = meta.train_tokens if train else meta.val_tokens
    size = meta.train_bytes if train else meta.val_bytes
    documents = meta.train_documents if train else meta.val_documents
    counted = "" if documents is None else f", {documents:,} documents"
    return f"{tokens:,} tokens of {size:,} bytes{counted}, shards: {len(meta.files(side))}"


@app.command()
def decode(
    name: FolderName,
    start: Annotated[int, typer.Option(min=0, help="the first token")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="how many")] = 256,
    document: Annotated[
        int | None, typer.Option(min=0, help="a whole document instead, counted from 0")
    ] = None,
    side: Annotated[Side, typer.Option(help="of which tokens")] = Side.train,
    ids: Annotated[bool, typer.Option("--ids", help="numbers, not text")] = False,
    store: Store = STORE,
) -> None:
    """Tokens as text; the end of text as it is written."""
    from ablab.core.data.reading import Folder

    check_folder_name("NAME ", name)
    found = Folder(store / "data" / name)
    if document is None:
        passage = found.passage(side.value, start, tokens)
    else:
        passage = found.document(side.value, document)
    typer.echo(" ".join(map(str, passage.ids)) if ids else passage.text)


def _note_copies(rows: list[dict[str, Any]]) -> None:
    """The same tokens under two names."""
    first: dict[str, str] = {}
    for row in rows:
        if "digest" in row:
            name = first.setdefault(row["digest"], row["name"])
            if name != row["name"]:
                row["copy_of"] = name


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
        + (f"  the same as {row['copy_of']}" if "copy_of" in row else "")
    )


@contextmanager
def _clock() -> Iterator[Callable[[], str]]:
    """Give a function that says the seconds since."""
    start = perf_counter()
    yield lambda: f"{perf_counter() - start:.1f} s"
