"""Which class of transformers computes a recipe as it stands: Llama's, Qwen3's, or none.  No torch here."""

from dataclasses import dataclass
from typing import Any

from ablab.core.interop.names import LLAMA, OWN, QWEN3, Layout
from ablab.core.language.declare import Stage
from ablab.core.model.plan import Plan, plan_of
from ablab.core.parts.parametrize import Multipliers
from ablab.core.recipe.asks import Builds, MayBuild
from ablab.core.recipe.recipe import Recipe
from ablab.core.recipe.slots import held

Config = dict[str, Any]
# Slot -> the one part that these classes compute there; every other slot of the model must be empty.
PARTS = {
    "model.block": "residual",
    "model.attention.position": "rope",
    "model.attention.mix": "causal",
    "model.ffn": "swiglu",
}
QK_NORM = ("model.attention.on_qk", "qk_norm")


@dataclass(frozen=True)
class Class:
    """What loads the export: a class of transformers, or one that is written beside the weights."""

    name: str
    layout: Layout
    config: Config  # beside the sizes


LLAMA_CLASS = Class("LlamaForCausalLM", LLAMA, {"model_type": "llama", "mlp_bias": False})
QWEN3_CLASS = Class("Qwen3ForCausalLM", QWEN3, {"model_type": "qwen3"})
OWN_CLASS = Class(
    "AblabForCausalLM",
    OWN,
    {
        "model_type": "ablab",
        "auto_map": {
            "AutoConfig": "modeling_ablab.AblabConfig",
            "AutoModelForCausalLM": "modeling_ablab.AblabForCausalLM",
        },
    },
)


def class_of(recipe: Recipe) -> Class:
    """The native class where every stage of the model is one of its own, else ours."""
    others = set()
    for slot, path, parts in held(recipe):
        if path.startswith("model.") and slot.asks in (Builds, MayBuild):
            others |= {(path, part.kind) for part in parts if PARTS.get(path) != part.kind}
    if recipe.parametrization.multipliers(recipe.model) != Multipliers():
        return OWN_CLASS
    if not others:
        return LLAMA_CLASS
    if others == {QK_NORM} and _as_qwen3(recipe):
        return QWEN3_CLASS
    return OWN_CLASS


def _as_qwen3(recipe: Recipe) -> bool:
    """Whether the one QK-norm has a gain a channel, no factor besides, and the eps of the other norms."""
    parts = recipe.model.attention.on_qk
    dose = {name: getattr(parts[0], name, None) for name in ("gain", "scale", "eps")}
    return len(parts) == 1 and dose == {
        "gain": "channel",
        "scale": 1.0,
        "eps": recipe.model.norm_eps,
    }


def config_of(recipe: Recipe, chosen: Class) -> Config:
    """config.json of the export, but for the ids of special tokens, and for the plan of our own class."""
    model = recipe.model
    config: Config = {
        "architectures": [chosen.name],
        **chosen.config,
        "vocab_size": recipe.data.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.attention.head_dim,
        "max_position_embeddings": recipe.data.context,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
    }
    if chosen is OWN_CLASS:
        return config
    base = getattr(model.attention.position, "base", None)
    return config | {
        "hidden_act": "silu",
        "intermediate_size": hidden_of(plan_of(recipe)),
        "rms_norm_eps": model.norm_eps,
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def hidden_of(plan: Plan) -> int:
    """Units of a SwiGLU."""
    inner: Stage = plan.blocks[0].ffn.inner
    return inner.bound["down"].weight.shape[1]
