"""Sampling from a model, token by token, with its cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.core.errors import UserError
from ablab.core.model.transformer import Transformer

Ids = Sequence[int]
NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to its likeliest tokens.

    temperature: 0 takes the likeliest token.  top_k: only so many of them.  top_p: only the fewest that have this
    share of the probability together; cut after top_k, as transformers does.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def odds(self, logits: Tensor) -> Tensor:
        """logits [B,V] -> probabilities [B,V], fp64; at temperature 0, one of 1."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        scaled = logits.double() / self.temperature
        if self.top_k and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        odds = scaled.softmax(-1)
        return odds if self.top_p >= 1 else _nucleus(odds, self.top_p)

    def chosen(self, logits: Tensor, draws: "Draws", rows: Sequence[int]) -> list[int]:
        """A token for each of these rows; logits [B,V].  The likeliest needs no draw."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        return draws(self.odds(logits), rows)


def _nucleus(odds: Tensor, share: float) -> Tensor:
    """The fewest tokens of each row that have the share together, scaled to sum to 1."""
    falling, order = odds.sort(descending=True, stable=True)
    beyond = falling.cumsum(-1) - falling >= share
    beyond[:, 0] = False  # the likeliest stays, whatever the share
    kept = falling.masked_fill(beyond, 0.0)
    cut = torch.zeros_like(odds).scatter(-1, order, kept)
    return cut / cut.sum(-1, keepdim=True)


class Draws:
    """Each row has a generator of its own: what it draws does not depend on the rows beside it."""

    def __init__(self, rows: int, seed: int):
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]

    def __call__(self, odds: Tensor, rows: Sequence[int]) -> list[int]:
        """odds [B,V] of these rows -> a token each: the first whose cumulative probability exceeds a uniform number."""
        chosen = [self.generators[row] for row in rows]
        draws = [torch.rand(1, generator=one, dtype=torch.float64) for one in chosen]
        reached = odds.cumsum(-1)
        heights = torch.stack(draws).to(odds.device) * reached[:, -1:]
        found = torch.searchsorted(reached, heights, right=True).squeeze(1)
        return found.clamp(max=odds.shape[-1] - 1).tolist()


@torch.inference_mode()
def stream(
    model: Transformer,
    prompts: Sequence[Ids],
    count: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    ends: frozenset[int] = NOBODY,
) -> Iterator[list[int | None]]:
    """Up to `count` tokens after each prompt: at each step the new token of each row, or None.

    All rows advance together from the end of the shortest prompt; a longer one reads on meanwhile, a token a step, so
    that nothing is padded.  A row is over after one of `ends`.
    Raises UserError: an empty prompt, or one that leaves no room for `count` tokens in the model's context.
    """
    _refuse_what_does_not_fit(model, prompts, count)
    device = model.embedding.table.device
    draws = Draws(len(prompts), seed)
    left = [count] * len(prompts)
    last = [0] * len(prompts)
    place = min(map(len, prompts))
    begun = torch.tensor([list(prompt[:place]) for prompt in prompts], device=device)
    logits, cache = model.extend(begun, None)
    while True:
        # a row that is over goes on with what it said last, which nobody hears
        rows = [row for row, prompt in enumerate(prompts) if place >= len(prompt) and left[row]]
        told: list[int | None] = [None] * len(prompts)
        if rows:
            chosen = sampling.chosen(logits[rows, -1], draws, rows)
            for row, token in zip(rows, chosen, strict=True):
                told[row] = last[row] = token
                left[row] = 0 if token in ends else left[row] - 1
        yield told
        if not any(left):
            return
        reading = [prompt[place : place + 1] for prompt in prompts]
        fed = [list(one) or [spoken] for one, spoken in zip(reading, last, strict=True)]
        logits, cache = model.extend(torch.tensor(fed, device=device), cache)
        place += 1


def _refuse_what_does_not_fit(model: Transformer, prompts: Sequence[Ids], count: int) -> None:
    if not prompts or not all(prompts):
        raise UserError("a prompt needs a token at least")
    longest = max(map(len, prompts))
    if longest + count > model.context:
        raise UserError(
            f"{longest} + {count} tokens exceed the model's context of {model.context}; "
            "ask for fewer"
        )


def generate(
    model: Transformer, tokens: Tensor, count: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """Sample `count` tokens after tokens: int [B,T]; temperature 0 is greedy.  Returns int [B, T + count]."""
    steps = stream(model, tokens.tolist(), count, Sampling(temperature), seed)
    new = torch.tensor(list(steps), device=tokens.device)
    return torch.cat((tokens, new.T), dim=1)
