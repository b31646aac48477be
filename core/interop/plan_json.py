"""A plan as plain data, for core/interop/modeling_ablab.py to build from; what cannot be written is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ablab.core.errors import UserError
from ablab.core.interop.portable import CannotStandAlone, Carried
from ablab.core.language.declare import Linear, Param, Stage, Table
from ablab.core.language.offers import CausalMix, Turn, TurnLeading, WindowMix
from ablab.core.model.plan import AttentionPlan, BlockPlan, FeedForwardPlan, embed, plan_of
from ablab.core.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]
PLAIN = (int, float, bool, str, type(None))


@dataclass
class Written:
    """plan: for config.json.  functions: those of its stages.  tables: their constant tensors, by name in the model."""

    functions: Carried = field(default_factory=Carried)
    tables: "dict[str, Tensor]" = field(default_factory=dict)
    plan: Json = field(default_factory=dict)
    positions: "list[dict[str, Tensor]]" = field(default_factory=list)


def written(recipe: Recipe) -> Written:
    """recipe: without what acts in training alone.  Raises UserError for a stage that cannot be exported."""
    return _Writer(recipe).write()


class _Writer:
    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.plan = plan_of(recipe)
        self.out = Written()
        self.parametrization = recipe.parametrization

    def write(self) -> Written:
        plan, model = self.plan, self.recipe.model
        if plan.embedding.function is not embed:
            raise UserError("the token table is read in a way that cannot be exported")
        blocks = [self._block(block, f"blocks.{i}") for i, block in enumerate(plan.blocks)]
        self.out.plan = {
            "table": [self.recipe.data.vocab, model.width],
            "table_std": self._start("embedding.table", plan.embedding.bound["table"]),
            "tied": plan.readout is None,
            "on_table": self._stages(plan.on_table, "on_table"),
            "on_embedding": self._stages(plan.on_embedding, "on_embedding"),
            "blocks": blocks,
            "on_features": self._stages(plan.on_features, "on_features"),
            "norm": self._stage(plan.norm, "norm"),
            "on_logits": self._stages(plan.on_logits, "on_logits"),
        }
        positions = self.out.positions
        self.out.plan["positions"] = [_shapes(tables) for tables in positions]
        for i, tables in enumerate(positions):
            self.out.tables |= {f"tables.{i}.{name}": value for name, value in tables.items()}
        return self.out

    def _block(self, block: BlockPlan, path: str) -> Json:
        return {
            "on_block": self._stages(block.on_block, f"{path}.on_block"),
            "block": self._stage(block.block, f"{path}.block"),
            "attention": self._attention(block.attention, f"{path}.attention"),
            "ffn": self._ffn(block.ffn, f"{path}.ffn"),
        }

    def _attention(self, attention: AttentionPlan, path: str) -> Json:
        head_dim = self.recipe.model.attention.head_dim
        return {
            "norm": self._stage(attention.norm, f"{path}.norm"),
            "on_norm": self._stages(attention.on_norm, f"{path}.on_norm"),
            "qkv": list(attention.qkv.weight.shape),
            "heads": [rows // head_dim for rows in attention.qkv.weight.blocks],
            "on_qk": self._stages(attention.on_qk, f"{path}.on_qk"),
            "position": self._position(attention.position, path),
            "on_values": self._stages(attention.on_values, f"{path}.on_values"),
            "window": self._window(attention.mix, path),
            "on_heads": self._stages(attention.on_heads, f"{path}.on_heads"),
            "out": list(attention.out.weight.shape),
            "on_branch": self._stages(attention.on_branch, f"{path}.on_branch"),
        }

    def _ffn(self, ffn: FeedForwardPlan, path: str) -> Json:
        return {
            "norm": self._stage(ffn.norm, f"{path}.norm"),
            "on_norm": self._stages(ffn.on_norm, f"{path}.on_norm"),
            "inner": self._stage(ffn.inner, f"{path}.inner"),
            "on_branch": self._stages(ffn.on_branch, f"{path}.on_branch"),
        }

    # -- positions and masks: of a row whose pads count for nothing, these must be known by their formula ------------
    def _position(self, stage: Stage, path: str) -> int:
        """The number of the stage's tables among those that differ."""
        offer = stage.offer
        if not isinstance(offer, Turn | TurnLeading):
            said = f"positions by {stage.function.__name__}()"
            raise UserError(f"{path}: {said} cannot be exported: only rotary ones are known")
        made = {
            name: value.make().float() if isinstance(value, Table) else value
            for name, value in stage.bound.items()
        }
        cos, sin = offer.tables(**made)
        for i, other in enumerate(self.out.positions):
            if other["cos"].equal(cos) and other["sin"].equal(sin):
                return i
        self.out.positions.append({"cos": cos, "sin": sin})
        return len(self.out.positions) - 1

    def _window(self, stage: Stage, path: str) -> int | None:
        """Keys that a query sees; None: all up to its own."""
        if isinstance(stage.offer, CausalMix) and not stage.bound:
            return None
        if isinstance(stage.offer, WindowMix):
            return stage.offer.window(**stage.bound)
        said = f"attention by {stage.function.__name__}()"
        raise UserError(
            f"{path}: {said} cannot be exported: only causal and windowed ones are known"
        )

    # -- all other stages, as their source says ------------------------------------------------------------------------
    def _stages(self, stages: Mapping[str, Stage], path: str) -> Json:
        return {name: self._stage(stage, f"{path}.{name}") for name, stage in stages.items()}

    def _stage(self, stage: Stage, path: str) -> Json:
        try:
            function = self.out.functions.name_of(stage.function)
        except CannotStandAlone as why:
            raise UserError(
                f"{path} cannot be exported: {why}; its functions must stand alone, over torch and plain values"
            ) from None
        parameters: dict[str, list[int]] = {}
        start: dict[str, float] = {}
        maps: dict[str, list[int]] = {}
        tables: dict[str, list[int]] = {}
        numbers: Json = {}
        for name, value in stage.bound.items():
            match value:
                case Param():
                    parameters[name] = list(value.shape)
                    start[name] = self._start(f"{path}.{name}", value)
                case Linear():
                    maps[name] = list(value.weight.shape)
                case Table():
                    table = value.make().float()
                    tables[name] = list(table.shape)
                    self.out.tables[f"{path}.tables.{name}"] = table
                case _ if isinstance(value, PLAIN):
                    numbers[name] = value
                case _:
                    raise UserError(
                        f"{path} cannot be exported: its {name} is neither a number nor a word"
                    )
        return {
            "function": function,
            "parameters": parameters,
            "start": start,
            "maps": maps,
            "tables": tables,
            "numbers": numbers,
        }

    def _start(self, name: str, declared: Param) -> float:
        """What a parameter is filled with, or the std that it is drawn with."""
        if declared.fill is not None:
            return declared.fill
        return self.parametrization.scales(name, declared, self.recipe.model, "adam").std


def _shapes(tables: "Mapping[str, Tensor]") -> dict[str, list[int]]:
    return {name: list(table.shape) for name, table in tables.items()}
