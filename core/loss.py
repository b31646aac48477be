"""Cross-entropy in nats, bits per byte, and the penalties that a recipe adds.  fp32 throughout."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ablab.core.part import Part


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token: logits [..., V], targets int [...] -> nats [...], fp32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def objective_of(penalties: tuple[Part, ...]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(logits, targets) -> (loss to descend, cross-entropy to report), sums over tokens in nats.

    The report never contains a penalty: an arm with z-loss and one without are compared on the same number.
    """

    def objective(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = total = token_losses(logits, targets).sum()
        for penalty in penalties:
            loss = loss + penalty.penalty(logits.float().logsumexp(-1)).sum()
        return loss, total.detach()

    return objective


def loss_of(model: Callable[[Tensor], Tensor], penalties: tuple[Part, ...]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Rows of tokens, int [B,T+1] -> the objective of predicting each from those before it."""
    objective = objective_of(penalties)
    return lambda block: objective(model(block[:, :-1]), block[:, 1:])
