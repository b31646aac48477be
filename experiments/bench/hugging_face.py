"""The peer of `ablab bench step --against hf`: Hugging Face's Llama of the recipe's shape, trained with care.

fp32 weights; on a GPU bf16 autocast, model and cross-entropy compiled as one graph, SDPA; fused AdamW; gradients
clipped as the recipe does; the same rows in the same micro-batches.  It has none of the recipe's interventions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablab.core.data.tokens import Tokens
from ablab.core.errors import UserError
from ablab.core.model.plan import plan_of
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Settled, repeat_bits
from ablab.experiments.bench.phases import Marks


@contextmanager
def any_algorithm() -> Iterator[None]:
    """As in a process of its own: a trainer beside it may have asked for algorithms that repeat their bits."""
    asked = torch.are_deterministic_algorithms_enabled()
    repeat_bits(False)
    yield
    repeat_bits(asked)


class HuggingFace:
    """`step()` is one optimizer step.  runtime: settled.  Raises UserError without transformers."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Settled,
        folder: Path,
        marks: Marks,
    ) -> None:
        torch.manual_seed(0)
        self.recipe = recipe
        self.marks = marks
        self.rows = runtime.micro_batch
        self.device = torch.device(runtime.device)
        self.bf16 = runtime.dtype == "bf16"
        self.tokens = Tokens(recipe, folder)
        self.model = llama(recipe).to(self.device)
        self.loss = torch.compile(self._loss) if runtime.compile else self._loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=3e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        self.t = 0
        weights = "fp32 weights, bf16 autocast" if self.bf16 else "fp32"
        how = "compiled" if runtime.compile else "eager"
        self.about = f"{weights}, {how}, fused AdamW, micro-batches of {self.rows}"
        self.flops_per_token = flops_per_token(recipe, self.model)

    def _loss(self, block: Tensor) -> Tensor:
        """Mean cross-entropy of int64 [B,T+1], in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=block[:, :-1], use_cache=False).logits
        targets = block[:, 1:].flatten()
        return F.cross_entropy(logits.float().flatten(0, 1), targets)

    @any_algorithm()
    def step(self) -> None:
        batch = self.recipe.data.batch
        for first in range(0, batch, self.rows):
            self.marks("data")
            block = self._on_device(self.tokens.rows(self.t, first, self.rows))
            self.marks("forward")
            loss = self.loss(block)
            self.marks("backward")
            (loss * (self.rows / batch)).backward()
        self.marks("optimizer")
        if clip := self.recipe.optim.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.t += 1

    def _on_device(self, block: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return block
        return block.pin_memory().to(self.device, non_blocking=True)

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def show_phases(self) -> None:
        """Its kernels are launched one by one, each by its phase, already."""


def flops_per_token(recipe: Recipe, llama: nn.Module) -> int:
    """6 * parameters in matrix products + causal attention, as core/model/cost.py counts for a recipe."""
    linears = [one for one in llama.modules() if isinstance(one, nn.Linear)]
    parameters = sum(one.weight.numel() for one in linears)
    model = recipe.model
    channels = model.layers * model.heads * model.attention.head_dim
    return 6 * parameters + 6 * recipe.data.context * channels


def llama(recipe: Recipe) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError(
            "--against hf needs the package transformers, which is not installed here;"
            " pip install transformers"
        ) from None
    model = recipe.model
    shape: dict[str, Any] = {
        "vocab_size": recipe.data.vocab,
        "hidden_size": model.width,
        "intermediate_size": hidden(recipe),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.attention.head_dim,
        "max_position_embeddings": recipe.data.context,
        "tie_word_embeddings": model.tied,
        "rms_norm_eps": model.norm_eps,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


def hidden(recipe: Recipe) -> int:
    """Feed-forward width.  Raises UserError for a feed-forward that Llama does not have."""
    bound = plan_of(recipe).blocks[0].ffn.inner.bound
    if set(bound) != {"gate_up", "down"}:
        raise UserError(
            f"--against hf compares with Llama's SwiGLU, but model.ffn is {recipe.model.ffn.kind!r};"
            " choose a cell without it"
        )
    return bound["down"].weight.shape[1]
