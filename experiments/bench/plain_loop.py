"""A plain PyTorch training loop of the tiny model, written without any part of ablab: what a step may cost at least.

The shapes are those of configs/size/tiny.yaml; AdamW, global clipping and a cosine as in configs/base.yaml.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, LAYERS, HEADS, HIDDEN, VOCAB, CONTEXT, BATCH = 64, 4, 4, 192, 4096, 64, 8
LR, WARMUP, DECAY, CLIP, LOG_EVERY = 7e-3, 20, 0.1, 1.0, 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.gate_up, self.down = (
            nn.Linear(WIDTH, 2 * HIDDEN, bias=False),
            nn.Linear(HIDDEN, WIDTH, bias=False),
        )

    def forward(self, x, cos, sin):
        q, k, v = (
            self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).transpose(1, 3).unbind(2)
        )
        y = F.scaled_dot_product_attention(
            turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Model(nn.Module):
    def __init__(self, vocab: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.readout = (
            nn.RMSNorm(WIDTH, eps=1e-6),
            nn.Linear(WIDTH, vocab, bias=False),
        )
        half = WIDTH // HEADS // 2
        angles = torch.arange(CONTEXT)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.readout(self.norm(x))


class PlainLoop:
    """`step()` is one optimizer step on the next rows of a token folder; `window`: mean loss of the steps between two logs."""

    def __init__(self, folder: Path, steps: int, vocab: int = VOCAB):
        torch.manual_seed(0)
        self.model, self.steps, self.t, self.window, self.total = (
            Model(vocab),
            steps,
            0,
            0.0,
            torch.zeros(()),
        )
        matrices = [
            value for name, value in self.model.blocks.named_parameters() if value.ndim == 2
        ]
        held = {id(value) for value in matrices}
        others = [value for value in self.model.parameters() if id(value) not in held]
        groups = [
            {"params": matrices, "weight_decay": DECAY},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-10)
        self.tokens = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
        self.order = np.random.default_rng(0).permutation(len(self.tokens) // CONTEXT - 1)

    def parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())

    def step(self) -> None:
        rows = (
            self.order[np.arange(self.t * BATCH, (self.t + 1) * BATCH) % len(self.order)]
            * CONTEXT
        )
        block = torch.from_numpy(
            np.stack([self.tokens[row : row + CONTEXT + 1] for row in rows]).astype(np.int64)
        )
        loss = F.cross_entropy(self.model(block[:, :-1]).flatten(0, 1), block[:, 1:].flatten())
        loss.backward()
        self.total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.t += 1
        done = max(self.t - WARMUP, 0) / max(self.steps - WARMUP, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                LR * min(self.t / WARMUP, 1) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.t % LOG_EVERY == 0:
            self.window = self.total.item() / LOG_EVERY
            self.total.zero_()
