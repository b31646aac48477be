"""The peer of `ablab bench step --against hf`: Hugging Face's Llama of the recipe's shape, trained with care.

fp32 weights; on a GPU bf16 autocast, model and cross-entropy compiled as one graph, SDPA; fused AdamW; gradients
clipped as the recipe does; the same rows in the same micro-batches.  It has none of the recipe's interventions.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablab.core.errors import UserError
from ablab.core.model.plan import plan_of
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Settled
from ablab.experiments.bench.peer import Peer
from ablab.experiments.bench.phases import Marks


class HuggingFace(Peer):
    """Raises UserError without transformers, and for a feed-forward that Llama does not have."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Settled,
        folder: Path,
        marks: Marks,
    ) -> None:
        super().__init__(recipe, runtime, folder, marks)
        torch.manual_seed(0)
        self.bf16 = runtime.dtype == "bf16"
        self.clip = recipe.optim.clip
        self.model = llama(recipe).to(self.device)
        self.loss = torch.compile(self._loss) if runtime.compile else self._loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=3e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        weights = "fp32 weights, bf16 autocast" if self.bf16 else "fp32"
        how = "compiled" if runtime.compile else "eager"
        self.about = f"{weights}, {how}, fused AdamW, micro-batches of {self.rows}"

    def _loss(self, block: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=block[:, :-1], use_cache=False).logits
        targets = block[:, 1:].flatten()
        return F.cross_entropy(logits.float().flatten(0, 1), targets)


def llama(recipe: Recipe) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError(
            "Hugging Face's Llama needs the package transformers, which is not installed here;"
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
            "Hugging Face's Llama has a SwiGLU,"
            f" but model.ffn is {recipe.model.ffn.kind!r}; choose a cell without it"
        )
    return bound["down"].weight.shape[1]
