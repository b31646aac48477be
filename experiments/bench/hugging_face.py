"""The peer of `ablab bench step --against hf`: Hugging Face's Llama of the recipe's shape, as a careful user would train it.

fp32 weights; on a GPU bf16 autocast, model and cross-entropy compiled as one graph, SDPA; fused AdamW; gradients clipped as the
recipe does; the same rows in the same micro-batches.  It has none of the recipe's interventions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional as F

from ablab.core.data.tokens import Tokens
from ablab.core.errors import UserError
from ablab.core.model.plan import plan_of
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Settled, repeat_bits
from ablab.experiments.bench.timing import Marks


@contextmanager
def any_algorithm() -> Iterator[None]:
    """As in a process of its own: a trainer beside it may have asked for algorithms that repeat their bits."""
    asked = torch.are_deterministic_algorithms_enabled()
    repeat_bits(False)
    yield
    repeat_bits(asked)


class HuggingFace:
    """`step()` is one optimizer step.  runtime: settled.  Raises UserError without transformers."""

    def __init__(self, recipe: Recipe, runtime: Settled, folder: Path, marks: Marks):
        self.recipe, self.rows, self.marks, self.t = recipe, runtime.micro_batch, marks, 0
        self.device, self.tokens = torch.device(runtime.device), Tokens(recipe, folder)
        bf16 = runtime.dtype == "bf16"
        torch.manual_seed(0)
        self.model = llama(recipe).to(self.device)

        def loss(block: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                logits = self.model(input_ids=block[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())

        self.loss = torch.compile(loss) if runtime.compile else loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        weights = "fp32 weights, bf16 autocast" if bf16 else "fp32"
        self.about = f"{weights}, {'compiled' if runtime.compile else 'eager'}, fused AdamW, micro-batches of {self.rows}"

    @property
    def flops_per_token(self) -> int:
        """6 * parameters in matrix products + causal attention, as core/model/plan.py counts for a recipe."""
        model, linear = (
            self.recipe.model,
            (one for one in self.model.modules() if isinstance(one, torch.nn.Linear)),
        )
        return (
            6 * sum(one.weight.numel() for one in linear)
            + 6
            * model.layers
            * self.recipe.data.context
            * model.heads
            * model.attention.head_dim
        )

    @any_algorithm()
    def step(self) -> None:
        batch, clip = self.recipe.data.batch, self.recipe.optim.clip
        for first in range(0, batch, self.rows):
            self.marks("data")
            block = self.tokens.rows(self.t, first, self.rows)
            block = (
                block.pin_memory().to(self.device, non_blocking=True)
                if self.device.type == "cuda"
                else block
            )
            self.marks("forward")
            loss = self.loss(block)
            self.marks("backward")
            (loss * (self.rows / batch)).backward()
        self.marks("optimizer")
        if clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.t += 1

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def show_phases(self) -> None:
        """Its kernels are launched one by one, each by its phase, already."""


def llama(recipe: Recipe) -> torch.nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError(
            "--against hf needs the package transformers, which is not installed here; pip install transformers"
        ) from None
    model, data = recipe.model, recipe.data
    config = LlamaConfig(
        vocab_size=data.vocab,
        hidden_size=model.width,
        intermediate_size=hidden(recipe),
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.attention.head_dim,
        max_position_embeddings=data.context,
        tie_word_embeddings=model.tied,
        rms_norm_eps=model.norm_eps,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def hidden(recipe: Recipe) -> int:
    """Feed-forward width.  Raises UserError for a feed-forward that Llama does not have."""
    bound = plan_of(recipe).blocks[0].ffn.inner.bound
    if set(bound) != {"gate_up", "down"}:
        raise UserError(
            f"--against hf compares with Llama's SwiGLU, but model.ffn is {recipe.model.ffn.kind!r}; choose a cell without it"
        )
    return bound["down"].weight.shape[1]
