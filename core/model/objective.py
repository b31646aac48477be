"""Cross-entropy in nats, bits per byte, and the penalties that a recipe adds.  fp32 throughout."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ablab.core.language.part import Part

Head = Callable[
    [Tensor, Tensor], Any
]  # (what the trunk leaves [B,T,W], targets int [B,T]) -> numbers


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token: logits [..., V], targets int [...] -> nats [...], fp32."""
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), reduction="none"
    ).view(targets.shape)


def objective_of(
    penalties: tuple[Part, ...],
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(logits, targets) -> (loss to descend, cross-entropy to report), sums over tokens in nats.

    The report never contains a penalty: an arm with z-loss and one without are compared on the same number.
    """

    def objective(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = total = token_losses(logits, targets).sum()
        for penalty in penalties:
            loss = loss + penalty.penalty(logits.float().logsumexp(-1)).sum()
        return loss, total.detach()

    return objective


def heads_of(model: Any, penalties: tuple[Part, ...]) -> tuple[Head, Head]:
    """What may follow the trunk: the objective, and the cross-entropy of each token, in nats [B,T] fp32."""
    objective = objective_of(penalties)

    def logits(x: Tensor) -> Tensor:
        return model.logits(model.norm(x))

    return lambda x, targets: objective(logits(x), targets), lambda x, targets: token_losses(
        logits(x), targets
    )


def of_rows(model: Any, head: Head) -> Callable[[Tensor], Any]:
    """Rows of tokens, int [B,T+1] -> the head of predicting each from those before it."""
    return lambda rows: head(model.trunk(rows[:, :-1]), rows[:, 1:])
