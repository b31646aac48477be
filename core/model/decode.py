"""Sampling from a model, token by token, with its cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
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
        vocab = logits.shape[-1]
        if self.temperature == 0:
            likeliest = logits.argmax(-1)
            return F.one_hot(likeliest, vocab).double()
        scaled = logits.double() / self.temperature
        if self.top_k and self.top_k < vocab:
            kept = scaled.topk(self.top_k).values
            scaled = scaled.masked_fill(scaled < kept[:, -1:], -torch.inf)
        odds = scaled.softmax(-1)
        return odds if self.top_p >= 1 else _nucleus(odds, self.top_p)

    def chosen(self, logits: Tensor, draws: list[Generator]) -> list[int]:
        """A token for each row of logits [B,V], by a generator each; the likeliest needs none."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        return drawn(self.odds(logits), draws)


def _nucleus(odds: Tensor, share: float) -> Tensor:
    """The fewest tokens of each row that have the share together, scaled to sum to 1."""
    falling, order = odds.sort(descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    beyond = before >= share
    beyond[:, 0] = False  # the likeliest stays, whatever the share
    kept = falling.masked_fill(beyond, 0.0)
    cut = torch.zeros_like(odds).scatter(-1, order, kept)
    return cut / cut.sum(-1, keepdim=True)


def drawn(odds: Tensor, draws: list[Generator]) -> list[int]:
    """odds [B,V] -> a token a row: the first whose cumulative probability exceeds a uniform number of its generator."""
    uniform = [torch.rand(1, generator=one, dtype=torch.float64) for one in draws]
    reached = odds.cumsum(-1)
    heights = torch.stack(uniform).to(odds.device) * reached[:, -1:]
    found = torch.searchsorted(reached, heights, right=True)
    last = odds.shape[-1] - 1
    return found.squeeze(1).clamp(max=last).tolist()


class Text:
    """One row on its way: it reads its prompt to the end, then says up to `left` tokens.

    It draws by a generator of its own, so that it says the same beside other rows and alone.
    """

    def __init__(self, prompt: Ids, left: int, seed: int):
        self.prompt = prompt
        self.left = left
        self.draw = torch.Generator().manual_seed(seed)
        self.last = 0  # token that it said

    def speaks(self, place: int) -> bool:
        """Whether the token at this place is its own to say."""
        return self.left > 0 and place >= len(self.prompt)

    def say(self, token: int, ends: frozenset[int]) -> None:
        self.last = token
        self.left = 0 if token in ends else self.left - 1

    def token_at(self, place: int) -> int:
        """What the model reads there.  A text that is over repeats itself, and nobody hears it."""
        return self.prompt[place] if place < len(self.prompt) else self.last


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
    texts = [Text(prompt, count, seed + row) for row, prompt in enumerate(prompts)]
    place = min(map(len, prompts))
    begun = [list(prompt[:place]) for prompt in prompts]
    logits, cache = model.extend(torch.tensor(begun, device=device), None)
    while True:
        told: list[int | None] = [None] * len(texts)
        rows = [row for row, text in enumerate(texts) if text.speaks(place)]
        if rows:
            draws = [texts[row].draw for row in rows]
            tokens = sampling.chosen(logits[rows, -1], draws)
            for row, token in zip(rows, tokens, strict=True):
                texts[row].say(token, ends)
                told[row] = token
        yield told
        if not any(text.left for text in texts):
            return
        new = [[text.token_at(place)] for text in texts]
        logits, cache = model.extend(torch.tensor(new, device=device), cache)
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
    sampling = Sampling(temperature)
    steps = stream(model, tokens.tolist(), count, sampling, seed)
    new = torch.tensor(list(steps), device=tokens.device)
    return torch.cat((tokens, new.T), dim=1)
