"""A model's config.json as a recipe: what it cannot hold is refused by name.  No torch here.

The interventions that a shape needs (qk_norm and the rest of IMU-1's) must be registered: ablations/registry.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ablab.core.errors import UserError
from ablab.core.interop.names import IMU1, LLAMA, QWEN3, Layout
from ablab.core.parts.feedforward import SwiGLU, hidden_width
from ablab.core.parts.position import Rope
from ablab.core.parts.schedule import Constant
from ablab.core.recipe.intervention import resolve, treatment_of
from ablab.core.recipe.recipe import Attention, Budget, Data, Model, Recipe

Config = Mapping[str, Any]
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Key -> the values under which it changes nothing here; None: it is absent.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}


@dataclass(frozen=True)
class Form:
    """A shape that is known: how its tensors are called, and how its config is read."""

    layout: Layout
    treatment: Callable[[Config], list[str | dict[str, Any]]]
    eps: float = 1e-6  # where rms_norm_eps is absent


def recipe_of(config: Config, name: str, context: int | None = None) -> tuple[Recipe, Layout]:
    """The recipe of a model that stands by itself, and the layout of its tensors.

    name: data.name.  context: tokens that it shall be good for; None: all that it was made for.
    Raises UserError for an unknown architecture, and by name for what a recipe cannot hold.
    """
    kind = config.get("model_type")
    if kind not in FORMS:
        raise UserError(
            f"config.json says model_type={kind!r}, which is not known here; "
            f"known: {', '.join(FORMS)}"
        )
    form = FORMS[kind]
    _refuse_what_is_lacking_here(config)
    most = config["max_position_embeddings"]
    if context and context > most:
        raise UserError(f"--context {context} exceeds the {most} tokens that it was made for")
    context = context or most
    model = _model(config, form)
    data = Data(name, vocab=config["vocab_size"], context=context, batch=1, held_out=context)
    base = Recipe(data, model, schedule=Constant(), budget=Budget(context))
    return resolve(base, treatment_of(form.treatment(config))), form.layout


def _refuse_what_is_lacking_here(config: Config) -> None:
    for key in SIZES:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise UserError(
                f"config.json: {key}={config.get(key)!r} must be a whole number >= 1"
            )
    for key, values in HARMLESS.items():
        if config.get(key) not in values:
            raise UserError(f"config.json: {key}={config[key]!r:.80} cannot be held here")
    sliding = config.get("sliding_window") if config.get("model_type") != "qwen3" else None
    layers = set(config.get("layer_types") or ())
    if sliding or layers - {"full_attention"}:
        said = f"sliding_window={sliding}" if sliding else f"layer_types={sorted(layers)}"
        raise UserError(
            f"config.json: {said} cannot be held here: all layers must see all keys"
        )
    rope = _rope(config)
    scaled = rope.get("rope_type") or rope.get("type")
    if scaled not in (None, "default") or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"config.json: rotary positions scaled by {dict(rope)!r:.100} cannot be held here"
        )


def _rope(config: Config) -> Config:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _model(config: Config, form: Form) -> Model:
    width = config["hidden_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    head_dim = config.get("head_dim") or width // heads
    base = _rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0
    as_wide_as_the_model = heads * head_dim == width
    return Model(
        width=width,
        layers=config["num_hidden_layers"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=config.get("rms_norm_eps", form.eps),
        attention=Attention(
            head_dim=head_dim,
            group=heads // kv_heads,
            heads=None if as_wide_as_the_model else heads,
            position=Rope(float(base)),
        ),
        ffn=feed_forward(width, config["intermediate_size"]),
    )


def feed_forward(width: int, hidden: int) -> SwiGLU:
    """A SwiGLU of exactly so many units."""
    part = SwiGLU(expansion=hidden / width, multiple=1)
    assert hidden_width(width, part.expansion, 1) == hidden, "one rounding, far below a half"
    return part


def _none(config: Config) -> list[str | dict[str, Any]]:
    return []


def _qwen3(config: Config) -> list[str | dict[str, Any]]:
    return [{"qk_norm": {"gain": "channel", "eps": config.get("rms_norm_eps", 1e-6)}}]


GATES = {
    "elementwise": "elementwise",
    "per-head": "head",
    "per-head-hd": "first_channels",
}


def _imu1(config: Config) -> list[str | dict[str, Any]]:
    """As transformer/attention.py of the released code computes: QK-norm with eps 1e-6, and 1/sqrt(head_dim) besides.

    Its converter's own check on a CPU leaves 1/sqrt(head_dim) away: that would be a qk_scale of sqrt(head_dim).
    """
    treatment: list[str | dict[str, Any]] = []
    if config.get("attn_qknorm"):
        scale = config.get("qk_scale", 1.0)
        treatment.append({"qk_norm": {"gain": "scalar", "eps": 1e-6, "scale": scale}})
    if config.get("attn_val_residual"):
        mixed = {"form": "normalised", "first_layer": "mixed"}
        treatment.append({"value_residual": mixed})
    if gate := config.get("attn_gating"):
        if gate not in GATES:
            raise UserError(f"config.json: attn_gating={gate!r} is none of {', '.join(GATES)}")
        treatment.append({"gating": {"per": GATES[gate]}})
    if config.get("layernorm_scaling"):
        treatment.append("ln_scaling")
    return treatment


FORMS = {
    "llama": Form(LLAMA, _none),
    "qwen3": Form(QWEN3, _qwen3),
    "imu_1": Form(IMU1, _imu1, eps=1e-5),
}
