"""From Hugging Face's folder, or IMU-1's checkpoint, to a weights folder: every bit is kept, or refused by name."""

import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from torch import Tensor

from ablab.core.errors import UserError, told
from ablab.core.interop import foreign, weights
from ablab.core.interop.folder import (
    TOKENIZER,
    Source,
    read_json,
    recipe_of,
    refuse_existing,
)
from ablab.core.interop.names import IMU1_CHECKPOINT, OWN, Layout, taken
from ablab.core.recipe.recipe import Recipe

Tensors = dict[str, Tensor]

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HANDED_ON = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
# bf16 and fp16 go into fp32 and back without loss.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Foreign:
    """A model of the other side, as read."""

    recipe: Recipe
    tensors: Tensors  # under our names, in their dtypes
    source: Source


def import_from(
    path: Path, out: Path, context: int | None = None, qk_scale: float | None = None
) -> Foreign:
    """Leave the weights folder `out`.  Raises UserError where `out` exists, and as `read` does."""
    refuse_existing(out)
    model = read(path, out.name, context, qk_scale)
    leave(model, path, out)
    return model


def read(
    path: Path, name: str, context: int | None = None, qk_scale: float | None = None
) -> Foreign:
    """A model of the other side; name: what its recipe shall call its data.

    context: tokens that it shall be good for.  qk_scale: of an IMU-1 model, the factor on q k / sqrt(head_dim) besides
    its gain.  Raises UserError: a file that is absent or damaged, a model that cannot be held.
    """
    if path.is_file():
        return _checkpoint(path, name, context, qk_scale)
    return _folder(path, name, context, qk_scale)


def leave(model: Foreign, path: Path, out: Path) -> None:
    """Write the weights folder `out`, with the tokenizer and what else stands beside the model in `path`."""
    tokenizer = path / TOKENIZER
    with TemporaryDirectory() as beside:
        for name in HANDED_ON:
            if (path / name).is_file():
                copyfile(path / name, Path(beside) / name)
        weights.write(
            out,
            model.recipe,
            model.tensors,
            model.source,
            tokenizer if tokenizer.is_file() else None,
            Path(beside),
        )


# -- a folder ----------------------------------------------------------------------------------------------------------
def _folder(path: Path, name: str, context: int | None, qk_scale: float | None) -> Foreign:
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no config.json; name a folder that save_pretrained wrote, or an IMU-1 .pt file"
        )
    config = read_json(path / "config.json")
    if config.get("model_type") == OWN.name:
        # what acts in training alone was not exported
        recipe = replace(recipe_of(path), objective=())
        layout = OWN
    else:
        scaled = {"qk_scale": qk_scale} if qk_scale else {}
        recipe, layout = foreign.recipe_of({**config, **scaled}, name, context)
    tensors = _tensors(path)
    return _taken(path, str(config["model_type"]), config, tensors, recipe, layout)


def _tensors(path: Path) -> Tensors:
    if (path / ONE_FILE).is_file():
        return weights.read_tensors(path / ONE_FILE)
    if not (path / INDEX).is_file():
        pickled = any(path.glob("pytorch_model*.bin"))
        cure = "save it with safe_serialization=True" if pickled else "it is no whole model"
        raise UserError(f"{path} holds neither {ONE_FILE} nor {INDEX}; {cure}")
    listed = read_json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError(f"{path / INDEX} has no weight_map")
    tensors: Tensors = {}
    for file in sorted(set(map(str, listed.values()))):
        if Path(file).name != file:
            raise UserError(f"{path / INDEX} names {file!r}, outside its folder")
        tensors |= weights.read_tensors(path / file)
    if missing := sorted(listed.keys() - tensors.keys()):
        raise UserError(f"{path / INDEX} lists {missing[0]}, which its files do not hold")
    return tensors


def _taken(
    path: Path,
    form: str,
    config: Mapping[str, Any],
    tensors: Tensors,
    recipe: Recipe,
    layout: Layout,
) -> Foreign:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{path}: {name} is {tensor.dtype}; only {', '.join(DTYPES.values())} can be held"
            )
    counted = Counter(DTYPES[tensor.dtype] for tensor in tensors.values())
    usual = counted.most_common(1)[0][0] if counted else "float32"
    others = {
        name: DTYPES[tensor.dtype]
        for name, tensor in tensors.items()
        if DTYPES[tensor.dtype] != usual
    }
    source = Source(str(path), form, usual, others, dict(config))
    ours = taken(str(path), tensors, recipe, layout)
    return Foreign(recipe, ours, source)


# -- IMU-1 -------------------------------------------------------------------------------------------------------------
def _checkpoint(path: Path, name: str, context: int | None, qk_scale: float | None) -> Foreign:
    """The trainer's own file: {config, model, optimizer, iteration, run_id}."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as flaw:
        raise UserError(
            f"cannot read {path} as tensors and plain values alone: {told(flaw)}"
        ) from None
    if not isinstance(held, dict) or not {"config", "model"} <= held.keys():
        raise UserError(f"{path} is no checkpoint of IMU-1: it holds no 'config' and 'model'")
    config = _released_config(path, held["config"])
    scaled = {"qk_scale": qk_scale} if qk_scale else {}
    recipe, _ = foreign.recipe_of({**config, **scaled}, name, context)
    named: Mapping[str, Any] = held["model"]
    tensors = {
        key.removeprefix("_orig_mod."): value
        for key, value in named.items()
        if isinstance(value, Tensor)
    }
    return _taken(path, "imu_1 checkpoint", config, tensors, recipe, IMU1_CHECKPOINT)


LONGEST = 8192  # positions of its rotary tables


def _released_config(path: Path, told_there: Any) -> dict[str, Any]:
    """The trainer's config under Hugging Face's names."""
    try:
        whole = msgspec.json.decode(told_there) if isinstance(told_there, str) else told_there
        model = whole["model"]
        heads = model["n_heads"]
        return {
            "model_type": "imu_1",
            "vocab_size": model["vocab_size"],
            "hidden_size": model["d_model"],
            "intermediate_size": model["d_ff"] // 64 * 64,
            "num_hidden_layers": model["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": model.get("n_kv_heads") or heads,
            "max_position_embeddings": LONGEST,
            "rms_norm_eps": 1e-5,
            "rope_theta": model.get("theta", 10_000.0),
            # its head is a matrix of its own whatever weight_tying says
            "tie_word_embeddings": False,
            "attn_qknorm": model.get("attn_qknorm", False),
            "attn_val_residual": model.get("attn_val_residual", False),
            "attn_gating": model.get("attn_gating", False),
            "layernorm_scaling": model.get("layernorm_scaling", False),
        }
    except (KeyError, TypeError, msgspec.DecodeError) as flaw:
        raise UserError(f"{path}: its config lacks what a model needs: {told(flaw)}") from None
