"""Sampling from a model, token by token, with its cache."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.core.errors import UserError
from ablab.core.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer, tokens: Tensor, count: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Sample `count` tokens after tokens: int [B,T]; temperature 0 is greedy.  Returns int [B, T + count]."""
    if tokens.shape[1] + count > model.context:
        raise UserError(
            f"{tokens.shape[1]} + {count} tokens exceed the model's context of {model.context}; "
            "ask for fewer"
        )
    draw = torch.Generator(tokens.device).manual_seed(seed)
    logits, cache = model.extend(tokens, None)
    for _ in range(count):
        odds = _odds(logits[:, -1].float(), temperature)
        new = torch.multinomial(odds, 1, generator=draw)
        tokens = torch.cat((tokens, new), dim=1)
        logits, cache = model.extend(new, cache)
    return tokens


def _odds(logits: Tensor, temperature: float) -> Tensor:
    """logits: [B,V] -> probabilities [B,V]; at temperature 0, one of 1."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.softmax(logits / temperature, -1)
