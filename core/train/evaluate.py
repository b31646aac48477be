"""Held-out loss: the same tokens for every run of a data set, spread over its whole validation file.

The rows are a function of the file's length, the context and data.held_out alone (core/data/tokens.py:spread_rows):
of W whole windows of `context` tokens, row i of n is window floor(i W / n), all of them where n = W.  The first n would
be the first documents: muon's effect doubled from the first 16,000 tokens of the shipped text to the next.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ablab.core.data.tokens import Tokens
from ablab.core.runtime.replay import finest


class Measured(NamedTuple):
    """scores: loss, in nats a token over all tokens, and bits_per_byte.  nats: of each token, float16 [rows,T]."""

    scores: dict[str, float]
    nats: Tensor


class Spans(NamedTuple):
    """What was measured of the held-out rows, span by span (Tokens.held_out_spans); zeros where nothing was."""

    nats: Tensor  # of each token, float16 [rows,T]
    sums: Tensor  # [spans,3], fp64 where the device has it: nats, nats of tokens that stand for bytes, bytes


def held_out_loss(
    nats_of: Callable[[Tensor], Tensor], tokens: Tokens, rows: int, device: torch.device
) -> Measured:
    """The losses of the held-out rows of `tokens`, on the device; of a mix also bits_per_byte/SOURCE.

    nats_of: tokens, int [rows,T+1] -> cross-entropy of each from those before it, [rows,T].
    """
    return scored(spans_measured(nats_of, tokens, rows, device), tokens, rows)


@torch.no_grad()
def spans_measured(
    nats_of: Callable[[Tensor], Tensor],
    tokens: Tokens,
    rows: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> Spans:
    """Of every span; of several ranks each measures its turns.

    Every batch has `rows` rows, the last one padded by repetition and cut after the forward: one compiled shape.
    """
    table = tokens.token_bytes.to(device)
    total = tokens.held_out_rows()
    spans = list(tokens.held_out_spans(rows))
    every = torch.zeros(total, tokens.context, dtype=torch.float16, device=device)
    sums = torch.zeros(len(spans), 3, dtype=finest(device), device=device)
    for number in range(rank, len(spans), ranks):
        _, first, count = spans[number]
        block = tokens.held_out_batch(first, count)
        block = block[torch.arange(rows) % count].to(device, non_blocking=device.type == "cuda")
        losses = nats_of(block)[:count].to(sums.dtype)
        weight = table[block[:count, 1:]]
        every[first : first + count] = losses
        nats, counted, size = sums[number].unbind()
        nats += losses.sum()
        counted += (losses * (weight > 0)).sum()
        size += weight.sum()
    return Spans(every, sums)


def scored(found: Spans, tokens: Tokens, rows: int) -> Measured:
    """rows: of a batch, as they were measured."""
    sums = found.sums.new_zeros(len(tokens.sources), 3)
    for (source, _, _), of_span in zip(tokens.held_out_spans(rows), found.sums, strict=True):
        sums[source] += of_span
    nats, counted, size = sums.sum(dim=0).tolist()
    scores = {
        "loss": nats / found.nats.numel(),
        "bits_per_byte": bits_per_byte(counted, size),
    }
    if len(tokens.sources) > 1:
        for own, (_, counted, size) in zip(tokens.sources, sums.tolist(), strict=True):
            scores[f"bits_per_byte/{own.name}"] = bits_per_byte(counted, size)
    return Measured(scores, found.nats)


def bits_per_byte(nats: float, size: float) -> float:
    return nats / (math.log(2) * size)
