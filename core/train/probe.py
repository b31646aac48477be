"""One look into the layers: rows of tokens go through the model as it is written, over the weights that are trained.

    kurtosis/I         mean over tokens of m4 / m2^2,  m_n = mean of x^n over the W channels of what enters layer I
    rms/I              mean over tokens of sqrt(m2)
    attention_logit/I  max of q_t k_s / sqrt(D) over s <= t, heads and rows, whatever a mask hides besides
    STAGE.NAME/I       a parameter of a stage: a number as it is, of a vector the mean, of a matrix the rms
    STAGE.OFFERED/I    what the stage computes with it, where it offers that: READINGS

I is a layer, from 0, or what stands beside the layers: `norm`, `end` (what the final norm reads), ...  A stream of
Gaussian channels has the kurtosis 3, one that lives in a single channel W: the moments are about zero, as in IMU-1's
released code (github.com/thepowerfuldeez/sample_efficient_gpt, transformer/transformer.py).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ablab.core.fusion.rewrite import Built
from ablab.core.language.declare import stages
from ablab.core.language.offers import HeadFactors, Mixed, Offer, QKGains
from ablab.core.model.layers import declaration
from ablab.core.model.objective import token_losses
from ablab.core.model.plan import plan_of
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.replay import finest

ENTERS_A_SLOT = "on_"  # begins the name of a slot that holds several stages
SMALL = ("vector", "gate")  # roles whose parameters are told one by one wherever they stand
Numbers = dict[str, Tensor]  # 0-D each
# What a stage offers, what it has bound, and its inputs -> quantity -> number.
Reading = Callable[..., Numbers]
# A module and the inputs of its call.
Hook = Callable[[nn.Module, tuple[Any, ...]], None]
MIX = "attention.mix"  # where queries meet keys


class Probe:
    """The trained model's twin: plain stages, hooks of its own, and not one tensor of its own.

    trained: is never touched; what was compiled or recorded of it does not know of the twin.
    """

    def __init__(self, trained: Transformer, recipe: Recipe):
        plan = plan_of(recipe)
        self.twin = Transformer(recipe, trained.dtype, plan=plan)
        _share(trained, self.twin)
        self.seen: Numbers = {}
        modules = dict(self.twin.named_modules())
        for path, stage in stages(plan):
            for hook in self._hooks_of(path, stage.offer):
                modules[path].register_forward_pre_hook(hook)
        for i, block in enumerate(self.twin.blocks):
            block.register_forward_pre_hook(StreamHook(self, f"{i:02}"))

    def _hooks_of(self, path: str, offer: Offer | None) -> Iterator[Hook]:
        place, name = place_of(path)
        if name == MIX:
            yield LogitHook(self, place)
        if offer and (reading := READINGS.get(type(offer))):
            yield StageHook(self, name, place, offer, reading)

    @torch.no_grad()
    def look(self, rows: Tensor, token_bytes: Tensor) -> dict[str, float]:
        """rows: int [B,T+1] on the device; token_bytes: of each token of the vocabulary, on the device."""
        self.seen = {}
        inputs, targets = rows[:, :-1], rows[:, 1:]
        x = self.twin.trunk(inputs)
        self.note_stream(x, "end")
        self._note_parameters()
        found = {f"layer/{name}": value for name, value in self.seen.items()}
        found |= self._readout(x, targets, token_bytes[targets])
        self.seen = {}
        values = torch.stack([value.to(finest(value.device)) for value in found.values()])
        return dict(zip(found, values.tolist(), strict=True))

    def _readout(self, x: Tensor, targets: Tensor, sizes: Tensor) -> Numbers:
        """Row by row: the logits of one are the largest tensor of a look."""
        highest = []
        nats = []
        for row, target in zip(self.twin.norm(x), targets, strict=True):
            logits = self.twin.logits(row[None])
            highest.append(logits.max().float())
            nats.append(token_losses(logits, target[None]).to(finest(x.device)))
        counted = torch.cat(nats) * (sizes > 0)
        bits = counted.sum() / math.log(2)
        return {
            "train/logit": torch.stack(highest).max(),
            "train/bits_per_byte": bits / sizes.sum(),
        }

    def note_stream(self, x: Tensor, place: str) -> None:
        """x: [B,T,W]."""
        squares = x.float().square()
        m2 = squares.mean(-1)
        m4 = squares.square().mean(-1)
        kurtosis = m4 / m2.square().clamp_min(1e-16)
        self.seen[f"kurtosis/{place}"] = kurtosis.mean()
        self.seen[f"rms/{place}"] = m2.sqrt().mean()

    def _note_parameters(self) -> None:
        for path, value in self.twin.named_parameters():
            in_a_slot = f".{ENTERS_A_SLOT}" in f".{path}"
            if in_a_slot or declaration(value).role in SMALL:
                place, name = place_of(path)
                self.seen[f"{name}/{place}"] = in_one_number(value)


def in_one_number(value: Tensor) -> Tensor:
    """A number as it is, the mean of a vector, the rms of a matrix: what starts at 0 there moves to both sides."""
    return value.mean() if value.dim() < 2 else value.square().mean().sqrt()


def place_of(path: str) -> tuple[str, str]:
    """blocks.3.attention.on_heads.gating.project.weight -> "03", "attention.gating.project.weight".

    What stands beside the layers is a place of its own: norm.gain -> "norm", "gain".
    """
    parts = [part for part in path.split(".") if not part.startswith(ENTERS_A_SLOT)]
    if parts[0] == "blocks":
        return f"{int(parts[1]):02}", ".".join(parts[2:])
    return parts[0], ".".join(parts[1:])


def _share(trained: nn.Module, twin: nn.Module) -> None:
    """Put the trained model's own parameters and tables in the place of the twin's."""
    theirs = dict(trained.named_modules())
    for path, module in twin.named_modules():
        owner = theirs[path]
        for name in module._parameters:
            module._parameters[name] = owner._parameters[name]
        for name in module._buffers:
            module._buffers[name] = owner._buffers[name]


# -- hooks of the twin -------------------------------------------------------------------------------------------------


class StreamHook:
    """Before a block: the stream that enters it."""

    def __init__(self, probe: Probe, place: str):
        self.probe = probe
        self.place = place

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.probe.note_stream(inputs[0], self.place)


class LogitHook:
    """Before queries meet keys: the largest of their products."""

    def __init__(self, probe: Probe, place: str):
        self.probe = probe
        self.place = place

    def __call__(self, mix: nn.Module, inputs: tuple[Any, ...]) -> None:
        queries, keys, *_ = inputs
        of_rows = [largest_score(q, k) for q, k in zip(queries, keys, strict=True)]
        highest = torch.stack(of_rows).max()
        self.probe.seen[f"attention_logit/{self.place}"] = highest


def largest_score(q: Tensor, k: Tensor) -> Tensor:
    """max of q_t k_s / sqrt(D) over s <= t.  q: [H,T,D]; k: [KV,T,D], each for H / KV queries."""
    heads, _, channels = q.shape
    shared_by = heads // len(k)
    keys = k.float().repeat_interleave(shared_by, 0)
    scores = q.float() @ keys.transpose(1, 2) / channels**0.5
    pairs = torch.ones_like(scores[0], dtype=torch.bool)
    later = pairs.triu(1)
    return scores.masked_fill(later, -torch.inf).max()


class StageHook:
    """Before a stage that offers something: what it computes with its parameters."""

    def __init__(self, probe: Probe, name: str, place: str, offer: Offer, reading: Reading):
        self.probe = probe
        self.name = name
        self.place = place
        self.offer = offer
        self.reading = reading

    def __call__(self, stage: nn.Module, inputs: tuple[Any, ...]) -> None:
        bound = Built(self.offer, stage).bound()
        for word, value in self.reading(self.offer, bound, *inputs).items():
            self.probe.seen[f"{self.name}.{word}/{self.place}"] = value


def _factors(offer: HeadFactors, bound: dict[str, Any], y: Tensor, x: Tensor) -> Numbers:
    """What heads are multiplied by, over tokens and heads."""
    factors = offer.strengths(x, **bound).float()
    return {"factor": factors.mean(), "factor_sd": factors.std(correction=0)}


def _weights(offer: Mixed, bound: dict[str, Any], v: Tensor, carry: Any) -> Numbers:
    """What a layer's own values and the first layer's are multiplied by."""
    own, first = offer.weights(**bound)
    return {"mixes_own": _number(own, v), "mixes_first": _number(first, v)}


def _gains(offer: QKGains, bound: dict[str, Any], q: Tensor, k: Tensor) -> Numbers:
    """What normed queries and keys are multiplied by, over channels."""
    q_gain, k_gain, _ = offer.gains(**bound)
    return {"q_gain": _number(q_gain, q), "k_gain": _number(k_gain, k)}


def _number(value: Tensor | float, beside: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=beside.device).mean()


READINGS: dict[type, Reading] = {HeadFactors: _factors, Mixed: _weights, QKGains: _gains}
