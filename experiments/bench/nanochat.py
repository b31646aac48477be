"""A peer of `ablab bench peers`: nanochat's GPT of the recipe's shape with its own optimizer, from a checkout of it.

Built as its scripts/base_train.py builds it: on the meta device, compiled as one graph, fp32 weights that each product
casts; MuonAdamW; no clipping.  All its layers attend to the whole context (window_pattern L).  What it has and Llama
has not, value embeddings on every second layer, smear, backout and ReLU^2, stays in; so does its untied head.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ablab.core.errors import UserError, told
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Settled
from ablab.experiments.bench.peer import Peer
from ablab.experiments.bench.phases import Marks

PACKAGE = "nanochat"
READ = "92d63d4"  # the commit whose interface this file was written for
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # ours -> what NANOCHAT_DTYPE calls them
LEAST_WIDTH = 24  # channels that its smear gate reads


class Nanochat(Peer):
    """Raises UserError for a folder that is no checkout of it, and for a shape that it cannot have."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Settled,
        folder: Path,
        marks: Marks,
        checkout: Path,
    ) -> None:
        super().__init__(recipe, runtime, folder, marks)
        check(checkout, recipe)
        shape = shape_of(recipe)
        gpt = module_of(checkout, DTYPES[runtime.dtype])
        torch.manual_seed(0)
        try:
            self.model = built(gpt, shape, self.device)
            with quiet():
                self.optimizer = self.model.setup_optimizer()  # type: ignore[operator]
        except (AttributeError, TypeError) as flaw:
            raise UserError(another(checkout, flaw)) from flaw
        how = "eager"
        self.called: Any = self.model
        if runtime.compile:
            self.called = torch.compile(self.model, dynamic=False)
            how = "compiled"
        self.loss = self._loss
        self.about = (
            f"{runtime.dtype}, {how}, MuonAdamW, {_attention()}, micro-batches of {self.rows}"
        )

    def _loss(self, block: Tensor) -> Tensor:
        return self.called(block[:, :-1].contiguous(), block[:, 1:].contiguous())


def shape_of(recipe: Recipe) -> dict[str, Any]:
    """Words of its GPTConfig.  Raises UserError for a shape that it cannot have."""
    model = recipe.model
    if model.heads * model.attention.head_dim != model.width or model.width < LEAST_WIDTH:
        raise UserError(
            f"nanochat's heads divide the width, of at least {LEAST_WIDTH},"
            f" but model.width={model.width} has {model.heads} heads of {model.attention.head_dim};"
            " choose such a shape, or drop --nanochat"
        )
    return {
        "sequence_len": recipe.data.context,
        "vocab_size": recipe.data.vocab,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_kv_head": model.kv_heads,
        "n_embd": model.width,
        "window_pattern": "L",
    }


def check(checkout: Path, recipe: Recipe) -> None:
    """At a glance, before anything is built.  Raises UserError."""
    shape_of(recipe)
    if not (checkout / PACKAGE / "gpt.py").is_file():
        raise UserError(
            f"--nanochat {checkout}: there is no {PACKAGE}/gpt.py;"
            " name the folder of a checkout of github.com/karpathy/nanochat"
        )


def module_of(checkout: Path, dtype: str) -> ModuleType:
    """Its gpt.py, imported anew: another checkout, or another dtype, may have been imported before.

    Raises UserError.
    """
    for name in [*sys.modules]:
        if name.split(".")[0] == PACKAGE:
            del sys.modules[name]
    os.environ["NANOCHAT_DTYPE"] = dtype  # read once, as it is imported
    sys.path.insert(0, str(checkout.resolve()))
    try:
        with quiet():
            return import_module(f"{PACKAGE}.gpt")
    except Exception as flaw:
        raise UserError(another(checkout, flaw)) from flaw
    finally:
        sys.path.pop(0)


def built(gpt: ModuleType, shape: dict[str, Any], device: torch.device) -> nn.Module:
    with quiet():
        with torch.device("meta"):
            model = gpt.GPT(gpt.GPTConfig(**shape))
        model.to_empty(device=device)
        model.init_weights()
    return model


def another(checkout: Path, flaw: Exception) -> str:
    return (
        f"--nanochat {checkout} cannot be used as nanochat at {READ}: {told(flaw)};"
        " check that commit out, with what it needs installed"
    )


def _attention() -> str:
    """FlashAttention 3 where the Hub's package `kernels` offers it, else PyTorch's."""
    module = sys.modules.get(f"{PACKAGE}.flash_attention")
    return "FA3" if getattr(module, "USE_FA3", False) else "SDPA"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What it prints is dropped, and the handlers that it gives the root logger are taken away again."""
    root = logging.getLogger()
    handlers = [*root.handlers]
    level = root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
