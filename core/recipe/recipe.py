"""The recipe: everything that decides what a run computes, and nothing about how it is run.

`run_id(recipe)` hashes the whole tree, so editing a default renames runs; that of a silent field is never edited.
Units stand in the names or docstrings; `Runtime` (core/runtime/runtime.py) holds device, kernels and cadence, which
are recorded, never hashed.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import msgspec

from ablab.core.errors import UserError
from ablab.core.language.numbers import Depth, Natural, Positive, SomeTokens, Whole
from ablab.core.language.part import SILENT, Part, silent
from ablab.core.parts import (
    block,
    feedforward,
    mixing,
    parametrize,
    position,
    schedule,
    shape,
    transforms,
)
from ablab.core.recipe.asks import (
    Advances,
    Builds,
    MayBuild,
    Moves,
    Multiplies,
    Parametrizes,
    ScalesGradients,
    Schedules,
    ShapesBatches,
)
from ablab.core.recipe.batches import Batches, batches_of
from ablab.core.recipe.slots import held
from ablab.core.recipe.stage import NOTHING, Handover

LONGEST_NAME = 200  # bytes of a token folder's name; beside it stands .NAME.partial, and a file's name has 255
SCHEMA = 2  # part of every identity: raise it when the meaning of a field changes


Role = Literal["embedding", "hidden", "readout", "vector", "gate"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Attention:
    """Self-attention.  Each key-value head serves `group` query heads."""

    head_dim: Whole = 64
    group: Whole = 1
    heads: Whole | None = silent(None)  # null: width / head_dim; Qwen3 has others
    position: Builds = field(default_factory=position.Rope)
    on_qk: tuple[MayBuild, ...] = ()  # before the position is applied
    on_values: tuple[MayBuild, ...] = ()
    mix: Builds = silent(factory=mixing.Causal)
    on_heads: tuple[MayBuild, ...] = ()  # before the output projection


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, pre-norm.  Widths in channels; the vocabulary comes with the data.

    Slots hold parts; core/recipe/slots.py says what the stage of each gets and returns.
    """

    width: Whole = 768
    layers: Depth = 8
    tied: bool = False  # one matrix for embedding and readout
    norm_eps: Positive = 1e-6
    on_embedding: tuple[MayBuild, ...] = ()  # after the table's rows, before the first block
    on_block: tuple[MayBuild, ...] = ()  # before each block
    block: Builds = silent(factory=block.Residual)  # how the two branches join
    on_norm: tuple[MayBuild, ...] = ()  # after both norms of every block, not the final one
    attention: Attention = field(default_factory=Attention)
    ffn: Builds = field(default_factory=feedforward.SwiGLU)
    on_features: tuple[MayBuild, ...] = ()  # after the last block, before the final norm
    on_logits: tuple[MayBuild, ...] = ()
    products: tuple[Multiplies, ...] = ()  # how linear maps multiply

    @property
    def heads(self) -> int:
        return self.attention.heads or self.width // self.attention.head_dim

    @property
    def kv_heads(self) -> int:
        return self.heads // self.attention.group


@dataclass(frozen=True)
class Chain:
    """How the parameters of one role move:  w <- w - lr * optim.lr * schedule * lr_scale * steps(gradient)."""

    steps: tuple[Moves, ...]
    lr: Positive = 1.0  # relative to optim.lr


def _adamw() -> dict[Role, Chain]:
    """AdamW; decoupled decay on hidden matrices alone, as in the IMU-1 recipe (wd 0.1 on 2-D hidden weights)."""
    adam = transforms.Adam()
    chains = {role: Chain((adam,)) for role in ROLES}
    chains["hidden"] = Chain((adam, transforms.Decay(0.1)))
    return chains


@dataclass(frozen=True)
class Optim:
    lr: Positive = 3e-3  # peak, per optimizer step
    clip: Positive | None = 1.0  # global gradient norm; null: no clipping
    on_gradient: tuple[ScalesGradients, ...] = ()  # factors on every gradient, after the clip
    chains: dict[Role, Chain] = field(default_factory=_adamw)


@dataclass(frozen=True)
class Data:
    """Which tokens, in which batches.  `digest` names the exact token files and tokenizer.

    `name` is a folder of tokens; with a mix it is a label, and the sources are folders beside it.
    """

    name: str
    digest: str | None = None  # null in a config: filled in from the token folder
    vocab: Whole = 32_000
    context: Whole = 384  # tokens a row
    batch: Whole = 192  # rows of a full optimizer step
    shape: ShapesBatches = silent(factory=shape.Fixed)  # how steps grow to the full one
    held_out: Whole = 1_000_000  # validation tokens, spread over the file; all of a shorter one
    mix: dict[str, Positive] = silent(factory=dict)  # token folder -> weight: tokens or shares
    epochs: Positive = silent(1.0)  # passes that a mix may take over any one of its sources
    replacement: bool = silent(False)  # true: each window begins at any token, drawn anew


@dataclass(frozen=True)
class Budget:
    tokens: SomeTokens = 100_000_000  # training tokens, rounded down to whole optimizer steps


@dataclass(frozen=True)
class Recipe:
    data: Data
    model: Model = field(default_factory=Model)
    parametrization: Parametrizes = field(default_factory=parametrize.Standard)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedules = field(default_factory=schedule.Cosine)
    objective: tuple[MayBuild, ...] = ()  # what is added to the cross-entropy in training
    after_step: tuple[Advances, ...] = ()
    budget: Budget = field(default_factory=Budget)
    seed: Natural = 0
    init: Handover | None = silent(None)  # what it goes on from; null: the weights of its seed

    @property
    def before(self) -> Handover:
        """What it goes on from, or nothing."""
        return self.init or NOTHING

    @property
    def tokens_per_step(self) -> int:
        """Of a full step; `data.shape` may make some smaller."""
        return self.data.batch * self.data.context

    @property
    def batches(self) -> Batches:
        """Which windows each step takes."""
        data = self.data
        return batches_of(data.shape, data.batch, data.context, self.budget.tokens)

    def tokens_after(self, step: int) -> int:
        """Training tokens that the first `step` optimizer steps take."""
        return self.batches.windows_before(step) * self.data.context

    @property
    def steps(self) -> int:
        return self.batches.steps


def check_folder_name(where: str, name: str) -> None:
    """Refuse a token folder's name that would leave STORE/data.  Raises UserError."""
    if not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"{where}{name!r:.80} must be a plain folder name: "
            f"printable, at most {LONGEST_NAME} bytes; try 'web'"
        )
    if not name or Path(name).name != name or name.startswith("."):
        plain = Path(name).stem.strip(".") or "web"
        raise UserError(
            f"{where}{name!r} must be a plain folder name, without '/' or a leading '.'; try {plain!r}"
        )


def check(recipe: Recipe) -> Recipe:
    """Refuse names, shapes and budgets that cannot be built; returns the recipe.  Raises UserError."""
    check_folder_name("data.name=", recipe.data.name)
    _check_mix(recipe.data)
    _check_slots(recipe)  # first: the others ask the parts
    _check_heads(recipe.model)
    _check_budget(recipe)
    _check_chains(recipe.optim)
    return recipe


def _check_mix(data: Data) -> None:
    for source, weight in data.mix.items():
        check_folder_name("data.mix: ", source)
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"data.mix.{source}={weight} must be a finite number > 0; drop the source instead"
            )
    if not data.mix and data.epochs != 1:
        raise UserError(
            f"data.epochs={data.epochs:g} limits a mix, and data.mix is empty; drop one, or name sources"
        )


def _check_heads(model: Model) -> None:
    attention = model.attention
    unit = attention.head_dim * attention.group
    if attention.heads and attention.heads % attention.group:
        low = max(attention.heads // attention.group, 1) * attention.group
        raise UserError(
            f"model.attention.heads={attention.heads} is no multiple of group={attention.group}; "
            f"nearest: {low}, {low + attention.group}"
        )
    if not attention.heads and model.width % unit:
        heads = model.width / attention.head_dim
        low = max(model.width // unit, 1) * unit
        raise UserError(
            f"model.width={model.width} is {heads:.1f} heads of {attention.head_dim}; "
            f"use a multiple of head_dim*group={unit}; nearest: {low}, {low + unit}"
        )
    if attention.head_dim % 2:
        raise UserError(
            f"model.attention.head_dim={attention.head_dim} must be even for rotary positions; "
            f"nearest: {attention.head_dim + 1}"
        )


def _check_budget(recipe: Recipe) -> None:
    if recipe.steps < 1:
        raise UserError(
            f"budget.tokens={recipe.budget.tokens} is less than one step of "
            f"batch*context={recipe.tokens_per_step} tokens; raise it"
        )
    warmup = getattr(recipe.schedule, "warmup_steps", 0) or 0  # null: none
    if warmup > recipe.steps:
        raise UserError(
            f"schedule.warmup_steps={warmup} exceeds the run's {recipe.steps} steps; "
            "lower it or raise budget.tokens"
        )


def _check_chains(optim: Optim) -> None:
    if missing := [role for role in ROLES if role not in optim.chains]:
        raise UserError(f"optim.chains has no chain for {missing[0]!r} parameters; add one")


def _check_slots(recipe: Recipe) -> None:
    for slot, path, parts in held(recipe):
        kinds = [part.kind for part in parts]
        twice = [kind for kind in kinds if kinds.count(kind) > 1]
        if slot.keeps_state and twice:
            raise UserError(
                f"{path} names {twice[0]!r} twice; its parts keep their state by kind: keep one"
            )
        for part in parts:
            if said := slot.refusal(path, part):
                raise UserError(said)


def plain(recipe: Any) -> Any:
    """The tree as dicts, lists, numbers and words: what recipe.yaml holds.  Refuses anything else."""
    _refuse_exotic(recipe, "recipe")
    return msgspec.to_builtins(recipe)


def _refuse_exotic(value: Any, path: str) -> None:
    kind = type(value)
    if kind in (str, int, bool, NoneType):
        return
    if kind is float and math.isfinite(value):
        return
    if dataclasses.is_dataclass(value):
        below = {f".{name}": getattr(value, name) for name in value.__dataclass_fields__}
    elif kind is dict:
        below = {f".{key}": item for key, item in value.items()}
    elif kind in (tuple, list):
        below = {f"[{i}]": item for i, item in enumerate(value)}
    else:
        raise UserError(
            f"{path}={value!r} is not plain data; use finite numbers, words, true/false or null"
        )
    for name, item in below.items():
        _refuse_exotic(item, path + name)


def _said(value: Any) -> Any:
    """The plain tree of what a recipe says: without empty lists, and without silent fields at their default."""
    if isinstance(value, tuple | list):
        return [_said(item) for item in value]
    if dataclasses.is_dataclass(value):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        for name, default in _silent_defaults(value.__class__).items():
            if fields[name] == default:
                del fields[name]
        value = fields
    if not isinstance(value, dict):
        return value
    below = {name: _said(item) for name, item in value.items()}
    return {name: item for name, item in below.items() if item != []}


@cache  # of the same few classes for each of 10,000 cells
def _silent_defaults(cls: Any) -> dict[str, Any]:
    """Name -> default of the silent fields of a dataclass."""
    return {
        one.name: _default(one) for one in dataclasses.fields(cls) if SILENT in one.metadata
    }


def _default(described: dataclasses.Field) -> Any:
    made_by = described.default_factory
    return described.default if made_by is dataclasses.MISSING else made_by()


def run_id(recipe: Recipe) -> str:
    """sha256 of the canonical full recipe and the schema number, 16 hex digits.

    Empty lists and silent fields at their default are left out, so that a new slot or field renames no run that was
    before it.  A part from a user's own file brings the digest of that file: an idea that was edited is another run.
    """
    identity = identity_of(recipe)
    plugins = identity.pop("plugins")
    canonical = msgspec.json.encode(identity, order="deterministic")
    for kind, digest in plugins.items():
        canonical += f"{kind} {digest}".encode()
    return hashlib.sha256(canonical).hexdigest()[:16]


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """All that `run_id` hashes: the schema, what the recipe says, and kind -> digest of the users' files it holds."""
    _refuse_exotic(recipe, "recipe")
    said = _said(recipe)
    canonical = msgspec.json.encode(said)
    plugins = {
        kind: digest
        for kind, digest in sorted(Part.foreign.items())
        if f'"kind":"{kind}"'.encode() in canonical
    }
    return {"schema": SCHEMA, "recipe": said, "plugins": plugins}


def structure(recipe: Recipe, runtime: Any) -> str:
    """Equal for recipes whose runs can share one Trainer: what the compiled graphs see, and nothing else."""
    same = dataclasses.replace(
        recipe,
        seed=0,
        budget=Budget(recipe.tokens_per_step),
        data=dataclasses.replace(
            recipe.data, name="", digest=None, held_out=1, mix={}, epochs=1.0
        ),
        optim=dataclasses.replace(recipe.optim, lr=1.0),
        schedule=schedule.Constant(),
        parametrization=parametrize.Standard(),
        after_step=(),
        init=None,
    )
    apart = dataclasses.replace(runtime, keep_weights=False, keep_state=False)
    return f"{run_id(same)} {recipe.parametrization.multipliers(recipe.model)} {apart}"
