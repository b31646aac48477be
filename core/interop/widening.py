"""A Llama-shaped model made wider: its matrices stand in the corner of larger ones, or its units are repeated.

    mode           new regions              gains of the norms          the function
    preserve       zero                     times sqrt(old / new)       stays
    preserve-norm  initial values, scaled   times sqrt(old / new)       stays as far as these are small
    noise          initial values, scaled   as they are                 is another one

Zeros in the new channels lower the mean square that a norm divides by, by old / new: hence the factor on its gain, and
the same on its eps.  Fused matrices (q, k, v; gate, up) are widened apart.

Units may be repeated instead (Net2Wider, Chen et al., arXiv:1511.05641): a unit that stands n times is read n times, so
the columns that read it are divided by n; noise on these that sums to zero over the n tells the copies apart.

Source of the modes: github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, scripts/hf/convert_smollm2_to_imu.py,
which leaves eps as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ablab.core.errors import UserError
from ablab.core.interop.foreign import feed_forward
from ablab.core.interop.weights import Tensors, built_of
from ablab.core.language.declare import Param, params
from ablab.core.model.init import generator, initialise
from ablab.core.model.plan import plan_of
from ablab.core.model.transformer import Transformer
from ablab.core.parts.feedforward import SwiGLU, hidden_width
from ablab.core.recipe.intervention import resolve, treatment_of
from ablab.core.recipe.recipe import Recipe, check

Mode = Literal["preserve", "preserve-norm", "noise"]
Expand = Literal["copy", "net2wider"]


@dataclass(frozen=True)
class Widening:
    """What is asked for.  width, heads, kv_heads, hidden: of the new model; None: see `sizes`."""

    width: int
    heads: int | None = None
    kv_heads: int | None = None
    hidden: int | None = None
    mode: Mode = "preserve-norm"
    heads_by: Expand = "copy"
    hidden_by: Expand = "copy"
    noise: float = (
        0.0  # on repeated units' readers, in standard deviations of a reader's column
    )
    initial: float = 1.0  # factor on the initial values of new regions
    tied: bool | None = None  # None: as it was
    seed: int = 0


@dataclass(frozen=True)
class Sizes:
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Sizes":
        model = recipe.model
        ffn = model.ffn
        if not isinstance(ffn, SwiGLU):
            raise UserError(f"only a model with swiglu can be widened, not with {ffn.kind}")
        return cls(
            width=model.width,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.attention.head_dim,
            hidden=hidden_width(model.width, ffn.expansion, ffn.multiple),
        )


@dataclass(frozen=True)
class Axis:
    """Units of the new model: which unit of the old one stands there, -1 for none; and how often it stands."""

    old: Tensor  # int [new]
    copies: Tensor  # [new]

    @property
    def known(self) -> Tensor:
        """The new units at which an old one stands."""
        return (self.old >= 0).nonzero().squeeze(1)

    @property
    def before(self) -> int:
        """How many old units there are."""
        return int(self.old.max()) + 1


def sizes(old: Sizes, asked: Widening) -> Sizes:
    """Of the new model.  Heads stay as many, and each key-value head serves as many, where nothing else is said.

    The feed-forward grows with the width.  Raises UserError for what cannot be widened so.
    """
    heads = asked.heads or old.heads
    group = old.heads // old.kv_heads
    kv_heads = asked.kv_heads or max(heads // group, 1)
    hidden = asked.hidden or round(old.hidden * asked.width / old.width)
    new = Sizes(asked.width, heads, kv_heads, old.head_dim, hidden)
    for name in ("width", "heads", "kv_heads", "hidden"):
        before, after = getattr(old, name), getattr(new, name)
        if after < before:
            raise UserError(
                f"{name}={after} is less than the {before} it has; a model only grows"
            )
    if heads % kv_heads:
        raise UserError(f"heads={heads} is no multiple of kv_heads={kv_heads}")
    _refuse_regrouping(old, new, asked)
    return new


def _refuse_regrouping(old: Sizes, new: Sizes, asked: Widening) -> None:
    grouped = old.heads // old.kv_heads
    if asked.heads_by == "net2wider" and new.heads % old.heads:
        raise UserError(
            f"net2wider repeats all heads: heads={new.heads} is no multiple of {old.heads}"
        )
    if new.heads // new.kv_heads == grouped:
        return
    if asked.mode == "preserve" or asked.heads_by == "net2wider":
        raise UserError(
            f"heads={new.heads} on kv_heads={new.kv_heads} would give old heads other keys; "
            f"keep {grouped} heads a key-value head, as kv_heads={new.heads // grouped}"
        )


def widened_recipe(
    recipe: Recipe, asked: Widening, treatment: list[str | Mapping[str, Any]]
) -> Recipe:
    """The recipe of the wider model, with interventions applied to it."""
    old = Sizes.of(recipe)
    new = sizes(old, asked)
    model = recipe.model
    attention = replace(
        model.attention,
        group=new.heads // new.kv_heads,
        heads=None if new.heads * new.head_dim == new.width else new.heads,
    )
    same_norm = asked.mode != "noise"
    wider = replace(
        model,
        width=new.width,
        tied=model.tied if asked.tied is None else asked.tied,
        norm_eps=model.norm_eps * (old.width / new.width if same_norm else 1.0),
        attention=attention,
        ffn=feed_forward(new.width, new.hidden),
    )
    if wider.tied and not model.tied:
        raise UserError("its head is a matrix of its own, and cannot be tied to the embedding")
    base = replace(recipe, model=wider, seed=asked.seed)
    return resolve(check(base), treatment_of(treatment))


@torch.no_grad()
def widened(tensors: Tensors, old: Recipe, new: Recipe, asked: Widening) -> Tensors:
    """The tensors of `new`, from `widened_recipe`, out of those of `old`.  What only `new` has starts as always."""
    model = Transformer(new)
    initialise(model, new)
    axes = Axes(Sizes.of(old), Sizes.of(new), asked)
    made: Tensors = {}
    for name, declared in params(plan_of(new)):
        start = model.get_parameter(name)
        source = "embedding.table" if name not in tensors and name == "readout.weight" else name
        if source not in tensors:
            made[name] = start.detach().clone()
            continue
        blank = start * (0.0 if asked.mode == "preserve" else asked.initial)
        made[name] = axes.widened(name, tensors[source].float(), blank, declared)
    return made


class Axes:
    """Which unit stands where, along each kind of dimension."""

    def __init__(self, old: Sizes, new: Sizes, asked: Widening):
        self.asked = asked
        self.width = corner(old.width, new.width)
        repeat_heads = asked.heads_by == "net2wider"
        repeat_hidden = asked.hidden_by == "net2wider"
        heads = tiled if repeat_heads else corner
        self.q = channels(heads(old.heads, new.heads), old.head_dim)
        self.kv = channels(heads(old.kv_heads, new.kv_heads), old.head_dim)
        spread = repeated if repeat_hidden else corner
        self.hidden = spread(old.hidden, new.hidden)
        same_norm = asked.mode != "noise"
        self.gain = (old.width / new.width) ** 0.5 if same_norm else 1.0

    def widened(self, name: str, old: Tensor, blank: Tensor, declared: Param) -> Tensor:
        """old: of the narrow model; blank: what stands in the new regions."""
        if name.endswith("norm.gain"):
            filled = blank.clone()
            filled[: len(old)] = old
            return filled * self.gain
        if declared.role == "vector":
            return old.clone()
        rows, columns = self._of(name, declared)
        before = old.split([axis.before for axis in rows])
        start = blank.split([len(axis.old) for axis in rows])
        pieces = []
        for axis, piece, empty in zip(rows, before, start, strict=True):
            read = self._read(name, piece, columns)
            filled = empty.clone()
            filled[axis.known[:, None], columns.known] = read[axis.old[axis.known]]
            pieces.append(filled)
        return torch.cat(pieces)

    def _of(self, name: str, declared: Param) -> tuple[list[Axis], Axis]:
        """Axes of the fused matrices' rows, and of the columns."""
        if name.endswith("attention.qkv.weight"):
            return [self.q, self.kv, self.kv], self.width
        if name.endswith("attention.out.weight"):
            return [self.width], self.q
        if name.endswith("gate_up.weight"):
            return [self.hidden, self.hidden], self.width
        if name.endswith("down.weight"):
            return [self.width], self.hidden
        ids = declared.shape[0]  # of the table and the readout
        return [corner(ids, ids)], self.width

    def _read(self, name: str, old: Tensor, columns: Axis) -> Tensor:
        """The old matrix, its columns where they stand now: shared out between the copies of what they read."""
        known = columns.known
        shared = old[:, columns.old[known]] / columns.copies[known]
        return shared + self._told_apart(name, old, columns)

    def _told_apart(self, name: str, old: Tensor, columns: Axis) -> Tensor | float:
        """Noise on the readers of repeated units, which sums to zero over the copies of each."""
        copies = columns.copies[columns.known]
        if not self.asked.noise or copies.max() == 1:
            return 0.0
        source = columns.old[columns.known]
        draw = generator(self.asked.seed, f"{name}/copies")
        spread = old.std(0, unbiased=False)[source] / copies
        drawn = torch.randn((len(old), len(source)), generator=draw)
        drawn *= self.asked.noise * spread
        sums = torch.zeros_like(old).index_add_(1, source, drawn)
        return drawn - sums[:, source] / copies


def corner(old: int, new: int) -> Axis:
    """The first ones are the old ones."""
    units = torch.arange(new)
    return Axis(torch.where(units < old, units, -1), torch.ones(new))


def tiled(old: int, new: int) -> Axis:
    """All old ones again and again, in their order: as heads, whose groups stay together."""
    return _counted(torch.arange(new) % old, old)


def repeated(old: int, new: int) -> Axis:
    """Each old one so many times in a row, the first ones once more where it does not come out even."""
    counts = torch.full((old,), new // old)
    counts[: new % old] += 1
    return _counted(torch.arange(old).repeat_interleave(counts), old)


def _counted(units: Tensor, old: int) -> Axis:
    return Axis(units, units.bincount(minlength=old)[units].float())


def channels(heads: Axis, head_dim: int) -> Axis:
    """The axis of the channels of an axis of heads."""
    channel = torch.arange(head_dim)
    inside = heads.old[:, None] * head_dim + channel
    old = torch.where(heads.old[:, None] < 0, -1, inside)
    return Axis(old.flatten(), heads.copies.repeat_interleave(head_dim))


@torch.no_grad()
def apart(old: Recipe, before: Tensors, new: Recipe, after: Tensors, tokens: int = 64) -> float:
    """The largest difference of the two models' logits over their scale, on a row of random tokens."""
    length = min(tokens, old.data.context)
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(old.data.vocab, (1, length), generator=draw)
    theirs = built_of(old, before)(row)
    ours = built_of(new, after)(row)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
