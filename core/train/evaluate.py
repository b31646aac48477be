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


class Measured(NamedTuple):
    """scores: loss, in nats a token over all tokens, and bits_per_byte.  nats: of each token, float16 [rows,T]."""

    scores: dict[str, float]
    nats: Tensor


@torch.no_grad()
def held_out_loss(
    nats_of: Callable[[Tensor], Tensor], tokens: Tokens, rows: int, device: torch.device
) -> Measured:
    """The losses of the held-out rows of `tokens`, on the device.

    nats_of: tokens, int [rows,T+1] -> cross-entropy of each from those before it, [rows,T].
    Every batch has `rows` rows, the last one padded by repetition and cut after the forward: one compiled shape.
    """
    table = tokens.token_bytes.to(device)
    total = tokens.held_out_rows()
    every = torch.empty(total, tokens.context, dtype=torch.float16, device=device)
    nats, counted, size = torch.zeros(3, dtype=torch.float64, device=device).unbind()
    for first in range(0, total, rows):
        count = min(rows, total - first)
        block = tokens.held_out_batch(first, count)
        block = block[torch.arange(rows) % count].to(device, non_blocking=True)
        losses = nats_of(block)[:count].double()
        weight = table[block[:count, 1:]]
        every[first : first + count] = losses
        nats += losses.sum()
        counted += (losses * (weight > 0)).sum()
        size += weight.sum()
    scores = {
        "loss": nats.item() / (total * tokens.context),
        "bits_per_byte": counted.item() / (math.log(2) * size.item()),
    }
    return Measured(scores, every)
