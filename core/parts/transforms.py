"""Optimizer steps: each turns an update into the next one.  Pure tensor arithmetic, no torch import.

A step sees a *bank*: N equal parameters stacked, update and weight [N, *shape] in fp32.
    state(weight, bank) -> {name: tensor}
    update(update, weight, state, bank, now) -> update, new state
`bank` holds what is fixed (block rows, scales), `now` what moves, as 0-D tensors: a Python-float LR recompiled the
chain once per value (6 for 6), a 0-D tensor once.
"""

import math
from typing import Any, Literal, NamedTuple

from ablab.core.language.numbers import Memory, Natural, NonNegative, Positive, SomeSteps, Whole
from ablab.core.language.offers import AdamDirection, Decays, PolarFactor, RunningMean, offers
from ablab.core.language.part import Part, part, silent


class Now(NamedTuple):
    """Where the run stands, as 0-D fp32 tensors."""

    step: Any  # optimizer step, from 1
    progress: Any  # (step - 1) / steps: what lies before the step, as a fall counts (core/parts/schedule.py)
    multiplier: Any  # the schedule's value


class Transform(Part):
    """Base of optimizer steps.

    width_rule: how muP scales its learning rate (adam, spectral, rms); None: says nothing.
    recordable: `update` never waits for the device, as a CUDA graph demands.
    refresh_every: optimizer steps from one `refresh` to the next; 0: there is none.
    """

    @property
    def width_rule(self) -> str | None:
        return None

    @property
    def recordable(self) -> bool:
        return True

    @property
    def refresh_every(self) -> int:
        return 0

    def state(self, weight, bank) -> dict[str, Any]:
        return {}

    def update(self, update, weight, state, bank, now):
        raise NotImplementedError

    def refresh(self, state: dict[str, Any], bank: Any, t: int) -> None:
        """Periodic work on the host, on the bank's state, in place: after steps t = 1, 1 + refresh_every, ..."""
        raise NotImplementedError


def bias_correction(beta, steps):
    """1 - beta^steps: the share of a running mean that is of gradients and not of its first zero.  steps: 0-D, fp32.

    By expm1 of steps * log(beta), the logarithm in fp64: within 1e-7 of its value.  1 - beta**steps in fp32 is off by
    1.7e-4 for the first thousand steps of beta .9999, and by 5e-5 after twenty thousand.
    """
    return -(steps * log_of(beta)).expm1()


def log_of(beta: float) -> float:
    """-inf of 0: a mean that forgets at once has seen all."""
    return math.log(beta) if beta else -math.inf


@part("adam")
class Adam(Transform):
    """Bias-corrected Adam direction.  Kingma & Ba, arXiv:1412.6980.  eps 1e-10 keeps muP free of an eps rule."""

    beta1: Memory = 0.9
    beta2: Memory = 0.95
    eps: Positive = 1e-10

    width_rule = "adam"

    def state(self, weight, bank):
        return {
            "mean": weight.new_zeros(weight.shape),
            "square": weight.new_zeros(weight.shape),
        }

    @offers(lambda adam: AdamDirection(adam.beta1, adam.beta2, adam.eps))
    def update(self, update, weight, state, bank, now):
        mean = state["mean"].lerp(update, 1 - self.beta1)
        square = state["square"].lerp(update.square(), 1 - self.beta2)
        unbiased = (square / bias_correction(self.beta2, now.step)).sqrt() + self.eps
        direction = mean / unbiased / bias_correction(self.beta1, now.step)
        return direction, {"mean": mean, "square": square}


@part("lion")
class Lion(Transform):
    """Sign of an interpolated momentum.  Chen et al., arXiv:2302.06675."""

    beta1: Memory = 0.9
    beta2: Memory = 0.99

    width_rule = "adam"

    def state(self, weight, bank):
        return {"mean": weight.new_zeros(weight.shape)}

    def update(self, update, weight, state, bank, now):
        direction = state["mean"].lerp(update, 1 - self.beta1).sign()
        return direction, {"mean": state["mean"].lerp(update, 1 - self.beta2)}


@part("sgd")
class Sgd(Transform):
    """Heavy-ball sum M = beta M + G, as torch.optim.SGD."""

    momentum: Memory = 0.9

    def state(self, weight, bank):
        return {"sum": weight.new_zeros(weight.shape)}

    def update(self, update, weight, state, bank, now):
        total = state["sum"] * self.momentum + update
        return total, {"sum": total}


@part("momentum")
class Momentum(Transform):
    """Averaged momentum M = b M + (1-b) G; with Nesterov the update is (1-b) G + b M.

    b rises linearly from `warmup_from` to `momentum` over `warmup_steps` optimizer steps (1: no rise).
    A step counts as `per_step` of them, and `behind` are left out: where a trainer counts micro-batches, or from 0 and
    stops before the last, b ends at (warmup_steps - behind) / warmup_steps of its rise.
    """

    momentum: Memory = 0.95
    nesterov: bool = True
    warmup_from: Memory = 0.95
    warmup_steps: SomeSteps = 1
    per_step: Whole = silent(1)
    behind: Natural = silent(0)

    def state(self, weight, bank):
        return {"mean": weight.new_zeros(weight.shape)}

    def keep(self, now):
        counted = now.step * self.per_step - self.behind
        rise = (counted / self.warmup_steps).clamp(max=1 - self.behind / self.warmup_steps)
        return self.warmup_from + (self.momentum - self.warmup_from) * rise

    @offers(lambda momentum: RunningMean(momentum.keep, momentum.nesterov))
    def update(self, update, weight, state, bank, now):
        keep = self.keep(now)
        mean = state["mean"].lerp(update, 1 - keep)
        return mean.lerp(update, (1 - keep) * self.nesterov), {"mean": mean}


# (a, b, c) of x <- a x + b x^3 + c x^5 on singular values of G / (|G|_F * divisor), and the range that [0.01, 1]
# lands in.
COEFFICIENTS = {
    "kj5": (
        1.0,
        ((3.4445, -4.7750, 2.0315),) * 5,
    ),  # [0.68, 1.14]; Jordan, kellerjordan.github.io/posts/muon
    "polar5": (  # [0.86, 1.14]; Polar Express with a 2 % margin, arXiv:2505.16932
        1.02,
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
    ),
    "polar7": (  # [0.915, 1.084], already from 0.001; the first seven of Megatron's Polar Express list
        1.0,
        (
            (7.2086, -15.5131, 9.0178),
            (3.9623, -2.5813, 0.4542),
            (3.9466, -2.5765, 0.4544),
            (3.8991, -2.5671, 0.4566),
            (3.7186, -2.5308, 0.4653),
            (3.1390, -2.3073, 0.4733),
            (2.1715, -1.5246, 0.3885),
        ),
    ),
    "you5": (  # [0.98, 1.03]; You Jiacheng, as in Dion
        1.0,
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
}


def newton_schulz(matrices, coefficients: str, dtype):
    """An approximate polar factor U V^T of each matrix [..., r, c]; products in `dtype`, the norm in fp32."""
    divisor, triples = COEFFICIENTS[coefficients]
    norm = matrices.norm(dim=(-2, -1), keepdim=True)
    x = matrices / (norm * divisor + 1e-7)
    tall = x.shape[-2] > x.shape[-1]  # then the transpose has the smaller Gram matrix
    x = (x.mT if tall else x).to(dtype)
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def polar_factor(matrices):
    """The exact U V^T by SVD, for tests and small models."""
    from torch.linalg import svd

    u, _, vt = svd(matrices, full_matrices=False)
    return u @ vt


SCALES = {
    "spectral": lambda rows, columns: (rows / columns) ** 0.5,
    "keller": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "rms": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}


@part("orthogonalize")
class Orthogonalize(Transform):
    """Each matrix becomes its polar factor times a factor of its shape.  Fused matrices are taken apart first.

    scale: spectral sqrt(out/in), keller sqrt(max(1, out/in)), rms 0.2 sqrt(max(out, in)) (Moonlight, arXiv:2502.16982).
    split: joint (the fused matrix as one), blocks (q, k, v and gate, up apart), heads (blocks, and each head apart).
    """

    coefficients: Literal["kj5", "polar5", "polar7", "you5", "exact"] = "polar7"
    scale: Literal["spectral", "keller", "rms"] = "keller"
    split: Literal["joint", "blocks", "heads"] = "blocks"

    @property
    def width_rule(self) -> str:
        return "rms" if self.scale == "rms" else "spectral"

    @property
    def recordable(self) -> bool:
        # the SVD reads from the device whether it converged
        return self.coefficients != "exact"

    @offers(lambda polar: PolarFactor(polar.coefficients, polar.scale))
    def update(self, update, weight, state, bank, now):
        pieces = split_blocks(update, bank.blocks)
        moved = [self._flat(piece, bank) * self._factor(piece) for piece in pieces]
        return join_blocks(moved, update, bank.blocks), {}

    def _flat(self, matrices, bank):
        if self.coefficients == "exact":
            return polar_factor(matrices)
        return bank.newton_schulz(matrices, self.coefficients, bank.matmul)

    def _factor(self, matrices) -> float:
        rows, columns = matrices.shape[-2:]
        return SCALES[self.scale](rows, columns)


def split_blocks(matrix, blocks: tuple[int, ...]) -> list:
    """[N, rows, c] -> the fused matrices: one view [N * len(blocks), r, c] when all are equal, else one view each."""
    if not blocks:
        return [matrix]
    if len(set(blocks)) == 1:
        return [matrix.reshape(-1, blocks[0], matrix.shape[-1])]
    return list(matrix.split(blocks, dim=-2))


def join_blocks(pieces: list, like, blocks: tuple[int, ...]):
    """Undo `split_blocks`."""
    if len(pieces) == 1:
        return pieces[0].reshape(like.shape)
    from torch import cat  # `__import__("torch")` broke the compiled graph

    return cat(pieces, dim=-2)


RATES = {
    "constant": lambda now: 1.0,
    # To one step above zero.  nanochat until 6ed7d1d (9 March 2026), whose decay falls by half a cosine since.
    "linear": lambda now: 1 - now.progress,
    "lr": lambda now: now.multiplier,  # decay falls with lr squared, as modded-nanogpt
}


@part("decay")
class Decay(Transform):
    """Decoupled weight decay: w loses lr * rate * w.  Loshchilov & Hutter, arXiv:1711.05101."""

    rate: NonNegative = 0.1
    schedule: Literal["constant", "linear", "lr"] = "constant"

    def strength(self, bank, now):
        return RATES[self.schedule](now) * (self.rate * bank.decay)

    @offers(lambda decay: Decays("plain", decay.strength))
    def update(self, update, weight, state, bank, now):
        return update + self.strength(bank, now) * weight, {}
