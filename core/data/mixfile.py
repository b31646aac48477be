"""Mixes as files:  {"SOURCE": tokens, ...}  or  {weights: {SOURCE: weight, ...}, tokens: N, epochs: E}.

A mix that was checked against the store becomes a config, which sheets name in their `base`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.core.data.folder import Meta, load_meta
from ablab.core.data.mixture import Shares
from ablab.core.errors import UserError
from ablab.core.recipe.load import read_yaml

KEYS = ("weights", "tokens", "epochs")


@dataclass(frozen=True)
class MixFile:
    """weights: source, as written -> weight.  tokens: of a run, where the file says so."""

    path: Path
    weights: dict[str, float]
    tokens: int | None
    epochs: float


@dataclass(frozen=True)
class Portion:
    """What a run takes of a source."""

    source: str
    weight: float  # as written
    share: float
    asked: int | None  # tokens
    there: int
    meta: Meta

    @property
    def epochs(self) -> float | None:
        return None if self.asked is None else self.asked / self.there


def read_mix(path: Path) -> MixFile:
    """Raises UserError: not JSON or YAML, a source named twice, a weight that is no finite number > 0."""
    told = _json(path) if path.suffix.lower() == ".json" else read_yaml(path)
    if "weights" in told:
        if unknown := [key for key in told if key not in KEYS]:
            raise UserError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
        weights = told["weights"]
        tokens = told.get("tokens")
    else:
        weights = {source: count for source, count in told.items() if source != "epochs"}
        tokens = None
    if not isinstance(weights, Mapping):
        raise UserError(
            f"{path}: weights must be a mapping of sources to numbers, not {weights!r:.60}"
        )
    try:
        Shares(weights)
    except UserError as flaw:
        raise UserError(f"{path}: {flaw}") from None
    if "weights" not in told:
        tokens = sum(weights.values())
    return MixFile(
        path,
        {str(source): float(weight) for source, weight in weights.items()},
        None if tokens is None else int(_number(path, "tokens", tokens)),
        _number(path, "epochs", told.get("epochs", 1.0)),
    )


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {key} must be a number > 0, not {value!r:.40}")
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{path}: {key} must be a finite number > 0, not {value}")
    return float(value)


def _json(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice")
        return dict(pairs)

    try:
        told = json.loads(path.read_bytes(), object_pairs_hook=once)
    except OSError as refusal:
        raise UserError(f"cannot read {path}: {refusal.strerror}; name a file") from None
    except (ValueError, RecursionError) as flaw:
        raise UserError(
            f"{path} is no mix: {flaw!s:.120}; write {{source: tokens, ...}}"
        ) from None
    if not isinstance(told, dict):
        raise UserError(f"{path} must hold a mapping of sources to tokens, not {told!r:.40}")
    return told


def portions(mix: MixFile, store_data: Path, tokens: int | None = None) -> list[Portion]:
    """What a run of so many tokens takes of each source.

    Raises UserError: a source that is not in the store, or twice; other tokenizers; more epochs than the mix allows.
    """
    names = {source: source_name(source, store_data) for source in mix.weights}
    for source, name in names.items():
        others = [other for other in names if names[other] == name and other != source]
        if others:
            raise UserError(
                f"{mix.path}: {source} and {others[0]} are one source, {name}; drop one"
            )
    weights = {names[source]: weight for source, weight in mix.weights.items()}
    shares = Shares(weights)
    total = tokens or mix.tokens
    found = []
    for number, name in enumerate(shares.names):
        meta = load_meta(store_data / name)
        share = shares.share(number)
        asked = None if total is None else round(total * share)
        found.append(Portion(name, weights[name], float(share), asked, meta.train_tokens, meta))
    _check_one_vocabulary(mix, found)
    _check_epochs(mix, found)
    return found


def source_name(source: str, store_data: Path) -> str:
    """The folder in STORE/data that a mix means, by its name or its path.  Raises UserError."""
    if (store_data / source / "meta.json").is_file() and Path(source).name == source:
        return source
    path = Path(source)
    if (path / "meta.json").is_file() and path.resolve().parent == store_data.resolve():
        return path.resolve().name
    name = path.stem or "NAME"
    if path.exists():
        raise UserError(
            f"{source} is no token folder of {store_data}; bring it in: "
            f"ablab data import {source} --tokenizer TOKENIZER --name {name}"
        )
    raise UserError(
        f"no source {source!r} in {store_data}; fill it: "
        f"ablab data tokenize TEXT --tokenizer TOKENIZER --name {name}"
    )


def _check_one_vocabulary(mix: MixFile, found: list[Portion]) -> None:
    first = found[0]
    for other in found[1:]:
        own = (first.meta.vocab, first.meta.end_of_text)
        if (other.meta.vocab, other.meta.end_of_text) != own:
            raise UserError(
                f"{mix.path}: {first.source} and {other.source} have other tokenizers, of {first.meta.vocab} and "
                f"{other.meta.vocab} ids; tokenize one again"
            )


def _check_epochs(mix: MixFile, found: list[Portion]) -> None:
    for one in found:
        if one.epochs is not None and one.epochs > mix.epochs:
            raise UserError(
                f"{mix.path} asks for {one.asked:,} tokens of {one.source}, which has {one.there:,}: "
                f"{one.epochs:.2f} epochs; write epochs: {math.ceil(one.epochs * 10) / 10} to allow it, or ask for less"
            )


def config_of(mix: MixFile, name: str, found: list[Portion]) -> str:
    """A recipe config: the sources, their weights, and the tokens where the mix says how many."""
    lines = [
        f"# Made by `ablab data mix {mix.path.name}`.  `digest: null` is read from the token folders.",
        "data:",
        f"  name: {name}",
        "  digest: null",
        f"  vocab: {found[0].meta.vocab}",
        f"  epochs: {mix.epochs}",
        "  mix:",
        *(f"    {one.source}: {one.weight!r}" for one in found),
    ]
    if mix.tokens is not None:
        lines.append(f"budget: {{tokens: {mix.tokens}}}")
    return "\n".join(lines) + "\n"
