"""Cross-entropy in nats, and what a recipe adds to it in training.  fp32 throughout."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

# (what the trunk leaves [B,T,W], targets int [B,T]) -> numbers
Head = Callable[[Tensor, Tensor], Any]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token: logits [..., V], targets int [...] -> nats [...], fp32."""
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape)


def losses(
    features: Tensor,
    logits: Tensor,
    targets: Tensor,
    read: Callable[[Tensor], Tensor],
    more: Iterable[Any],
) -> tuple[Tensor, Tensor]:
    """(loss to descend, cross-entropy to report), sums over tokens in nats.

    features: normed [B,T,W]; read: features -> logits [B,T,V]; more: the stages of the slot `objective`.  The report
    never contains them: an arm with z-loss and one without are compared on the same number.
    """
    loss = reported = token_losses(logits, targets).sum()
    for stage in more:
        loss = loss + stage(features, logits, targets, read)
    return loss, reported.detach()


def heads_of(model: Any) -> tuple[Head, Head]:
    """What may follow the trunk: the objective, and the cross-entropy of each token, in nats [B,T] fp32."""
    if model.head_kernel:
        return model.head_kernel(model)
    return Descend(model), Measure(model)


class Descend:
    """What the trunk leaves [B,T,W], targets int [B,T] -> the loss to descend and the cross-entropy, sums in nats."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        features = model.norm(x)
        logits = model.logits(features)
        return losses(features, logits, targets, model.logits, model.objective.values())


class Measure:
    """What the trunk leaves [B,T,W], targets int [B,T] -> the cross-entropy of each token, nats [B,T]."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        return token_losses(self.model.logits(self.model.norm(x)), targets)


def of_rows(model: Any, head: Head) -> Callable[[Tensor], Any]:
    """Rows of tokens, int [B,T+1] -> the head of predicting each from those before it."""

    def predict(rows: Tensor) -> Any:
        inputs, targets = rows[:, :-1], rows[:, 1:]
        return head(model.trunk(inputs), targets)

    return predict
