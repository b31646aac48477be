"""A weights folder: a model that stands by itself.  No torch here.

    FOLDER/recipe.yaml           its model, parametrization, objective, data.vocab and data.context decide the function
           weights.safetensors   every parameter of its plan, fp32, by the plan's names
           tokenizer.json        of an imported or converted one
           source.json           whence it came, `Source`: of an imported or converted one
           hf/                   what stood beside its weights on the other side: tokenizer_config.json and the like

The folder of a run that kept its weights is one too: its tokenizer is that of the token folder its recipe names.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.recipe.load import blaming, read_yaml
from ablab.core.recipe.recipe import Recipe, check
from ablab.core.store.files import FLAWS, writing
from ablab.core.store.record import Record
from ablab.core.store.store import Store

RECIPE = "recipe.yaml"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SOURCE = "source.json"
BESIDE = "hf"  # folder of files that are handed on as they are


@dataclass(frozen=True)
class Source:
    """Whence a folder came."""

    path: str = ""
    form: str = ""  # llama, qwen3, imu_1, imu_1 checkpoint, ablab
    dtype: str = "float32"  # of the tensors there
    dtypes: dict[str, str] = field(
        default_factory=dict
    )  # of those that had another, by their names there
    config: dict[str, Any] = field(default_factory=dict)  # as it stood there
    done: list[str] = field(default_factory=list)  # what was done to them since, a line each


def found(name: str, store: Store) -> Path:
    """The weights folder that a person names: a path, or the id of a run in the store, or its beginning.

    Raises UserError: nothing of that name, several, or one without weights.
    """
    path = Path(name)
    if path.is_dir():
        return _with_weights(path)
    run = store.id_of(name, "name a weights folder, or one that `ablab runs` lists")
    return _with_weights(store.run(run).folder)


def _with_weights(folder: Path) -> Path:
    if not (folder / RECIPE).is_file():
        import_it = f"import it first: ablab import-hf {folder} --out NEW"
        foreign = (folder / "config.json").is_file()
        raise UserError(
            f"{folder} holds no {RECIPE}; {import_it if foreign else 'name a run or a weights folder'}"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(_without_weights(folder))
    return folder


def _without_weights(folder: Path) -> str:
    if not (folder / "run.json").is_file():
        return f"{folder} holds no {WEIGHTS}; make the folder anew"
    if Record(folder).result() is None:
        return f"run {folder.name} has not ended, and leaves its weights at the end; go on with it first"
    return (
        f"run {folder.name} kept no weights; delete {folder} "
        "and train it again with runtime.keep_weights=true"
    )


def recipe_of(folder: Path) -> Recipe:
    """Raises UserError for one that is damaged, or names a part that is not known here."""
    path = folder / RECIPE
    with blaming(path):
        return check(parse(Recipe, read_yaml(path), ""))


def source_of(folder: Path) -> Source:
    """Empty of a run.  Raises UserError for a damaged one."""
    path = folder / SOURCE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Source)
    except FileNotFoundError:
        return Source()
    except (OSError, *FLAWS) as flaw:
        raise UserError(f"cannot read {path}: {flaw}; make the folder anew") from None


def tokenizer_of(folder: Path, recipe: Recipe, store: Store) -> Path | None:
    """The tokenizer.json of the folder, else that of the token folder, or the first of a mix, which the recipe names.

    None where there is none.  Raises UserError where the store holds other tokens than the recipe's.
    """
    own = folder / TOKENIZER
    if own.is_file():
        return own
    from ablab.core.data.corpus import load_meta
    from ablab.core.data.mixture import digest_of_data
    from ablab.core.data.sources import sources_of

    sources = sources_of(recipe, store.root / "data" / recipe.data.name)
    if not all((one / TOKENIZER).is_file() for one in sources.values()):
        return None
    digest = digest_of_data(recipe.data, lambda source: load_meta(sources[source]).digest)
    if recipe.data.digest not in (None, digest):
        raise UserError(
            f"{store.root / 'data'} holds {recipe.data.name} as {digest}, but {folder.name} was trained on "
            f"{recipe.data.digest}; name its tokenizer with --tokenizer FILE"
        )
    return next(iter(sources.values())) / TOKENIZER


def refuse_other_vocabulary(tokenizer: Path, recipe: Recipe) -> None:
    """Raises UserError for a tokenizer that is unreadable, or has ids that the model has no row for."""
    from tokenizers import Tokenizer

    try:
        ids = max(Tokenizer.from_file(str(tokenizer)).get_vocab().values(), default=-1) + 1
    except Exception as flaw:  # the library raises bare Exception
        raise UserError(f"cannot read the tokenizer {tokenizer}: {flaw}") from None
    if ids > recipe.data.vocab:
        raise UserError(
            f"{tokenizer} has {ids:,} ids, but the model has {recipe.data.vocab:,}; "
            "name the tokenizer that it was trained with"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which becomes `out` when the block has ended, and vanishes if it fails.

    Raises UserError where `out` exists or cannot be written.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with writing(out):
        try:
            partial.mkdir(parents=True)
            yield partial
            refuse_existing(out)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; nothing was written: choose another --out")


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError: absent, unreadable, or no mapping."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as refusal:
        raise UserError(f"cannot read {path}: {refusal.strerror or refusal}") from None
    except FLAWS as flaw:
        raise UserError(f"{path} is not JSON that holds a mapping: {flaw}") from None


def write_json(path: Path, content: Mapping[str, Any] | Source) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
