"""How likely a model finds the continuations of texts: what evaluations are built on.

One Protocol, two who satisfy it: a weights folder of ours, and any causal model that transformers loads.  Rows are
sorted by length and padded on the right, which no earlier token sees; the caller's order is given back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ablab.core.errors import UserError
from ablab.core.interop.folder import source_of
from ablab.core.interop.speaking import Speaker
from ablab.core.interop.text import begin_of
from ablab.core.model.objective import token_losses
from ablab.core.store.store import Store


@dataclass(frozen=True)
class Row:
    """Ids that are given, one at least, and those to score after them."""

    given: tuple[int, ...]
    scored: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.given) + len(self.scored)

    def read(self, context: int) -> tuple[int, ...]:
        """What a model reads of it: all but the last, and of a long one the last tokens."""
        return (*self.given, *self.scored)[:-1][-context:]


@dataclass(frozen=True)
class Score:
    """Of each scored token: its cross-entropy in nats, and whether it was the likeliest after the true ones before."""

    nats: tuple[float, ...]
    likeliest: tuple[bool, ...]

    @property
    def log_likelihood(self) -> float:
        return -sum(self.nats)

    @property
    def greedy(self) -> bool:
        """Whether the model would have written exactly this."""
        return all(self.likeliest)


class Scorer(Protocol):
    """context: tokens that a row may have; of a longer one the first are left out.

    first: the id that stands before a text which has nothing before it; None: there is none.
    lead: what the model's tokenizer itself puts before every text.
    """

    @property
    def context(self) -> int: ...

    @property
    def first(self) -> int | None: ...

    @property
    def lead(self) -> tuple[int, ...]: ...

    def ids(self, text: str) -> list[int]:
        """Of a text, without anything before or after it."""
        ...

    def scores(self, rows: Sequence[Row]) -> list[Score]:
        """In the order of the rows.  Raises UserError: nothing given, more to score than the context has."""
        ...


# tokens, int [B,T]; how many of each row are no pads; place of each logit that is wanted, (rows, columns) -> [N,V]
LogitsAt = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


class Batched:
    """Scores rows a batch at a time, those of like length together."""

    def __init__(self, logits_at: LogitsAt, context: int, device: torch.device, batch: int):
        self.logits_at = logits_at
        self.context = context
        self.device = device
        self.batch = batch

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row]) -> list[Score]:
        for row in rows:
            self._refuse(row)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        found: dict[int, Score] = {}
        for first in range(0, len(order), self.batch):
            places = order[first : first + self.batch]
            batch = Padded([rows[place] for place in places], self.context, self.device)
            found.update(zip(places, self._scored(batch), strict=True))
        return [found[place] for place in range(len(rows))]

    def _refuse(self, row: Row) -> None:
        if not row.given:
            raise UserError(
                "a row to score needs a token that is given; begin it with the end of text"
            )
        if len(row.scored) > self.context:
            raise UserError(
                f"{len(row.scored)} tokens to score exceed the model's context of {self.context}"
            )

    def _scored(self, batch: "Padded") -> Iterator[Score]:
        logits = self.logits_at(batch.tokens, batch.lengths, batch.places).float()
        nats = token_losses(logits, batch.targets).cpu()
        likeliest = (logits.argmax(-1) == batch.targets).cpu()
        first = 0
        for count in batch.counts:
            own = slice(first, first + count)
            yield Score(tuple(nats[own].tolist()), tuple(likeliest[own].tolist()))
            first += count


class Padded:
    """Rows side by side, padded on the right.

    tokens: what the model reads, int [B,T]; lengths: of each row; counts: scored tokens of each row.
    places: (row, column) where each scored token is predicted; targets: these tokens, int [N].
    """

    def __init__(self, rows: Sequence[Row], context: int, device: torch.device):
        read = [row.read(context) for row in rows]
        lengths = [len(ids) for ids in read]
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        numbers: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for number, (row, ids) in enumerate(zip(rows, read, strict=True)):
            tokens[number, : len(ids)] = torch.tensor(ids)
            numbers += [number] * len(row.scored)
            columns += range(len(ids) - len(row.scored), len(ids))
            targets += row.scored
        self.tokens = tokens.to(device)
        self.lengths = torch.tensor(lengths, device=device)
        self.counts = [len(row.scored) for row in rows]
        on_device = partial(torch.tensor, dtype=torch.long, device=device)
        self.places = (on_device(numbers), on_device(columns))
        self.targets = on_device(targets)


class AblabScorer(Batched):
    """A weights folder of ours."""

    def __init__(self, speaker: Speaker, batch: int = 16):
        model = speaker.model
        super().__init__(self._logits_at, model.context, model.embedding.table.device, batch)
        self.model = model
        self.words = speaker.words
        self.first = speaker.words.end

    @cached_property
    def lead(self) -> tuple[int, ...]:
        return before(self.words.tokenizer.encode("a").ids, self.ids("a"))

    @classmethod
    def of(
        cls,
        folder: Path,
        store: Store,
        device: str = "auto",
        dtype: str = "fp32",
        batch: int = 16,
    ) -> "AblabScorer":
        """Raises UserError as Speaker.of does."""
        scorer = cls(Speaker.of(folder, store, None, device, dtype), batch)
        scorer.first = begin_of(folder, source_of(folder), scorer.words)
        return scorer

    def ids(self, text: str) -> list[int]:
        return self.words.tokenizer.encode(text, add_special_tokens=False).ids

    def _logits_at(
        self, tokens: Tensor, lengths: Tensor, places: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Read out where it is asked for alone: the vocabulary is wide."""
        features = self.model.features(tokens)[places]
        return self.model.logits(features[None])[0]


def before(whole: list[int], bare: list[int]) -> tuple[int, ...]:
    """What a tokenizer put before a text by itself, as Llama's its BOS."""
    count = len(whole) - len(bare)
    return tuple(whole[:count]) if whole[count:] == bare else ()


class TransformersScorer(Batched):
    """Any causal model that transformers loads.

    model, tokenizer: as AutoModelForCausalLM and AutoTokenizer give them.  context: None: what its config says.
    """

    def __init__(self, model: Any, tokenizer: Any, context: int | None = None, batch: int = 16):
        most = context or getattr(model.config, "max_position_embeddings", None)
        if not most:
            raise UserError("its config says nothing of a context; name one")
        super().__init__(self._logits_at, most, model.device, batch)
        self.model = model.eval()
        self.tokenizer = tokenizer
        begin = tokenizer.bos_token_id
        self.first: int | None = tokenizer.eos_token_id if begin is None else begin

    @cached_property
    def lead(self) -> tuple[int, ...]:
        return before(self.tokenizer("a")["input_ids"], self.ids("a"))

    @classmethod
    def of(
        cls,
        name: str,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        batch: int = 16,
    ) -> "TransformersScorer":
        """name: a folder, or a model of the hub.  Raises UserError without transformers, and as it refuses."""
        from ablab.core.interop.speaking import device_of

        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UserError(
                "models of transformers need it installed: pip install 'ablab[hf]'"
            ) from None
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as flaw:
            raise UserError(f"transformers cannot load {name}: {flaw}") from None
        return cls(model.to(device_of(device)), tokenizer, None, batch)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _logits_at(
        self, tokens: Tensor, lengths: Tensor, places: tuple[Tensor, Tensor]
    ) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        there = (place < lengths[:, None]).long()
        return self.model(tokens, attention_mask=there, use_cache=False).logits[places]
