"""The tensors of a weights folder, checked against the plan of its recipe; and a model that takes them over."""

import gc
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, copytree

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ablab.core.errors import UserError
from ablab.core.interop.folder import (
    BESIDE,
    RECIPE,
    SOURCE,
    TOKENIZER,
    WEIGHTS,
    Source,
    recipe_of,
    refuse_other_vocabulary,
    source_of,
    whole_folder,
    write_json,
)
from ablab.core.language.declare import params
from ablab.core.language.written import dump
from ablab.core.model.plan import plan_of
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.recipe import Recipe, plain

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """A model that stands by itself.  tensors: by the plan's names, fp32, in the shapes that it declares."""

    folder: Path
    recipe: Recipe
    tensors: Tensors
    source: Source = Source()


def load(folder: Path) -> Weights:
    """Raises UserError: a damaged file, tensors that are not those of the recipe's plan."""
    recipe = recipe_of(folder)
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    refuse_others(path, tensors, shapes_of(recipe))
    return Weights(folder, recipe, tensors, source_of(folder))


def shapes_of(recipe: Recipe) -> Shapes:
    """Name -> shape of every parameter."""
    return {name: declared.shape for name, declared in params(plan_of(recipe))}


def read_tensors(path: Path) -> Tensors:
    """Of a safetensors file, mapped into memory.  Raises UserError for one that is damaged or no such file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as flaw:
        raise UserError(
            f"cannot read {path}: {flaw}; it is no whole safetensors file"
        ) from None


def refuse_others(where: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Raises UserError for a tensor that is missing, beyond the plan, or of another shape."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(
                f"{where} lacks {name} of shape {list(shape)}, which its recipe asks for"
            )
        if (there := tuple(tensors[name].shape)) != shape:
            raise UserError(
                f"{where} holds {name} of shape {list(there)}, but its recipe asks for {list(shape)}"
            )
    if beyond := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{where} holds {beyond[0]}, for which its recipe has no place")


def write(
    out: Path,
    recipe: Recipe,
    tensors: Mapping[str, Tensor],
    source: Source,
    tokenizer: Path | None = None,
    beside: Path | None = None,
) -> None:
    """Leave a weights folder, in one step.  beside: a folder of files to hand on.

    Raises UserError: `out` exists, tensors that are not those of the plan, a tokenizer with more ids than the model.
    """
    refuse_others(out, tensors, shapes_of(recipe))
    if tokenizer:
        refuse_other_vocabulary(tokenizer, recipe)
    with whole_folder(out) as partial:
        (partial / RECIPE).write_text(dump(plain(recipe)))
        write_json(partial / SOURCE, source)
        if tokenizer:
            copyfile(tokenizer, partial / TOKENIZER)
        if beside and beside.is_dir():
            copytree(beside, partial / BESIDE)
        wide = {name: value.float().contiguous() for name, value in tensors.items()}
        save_file(wide, partial / WEIGHTS, metadata={"digest": digest_of(recipe, wide)})


def digest_of(recipe: Recipe, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the weights' bits, 16 hex digits, as a trainer's."""
    total = hashlib.sha256()
    for name in names_in_order(recipe):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def names_in_order(recipe: Recipe) -> Iterable[str]:
    """Of the parameters, as the built model lists them."""
    with torch.device("meta"):
        return [name for name, _ in Transformer(recipe).named_parameters()]


def built(
    weights: Weights,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a folder; dtype: of its activations."""
    gc.collect()  # a model is in cycles: one that was asked before goes before this one comes
    model = Transformer(weights.recipe, dtype)
    take_over(model, weights)
    return model.to(device).eval()


def built_of(recipe: Recipe, tensors: Mapping[str, Tensor]) -> Transformer:
    """A model of tensors that stand in no folder yet."""
    return built(Weights(Path("these tensors"), recipe, dict(tensors)))


@torch.no_grad()
def take_over(model: Transformer, weights: Weights) -> None:
    """Copy every parameter by name, bit for bit.

    Raises UserError where the folder lacks one of the model's parameters, has it in another shape, or has one more.
    """
    values = dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    refuse_others(weights.folder / WEIGHTS, weights.tensors, shapes)
    for name, value in values.items():
        value.copy_(weights.tensors[name])
