"""From a weights folder to a folder that transformers loads: native classes where they compute it, else code beside."""

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import save_file

from ablab.core.errors import UserError
from ablab.core.interop import native, plan_json
from ablab.core.interop.folder import (
    BESIDE,
    RECIPE,
    TOKENIZER,
    Source,
    refuse_existing,
    refuse_other_vocabulary,
    whole_folder,
    write_json,
)
from ablab.core.interop.names import given
from ablab.core.interop.native import OWN_CLASS, Class
from ablab.core.interop.text import end_of
from ablab.core.interop.weights import Tensors, Weights
from ablab.core.language.written import dump
from ablab.core.recipe.asks import Multiplies
from ablab.core.recipe.recipe import Recipe, plain

CODE = "modeling_ablab.py"
MODEL = "model.safetensors"
Json = dict[str, Any]
# Of a config.json that was imported: what says nothing about the function, and goes back as it came.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


@dataclass(frozen=True)
class Exported:
    """architecture: the class that loads the folder.  notes: what one must know, a line each."""

    architecture: str
    notes: tuple[str, ...]


def export(weights: Weights, out: Path, tokenizer: Path | None, card: str) -> Exported:
    """Leave a folder for AutoModelForCausalLM.from_pretrained, in one step.

    tokenizer: a tokenizer.json, or None.  card: README.md, in which ARCHITECTURE and NOTES are filled in.
    Raises UserError: `out` exists, a tokenizer of other ids, a stage that cannot be exported.
    """
    refuse_existing(out)
    recipe = forward_of(weights.recipe)
    if tokenizer:
        refuse_other_vocabulary(tokenizer, recipe)
    chosen = native.class_of(recipe)
    notes = _notes(weights.recipe, chosen, tokenizer)
    config = _config(recipe, chosen, weights.source, tokenizer)
    tables: Tensors = {}
    code = ""
    if chosen is OWN_CLASS:
        made = plan_json.written(recipe)
        config["plan"] = made.plan
        tables = made.tables
        code = trunk() + "\n\n" + made.functions.written()
    with whole_folder(out) as partial:
        write_json(partial / "config.json", config)
        (partial / RECIPE).write_text(dump(plain(weights.recipe)))
        if code:
            (partial / CODE).write_text(code)
        _write_tokenizer(partial, weights, recipe, tokenizer)
        filled = card.replace("ARCHITECTURE", chosen.name)
        lines = "\n".join(f"- {note}" for note in notes)
        (partial / "README.md").write_text(filled.replace("NOTES", lines))
        tensors = _tensors(weights, recipe, chosen) | tables
        save_file(tensors, partial / MODEL, metadata={"format": "pt"})
    return Exported(chosen.name, notes)


def forward_of(recipe: Recipe) -> Recipe:
    """The recipe without what acts in training alone.  Raises UserError for a product that acts in decoding too."""
    for part in recipe.model.products:
        if not _in_training_alone(part):
            raise UserError(
                f"{part.kind} multiplies otherwise than plainly, and cannot be exported; "
                "if it does so in training alone, let its class say training_alone = True"
            )
    return replace(recipe, model=replace(recipe.model, products=()), objective=())


def _in_training_alone(product: Multiplies) -> bool:
    return getattr(product, "training_alone", False)


def trunk() -> str:
    """The source of the model that every export of our own class has."""
    return files("ablab.core.interop").joinpath(CODE).read_text()


def _notes(recipe: Recipe, chosen: Class, tokenizer: Path | None) -> tuple[str, ...]:
    notes = []
    if chosen is OWN_CLASS:
        notes.append(
            f"load it, and its tokenizer, with trust_remote_code=True: its forward is in {CODE}"
        )
    left_out = [part.kind for part in (*recipe.objective, *recipe.model.products)]
    if left_out:
        notes.append(f"of training alone, and not exported: {', '.join(left_out)}")
    if not tokenizer:
        notes.append("there is no tokenizer beside the weights")
    return tuple(notes)


def _config(recipe: Recipe, chosen: Class, source: Source, tokenizer: Path | None) -> Json:
    kept = {key: source.config[key] for key in KEPT if key in source.config}
    config = native.config_of(recipe, chosen) | kept | {"dtype": source.dtype}
    if not kept and tokenizer:
        end = end_of(tokenizer)
        config |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return config


def _tensors(weights: Weights, recipe: Recipe, chosen: Class) -> Tensors:
    """Under their names, in the dtypes that they had when they were imported."""
    source = weights.source
    found = given(weights.tensors, recipe, chosen.layout)
    return {
        name: tensor.to(getattr(torch, source.dtypes.get(name, source.dtype)))
        for name, tensor in found.items()
    }


def _write_tokenizer(
    folder: Path, weights: Weights, recipe: Recipe, tokenizer: Path | None
) -> None:
    """The files that stood beside an imported model go back as they came."""
    if tokenizer:
        copyfile(tokenizer, folder / TOKENIZER)
    beside = weights.folder / BESIDE
    for path in sorted(beside.glob("*")) if beside.is_dir() else ():
        copyfile(path, folder / path.name)
    end = end_of(tokenizer) if tokenizer else None
    if tokenizer and not (folder / "tokenizer_config.json").exists():
        word = _word(tokenizer, end)
        special = {"eos_token": word, "bos_token": word, "pad_token": word}
        described: Json = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": recipe.data.context,
            "padding_side": "left",  # as `generate` wants a batch
            "clean_up_tokenization_spaces": False,
            **(special if word else {}),
        }
        write_json(folder / "tokenizer_config.json", described)
    if not (folder / "generation_config.json").exists():
        ids = {} if end is None else {"eos_token_id": end, "pad_token_id": end}
        write_json(folder / "generation_config.json", ids)


def _word(tokenizer: Path, end: int | None) -> str | None:
    from tokenizers import Tokenizer

    return None if end is None else Tokenizer.from_file(str(tokenizer)).id_to_token(end)
