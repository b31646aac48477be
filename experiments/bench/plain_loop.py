"""A plain PyTorch training loop of the tiny model, written without any part of ablab: what a step may cost at least.

The shapes are those of configs/size/tiny.yaml; AdamW, global clipping and a cosine as in configs/base.yaml.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LAYERS, HEADS, HIDDEN = 64, 4, 4, 192
VOCAB, CONTEXT, BATCH = 4096, 64, 8
LR, WARMUP, FLOOR = 7e-3, 20, 0.1  # peak; steps; share of the peak at the end
DECAY, CLIP, LOG_EVERY = 0.1, 1.0, 10


def norm() -> nn.RMSNorm:
    return nn.RMSNorm(WIDTH, eps=1e-6)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = norm()
        self.norm2 = norm()
        self.qkv = linear(WIDTH, 3 * WIDTH)
        self.out = linear(WIDTH, WIDTH)
        self.gate_up = linear(WIDTH, 2 * HIDDEN)
        self.down = linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B,T,W]; cos, sin: [T,D/2]."""
        qkv = self.qkv(self.norm1(x))
        qkv = qkv.unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        q = turn(q, cos, sin)
        k = turn(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    left = a * cos - b * sin
    right = b * cos + a * sin
    return torch.cat((left, right), -1)


class Model(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = norm()
        self.readout = linear(WIDTH, vocab)
        half = WIDTH // HEADS // 2
        speeds = 10_000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(CONTEXT)[:, None] * speeds
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.readout(self.norm(x))


class PlainLoop:
    """`step()` is one optimizer step on the next rows of a token folder.

    window: mean loss of the steps between two logs.
    """

    def __init__(self, folder: Path, steps: int, vocab: int = VOCAB) -> None:
        torch.manual_seed(0)
        self.model = Model(vocab)
        self.optimizer = adamw(self.model)
        self.tokens = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
        whole_rows = len(self.tokens) // CONTEXT - 1
        self.order = np.random.default_rng(0).permutation(whole_rows)
        self.steps = steps
        self.t = 0
        self.window = 0.0
        self.total = torch.zeros(())

    def parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())

    def step(self) -> None:
        block = self.rows()
        logits = self.model(block[:, :-1])
        targets = block[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        self.total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.t += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.t % LOG_EVERY == 0:
            self.window = self.total.item() / LOG_EVERY
            self.total.zero_()

    def rows(self) -> Tensor:
        """The next int64 [BATCH, CONTEXT + 1]."""
        numbers = self.t * BATCH + np.arange(BATCH)
        starts = self.order[numbers % len(self.order)] * CONTEXT
        rows = [self.tokens[start : start + CONTEXT + 1] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def lr(self) -> float:
        """Linear warm-up, then a cosine from the peak to FLOOR of it."""
        warm = min(self.t / WARMUP, 1)
        done = max(self.t - 1 - WARMUP, 0) / max(self.steps - WARMUP, 1)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return LR * warm * (FLOOR + (1 - FLOOR) * cosine)


def adamw(model: Model) -> torch.optim.AdamW:
    """Decay on the matrices of the blocks alone."""
    matrices = [value for value in model.blocks.parameters() if value.ndim == 2]
    held = {id(value) for value in matrices}
    others = [value for value in model.parameters() if id(value) not in held]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-10)
