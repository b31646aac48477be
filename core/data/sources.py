"""The token folders that a recipe trains on, one or the sources of a mix: found, verified and fit for each other."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.core.data.codec import rules_digest
from ablab.core.data.corpus import Meta, check_meta, load_verified
from ablab.core.data.mixture import check_epochs, digest_of_data
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.recipe.slots import held


@dataclass(frozen=True)
class Source:
    name: str
    folder: Path
    meta: Meta


def sources_of(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Name -> token folder.  folder: STORE/data/NAME; the sources of a mix are its siblings, sorted by name."""
    mix = recipe.data.mix
    if not mix:
        return {recipe.data.name: folder}
    return {source: folder.parent / source for source in sorted(mix)}


def opened(recipe: Recipe, folder: Path) -> list[Source]:
    """The sources, whose contents are those that their digests name.

    Raises UserError: a folder is missing, damaged, too short, or not what the recipe names; sources of a mix that
    differ in their tokenizer, or are one text twice; more epochs than allowed.
    """
    found = [
        Source(name, path, load_verified(path))
        for name, path in sources_of(recipe, folder).items()
    ]
    _check_digest(recipe, found, folder)
    for source in found:
        check_meta(recipe, source.meta, source.folder)
        _check_end_of_text(recipe, source)
    if recipe.data.mix:
        for source in found[1:]:
            _check_same_tokenizer(found[0], source)
        _check_once(found)
        windows = {one.name: windows_in(one.meta, recipe.data.context) for one in found}
        check_epochs(recipe, windows)
    return found


def windows_in(meta: Meta, context: int) -> int:
    """Windows of one epoch: whole ones at any phase."""
    return (meta.train_tokens - context) // context


def _check_end_of_text(recipe: Recipe, source: Source) -> None:
    """A part that looks for the end of text would find none under another id."""
    for _, _, parts in held(recipe):
        for part in parts:
            named = getattr(part, "end_of_text", source.meta.end_of_text)
            if named != source.meta.end_of_text:
                raise UserError(
                    f"{part.kind}.end_of_text={named}, but {source.folder} ends documents with id "
                    f"{source.meta.end_of_text}; set it to that"
                )


def _check_digest(recipe: Recipe, sources: list[Source], folder: Path) -> None:
    digests = {source.name: source.meta.digest for source in sources}
    digest = digest_of_data(recipe.data, digests.get)
    if recipe.data.digest and recipe.data.digest != digest:
        held = (
            f"the sources {', '.join(digests)} hold" if recipe.data.mix else f"{folder} holds"
        )
        raise UserError(
            f"{held} data {digest}, but the recipe names {recipe.data.digest}; "
            "restore that text, or load the recipe anew"
        )


def _check_same_tokenizer(first: Source, other: Source) -> None:
    if _tokenizer_of(first) != _tokenizer_of(other):
        raise UserError(
            f"{first.name} and {other.name} were tokenized by different tokenizers, so their ids mean different "
            f"text; tokenize one again with {first.folder / 'tokenizer.json'}"
        )


def _tokenizer_of(source: Source) -> tuple[int, str, str]:
    """Equal for folders whose ids mean the same: end of text, bytes of each id, vocabulary and merges."""
    table = (source.folder / "token_bytes.npy").read_bytes()
    return source.meta.end_of_text, hashlib.sha256(table).hexdigest(), _rules(source.folder)


def _rules(folder: Path) -> str:
    """Digest of how text becomes ids; '' where the folder does not say.  Files differ in how JSON is written."""
    try:
        told: dict[str, Any] = json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return rules_digest(told)


def _check_once(sources: list[Source]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        other = seen.setdefault(source.meta.digest, source.name)
        if other != source.name:
            raise UserError(
                f"{other} and {source.name} hold the same tokens ({source.meta.digest}), which would count "
                "twice; drop one from the mix and add its weight to the other's"
            )
