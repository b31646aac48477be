"""The model card of an export: whose weights these are, how they were trained, and what was found of the recipe."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ablab.core.interop.folder import Source
from ablab.core.language.written import dump
from ablab.core.recipe.recipe import Recipe, plain, run_id
from ablab.core.store.record import Record


def card(folder: Path, recipe: Recipe, source: Source, verdicts: Iterable[str] = ()) -> str:
    """README.md, in which the export fills ARCHITECTURE and NOTES in.

    verdicts: lines of reports of experiments that hold the run.
    """
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [ablab]\n---",
        f"# {folder.name}",
        "Exported by ablab as `ARCHITECTURE`.",
        "NOTES",
        _provenance(folder, recipe, source),
    ]
    if lines := "\n".join(verdicts):
        parts.append(f"## What was found\n\n{lines}")
    parts.append(f"## Recipe\n\n```yaml\n{dump(plain(recipe))}```")
    return "\n\n".join(parts) + "\n"


def _provenance(folder: Path, recipe: Recipe, source: Source) -> str:
    told = _of_a_source(source) if source.path else _of_a_run(folder, recipe)
    rows = [f"| {name} | {value} |" for name, value in told.items() if value != ""]
    return "\n".join(["## Provenance", "", "| what | which |", "|---|---|", *rows])


def _of_a_source(source: Source) -> Mapping[str, Any]:
    return {
        "imported from": f"`{source.path}`",
        "form": source.form,
        "dtype": source.dtype,
        "since then": "; ".join(source.done),
    }


def _of_a_run(folder: Path, recipe: Recipe) -> Mapping[str, Any]:
    record = Record(folder)
    result = record.result()
    told: dict[str, Any] = {
        "run": f"`{run_id(recipe)}`",
        "data": f"{recipe.data.name}, digest `{recipe.data.digest}`",
    }
    if result is None:
        return told
    told |= {
        "status": result.status,
        "steps": f"{result.step:,}",
        "tokens": f"{result.tokens:,}",
        "code": f"`{result.code}`",
        "digest of the weights": f"`{result.evaluated or result.weights}`",
    }
    scores = {name: f"{value:.6g}" for name, value in sorted(result.metrics.items())}
    return told | {name: value for name, value in scores.items() if "val/" in name}
