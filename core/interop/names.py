"""What the other side calls each parameter: one table a layout, read both ways.  No torch here.

Where they keep apart what is one matrix here (q, k, v; gate, up), a row names the parts in their order.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.language.declare import Param, params
from ablab.core.model.plan import plan_of
from ablab.core.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """rows: our name -> theirs; N stands for the block, counted from 0.

    unread: a pattern of names that hold nothing to learn (tables, a copy of the tied head).
    as_here: whether all others are called as here.
    """

    name: str
    rows: Mapping[str, tuple[str, ...]]
    unread: str = r"(?!)"
    as_here: bool = False

    def theirs(self, ours: str) -> tuple[str, ...]:
        """Their name of a parameter of ours, or those of its parts.  Raises UserError where they have none."""
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.N.", ours)
        if pattern not in self.rows and self.as_here:
            return (ours,)
        if pattern not in self.rows:
            raise UserError(f"{self.name} has no place for {ours}")
        number = ours.split(".")[1] if pattern != ours else ""
        return tuple(name.replace("N", number, 1) for name in self.rows[pattern])


OWN = Layout(
    "ablab",
    {
        "embedding.table": ("embed_tokens.weight",),
        "readout.weight": ("lm_head.weight",),
    },
    unread=r"(.*\.)?tables\..*",
    as_here=True,
)
_LLAMA = {
    "embedding.table": ("model.embed_tokens.weight",),
    "norm.gain": ("model.norm.weight",),
    "readout.weight": ("lm_head.weight",),
    "blocks.N.attention.norm.gain": ("model.layers.N.input_layernorm.weight",),
    "blocks.N.attention.qkv.weight": (
        "model.layers.N.self_attn.q_proj.weight",
        "model.layers.N.self_attn.k_proj.weight",
        "model.layers.N.self_attn.v_proj.weight",
    ),
    "blocks.N.attention.out.weight": ("model.layers.N.self_attn.o_proj.weight",),
    "blocks.N.ffn.norm.gain": ("model.layers.N.post_attention_layernorm.weight",),
    "blocks.N.ffn.inner.gate_up.weight": (
        "model.layers.N.mlp.gate_proj.weight",
        "model.layers.N.mlp.up_proj.weight",
    ),
    "blocks.N.ffn.inner.down.weight": ("model.layers.N.mlp.down_proj.weight",),
}
_TABLES = r".*\.rotary_emb\.\w+|.*\.position_scale"
LLAMA = Layout("Llama", _LLAMA, unread=_TABLES)
QWEN3 = Layout(
    "Qwen3",
    {
        **_LLAMA,
        "blocks.N.attention.on_qk.qk_norm.q_gain": ("model.layers.N.self_attn.q_norm.weight",),
        "blocks.N.attention.on_qk.qk_norm.k_gain": ("model.layers.N.self_attn.k_norm.weight",),
    },
    unread=_TABLES,
)
# Both from github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, scripts/hf/convert_imu1_checkpoint.py.
IMU1 = Layout(
    "IMU-1",
    {
        "embedding.table": ("model.embed_tokens.weight",),
        "norm.gain": ("model.norm.weight",),
        "readout.weight": ("lm_head.weight",),
        "blocks.N.attention.norm.gain": ("model.layers.N.input_layernorm.weight",),
        "blocks.N.attention.qkv.weight": ("model.layers.N.self_attn.qkv_proj.weight",),
        "blocks.N.attention.out.weight": ("model.layers.N.self_attn.o_proj.weight",),
        "blocks.N.attention.on_qk.qk_norm.q_gain": ("model.layers.N.self_attn.qk_norm.gain",),
        "blocks.N.attention.on_values.value_residual.own": ("model.layers.N.self_attn.alpha1",),
        "blocks.N.attention.on_values.value_residual.first": (
            "model.layers.N.self_attn.alpha2",
        ),
        "blocks.N.attention.on_values.value_residual.scale": (
            "model.layers.N.self_attn.value_scale",
        ),
        "blocks.N.attention.on_heads.gating.project.weight": (
            "model.layers.N.self_attn.attn_gate.weight",
        ),
        "blocks.N.ffn.norm.gain": ("model.layers.N.post_attention_layernorm.weight",),
        "blocks.N.ffn.inner.gate_up.weight": ("model.layers.N.mlp.up_proj.weight",),
        "blocks.N.ffn.inner.down.weight": ("model.layers.N.mlp.down_proj.weight",),
    },
    unread=_TABLES,
)
IMU1_CHECKPOINT = Layout(
    "the IMU-1 checkpoint",
    {
        "embedding.table": ("embedding.weight",),
        "norm.gain": ("final_norm.gain",),
        "readout.weight": ("lm_head.linear.weight",),
        "blocks.N.attention.norm.gain": ("blocks.N.ln1.gain",),
        "blocks.N.attention.qkv.weight": ("blocks.N.attn.qkv.linear.weight",),
        "blocks.N.attention.out.weight": ("blocks.N.attn.out.linear.weight",),
        "blocks.N.attention.on_qk.qk_norm.q_gain": ("blocks.N.attn.sdpa_qknorm.gain",),
        "blocks.N.attention.on_values.value_residual.own": ("blocks.N.attn.alpha1",),
        "blocks.N.attention.on_values.value_residual.first": ("blocks.N.attn.alpha2",),
        "blocks.N.attention.on_values.value_residual.scale": ("blocks.N.attn.scale",),
        "blocks.N.attention.on_heads.gating.project.weight": (
            "blocks.N.attn.attn_gate.linear.weight",
        ),
        "blocks.N.ffn.norm.gain": ("blocks.N.ln2.gain",),
        "blocks.N.ffn.inner.gate_up.weight": ("blocks.N.ffn.up.linear.weight",),
        "blocks.N.ffn.inner.down.weight": ("blocks.N.ffn.down.linear.weight",),
    },
    # the table's copy that its weight_tying leaves beside the head that is read
    unread=r"lm_head\.weight|.*\.position_scale|.*\.rope\.\w+",
)


def parts_of(recipe: Recipe, layout: Layout) -> Iterator[tuple[str, Param, list["Part"]]]:
    """Each parameter of the recipe's plan: its name, what it was declared as, and what it is made of over there."""
    for ours, declared in params(plan_of(recipe)):
        theirs = layout.theirs(ours)
        rows = declared.blocks if len(theirs) > 1 else declared.shape[:1]
        below = declared.shape[1:]
        pairs = zip(theirs, rows, strict=True)
        yield ours, declared, [Part(name, (count, *below)) for name, count in pairs]


@dataclass(frozen=True)
class Part:
    """A tensor over there, or what shape it must have."""

    name: str
    shape: tuple[int, ...]


def taken(
    where: str, tensors: Mapping[str, "Tensor"], recipe: Recipe, layout: Layout
) -> dict[str, "Tensor"]:
    """Their tensors under our names, in their dtype.

    Raises UserError for one that is missing, of another shape, or has no place here: nothing is dropped in silence.
    """
    from torch import cat

    ours: dict[str, Tensor] = {}
    used = set()
    for name, declared, parts in parts_of(recipe, layout):
        pieces = [_piece(where, tensors, part) for part in parts]
        used |= {part.name for part in parts}
        whole = cat(pieces) if len(pieces) > 1 else pieces[0]
        ours[name] = whole.reshape(declared.shape)
    unread = re.compile(layout.unread)
    left = sorted(name for name in tensors if name not in used and not unread.fullmatch(name))
    if recipe.model.tied:
        left = _without_tied_head(where, tensors, left, layout)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(f"{where} holds {left[0]}{more}, for which this model has no place")
    return ours


def _piece(where: str, tensors: Mapping[str, "Tensor"], part: Part) -> "Tensor":
    if part.name not in tensors:
        raise UserError(f"{where} lacks {part.name}, of shape {list(part.shape)}")
    tensor = tensors[part.name]
    if tuple(tensor.shape) != part.shape:
        raise UserError(
            f"{where}: {part.name} has shape {list(tensor.shape)}, "
            f"but config.json asks for {list(part.shape)}"
        )
    return tensor


def _without_tied_head(
    where: str, tensors: Mapping[str, "Tensor"], left: list[str], layout: Layout
) -> list[str]:
    """A tied head may be stored twice, if both are the same."""
    (head,) = layout.rows["readout.weight"]
    (table,) = layout.rows["embedding.table"]
    if head not in left:
        return left
    if not tensors[head].equal(tensors[table]):
        raise UserError(
            f"{where} ties the head to the embedding, but {head} is not {table}; "
            "set tie_word_embeddings to false in config.json"
        )
    return [name for name in left if name != head]


def given(
    tensors: Mapping[str, "Tensor"], recipe: Recipe, layout: Layout
) -> dict[str, "Tensor"]:
    """Our tensors under their names.  Raises UserError for a parameter that they have no place for."""
    theirs: dict[str, Tensor] = {}
    for name, _, parts in parts_of(recipe, layout):
        rows = [part.shape[0] for part in parts]
        pieces = tensors[name].split(rows) if len(parts) > 1 else [tensors[name]]
        for part, piece in zip(parts, pieces, strict=True):
            theirs[part.name] = piece.contiguous()
    return theirs
