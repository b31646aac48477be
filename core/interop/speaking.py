"""A weights folder that speaks: prompts in, texts out as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ablab.core.errors import UserError
from ablab.core.interop.folder import tokenizer_of
from ablab.core.interop.text import Pieces, Words, ends_of
from ablab.core.interop.weights import built, load
from ablab.core.model.decode import Sampling, stream
from ablab.core.model.transformer import Transformer
from ablab.core.store.store import Store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Speaker:
    """ends: ids after which a text is over."""

    model: Transformer
    words: Words
    ends: frozenset[int]

    @classmethod
    def of(
        cls,
        folder: Path,
        store: Store,
        tokenizer: Path | None = None,
        device: str = "auto",
        dtype: str = "fp32",
    ) -> "Speaker":
        """Raises UserError: a folder that is damaged, no tokenizer, one of other ids, no such device."""
        weights = load(folder)
        chosen = tokenizer or tokenizer_of(folder, weights.recipe, store)
        if chosen is None:
            raise UserError(
                f"{folder} has no tokenizer, nor has {store.root / 'data' / weights.recipe.data.name}; "
                "name one with --tokenizer FILE"
            )
        words = Words(chosen, weights.recipe)
        model = built(weights, DTYPES[dtype], device_of(device))
        return cls(model, words, ends_of(folder, weights.source, words))

    def texts(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: Sampling,
        seed: int = 0,
        stop: bool = True,
    ) -> "Spoken":
        """Raises UserError for prompts that leave no room for `count` tokens."""
        ids = [self.words.ids(prompt) for prompt in prompts]
        ends = self.ends if stop else frozenset()
        steps = stream(self.model, ids, count, sampling, seed, ends)
        return Spoken(steps, [Pieces(self.words) for _ in prompts], count, ends)


def device_of(asked: str) -> str:
    """Raises UserError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu")
    return "cuda" if there and asked == "auto" else asked.replace("auto", "cpu")


class Spoken:
    """Texts as they come: (row, piece), and (row, None) when a row is over.

    said: what each row has said; tokens: how many that took.
    """

    def __init__(
        self,
        steps: Iterator[list[int | None]],
        pieces: list[Pieces],
        count: int,
        ends: frozenset[int],
    ):
        self.steps = steps
        self.pieces = pieces
        self.count = count
        self.ends = ends
        self.said = [""] * len(pieces)
        self.tokens = [0] * len(pieces)
        self.ended = [False] * len(pieces)  # by the end of its text
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[int, str | None]]:
        began = perf_counter()
        for tokens in self.steps:
            for row, token in enumerate(tokens):
                if token is not None:
                    yield from self._heard(row, token)
        self.seconds = perf_counter() - began

    def _heard(self, row: int, token: int) -> Iterator[tuple[int, str | None]]:
        self.tokens[row] += 1
        self.ended[row] = token in self.ends
        over = self.ended[row] or self.tokens[row] == self.count
        piece = "" if self.ended[row] else self.pieces[row](token)
        piece += self.pieces[row].rest() if over else ""
        self.said[row] += piece
        if piece:
            yield row, piece
        if over:
            yield row, None

    def told(self, prompts: Sequence[str]) -> dict[str, Any]:
        rows = zip(prompts, self.said, self.tokens, self.ended, strict=True)
        texts = [
            {"prompt": prompt, "text": text, "tokens": tokens, "ended": ended}
            for prompt, text, tokens, ended in rows
        ]
        return {"texts": texts, "tokens_per_second": self.rate}

    @property
    def rate(self) -> float:
        return sum(self.tokens) / max(self.seconds, 1e-9)

    def pace(self) -> str:
        total = sum(self.tokens)
        return f"{total} tokens in {self.seconds:.1f} s: {self.rate:,.1f} tokens/s"
