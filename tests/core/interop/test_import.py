"""A model of the other side computes the same here, goes back with the same bits, or is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ablab.core.interop.exporting import export
from ablab.core.interop.importing import import_from
from ablab.core.interop.weights import built, load

LIMIT = 1e-5  # fp32, relative to the scale of the logits
SMOLLM2 = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
QWEN3 = SMOLLM2 | {"head_dim": 16, "num_attention_heads": 2, "tie_word_embeddings": False}


def theirs_of(kind: str, **changes):
    """A model that transformers makes, with nothing at a special start."""
    import transformers

    shapes = {"llama": ("Llama", SMOLLM2), "qwen3": ("Qwen3", QWEN3)}
    name, sizes = shapes[kind]
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """Kind, changes of its config -> the model, and the folder that save_pretrained wrote."""

    def of(kind, shards="5GB", dtype=torch.float32, **changes):
        model = theirs_of(kind, **changes).to(dtype)
        folder = tmp_path / f"saved_{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, max_shard_size=shards)
        return model, folder

    return of


def tensors_in(folder) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


MODELS = {
    "llama, tied, grouped": ("llama", {}),
    "llama, with a head": ("llama", {"tie_word_embeddings": False}),
    "qwen3, heads wider than the model": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("which", MODELS)
def test_it_computes_the_same_and_goes_back_bit_for_bit(saved, tmp_path, apart, which):
    kind, changes = MODELS[which]
    model, folder = saved(kind, **changes)
    import_from(folder, tmp_path / "ours")
    weights = load(tmp_path / "ours")
    rows = torch.randint(64, (2, 32))
    with torch.no_grad():
        assert apart(built(weights)(rows), model(rows).logits) <= LIMIT
    export(weights, tmp_path / "back", None, "")
    same_bits(tensors_in(tmp_path / "back"), tensors_in(folder))
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in (*SMOLLM2, "architectures", "model_type", "dtype", "head_dim"):
        assert after.get(key) == before.get(key), key


def test_shards_and_half_precision_go_back_bit_for_bit(saved, tmp_path):
    _, folder = saved("llama", shards="10KB", dtype=torch.bfloat16)
    *_, last = sorted(folder.glob("model-*.safetensors"))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    wide = {name: value.float() for name, value in load_file(last).items()}
    save_file(wide, last, metadata={"format": "pt"})
    import_from(folder, tmp_path / "ours")
    weights = load(tmp_path / "ours")
    assert {value.dtype for value in weights.tensors.values()} == {torch.float32}
    export(weights, tmp_path / "back", None, "")
    same_bits(tensors_in(tmp_path / "back"), tensors_in(folder))


def test_our_own_export_comes_back_bit_for_bit(tiny, kept, tmp_path):
    model, folder = kept(tiny(["gating", "smear", "z_loss", "multi_token"]))
    export(load(folder), tmp_path / "out", None, "")
    import_from(tmp_path / "out", tmp_path / "back")
    back = load(tmp_path / "back")
    assert not back.recipe.objective
    for name, value in back.tensors.items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name


def test_fewer_tokens_may_be_asked_for_and_more_are_refused(saved, tmp_path, refused):
    _, folder = saved("llama")
    import_from(folder, tmp_path / "short", context=8)
    assert load(tmp_path / "short").recipe.data.context == 8
    refused(lambda: import_from(folder, tmp_path / "long", context=64), "exceeds the 32 tokens")


# ---- refused by name, and nothing is written ----

UNHELD = {
    "a bias": ({"attention_bias": True}, "attention_bias=True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "scaled positions": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "scaled by",
    ),
    "the older word for them": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "scaled by",
    ),
    "a window": ({"sliding_window": 8}, "sliding_window=8"),
    "layers with a window": ({"layer_types": ["sliding_attention"] * 3}, "layer_types="),
    "experts": ({"num_local_experts": 8}, "num_local_experts=8"),
    "an unknown architecture": ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
    "no width": ({"hidden_size": None}, "hidden_size=None must be a whole number"),
    "heads that do not group": ({"num_key_value_heads": 2}, "no multiple of"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "a wrong shape": ({"intermediate_size": 41}, "has shape [40, 24], but config.json asks"),
    "more layers than tensors": ({"num_hidden_layers": 4}, "lacks model.layers.3."),
    "fewer layers than tensors": ({"num_hidden_layers": 2}, "holds model.layers.2."),
}


@pytest.mark.parametrize("what", UNHELD)
def test_what_cannot_be_held_is_refused_by_name(saved, tmp_path, refused, what):
    changes, words = UNHELD[what]
    _, folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(lambda: import_from(folder, tmp_path / "ours"), words)


def test_a_tensor_beyond_the_model_is_refused_by_name(saved, tmp_path, refused):
    _, folder = saved("llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}
    save_file(tensors | bias, path)
    refused(
        lambda: import_from(folder, tmp_path / "ours"), "holds model.layers.0", "q_proj.bias"
    )
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, path)
    refused(lambda: import_from(folder, tmp_path / "ours"), "ties the head")
    whole = {name: value.int() for name, value in tensors.items()}
    save_file(whole, path)
    refused(lambda: import_from(folder, tmp_path / "ours"), "torch.int32; only float32")


def test_files_that_are_missing_or_torn_are_named(saved, tmp_path, refused):
    _, folder = saved("llama", shards="10KB")
    ours = tmp_path / "ours"
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    refused(lambda: import_from(folder, ours), "cannot read", first.name)
    (folder / "model.safetensors.index.json").unlink()
    refused(lambda: import_from(folder, ours), "holds neither model.safetensors nor")
    (folder / "config.json").write_text("{torn")
    refused(lambda: import_from(folder, ours), "config.json is not JSON")
    (folder / "config.json").unlink()
    refused(lambda: import_from(folder, ours), "holds no config.json")
    (ours).mkdir()
    refused(lambda: import_from(folder, ours), "exists already")


# ---- IMU-1's own layouts ----

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCAB = 32, 4, 2, 8, 64, 3, 64


def released_checkpoint(gate: str) -> dict[str, Tensor]:
    """Tensors of the trainer's names and shapes; the head's copy of the table is not what is read."""
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    gates = {"per-head": (HEADS, WIDTH), "elementwise": (WIDTH, WIDTH)}
    gates["per-head-hd"] = (HEADS, HEAD_DIM)
    shapes = {
        "embedding.weight": (VOCAB, WIDTH),
        "final_norm.gain": (WIDTH,),
        "lm_head.linear.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.ln1.gain": (WIDTH,),
            f"{block}.ln2.gain": (WIDTH,),
            f"{block}.attn.qkv.linear.weight": (rows, WIDTH),
            f"{block}.attn.out.linear.weight": (WIDTH, WIDTH),
            f"{block}.attn.attn_gate.linear.weight": gates[gate],
            f"{block}.attn.sdpa_qknorm.gain": (1,),
            f"{block}.attn.alpha1": (1,),
            f"{block}.attn.alpha2": (1,),
            f"{block}.attn.scale": (1,),
            f"{block}.ffn.up.linear.weight": (2 * HIDDEN, WIDTH),
            f"{block}.ffn.down.linear.weight": (WIDTH, HIDDEN),
        }
    return {
        name: 0.3 * torch.randn(shape) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def released_forward(weights: dict[str, Tensor], tokens: Tensor, gate: str) -> Tensor:
    """The released formulas again, in fp64: tokens int [T] -> logits [T,V]."""
    w = {name: value.double() for name, value in weights.items()}
    length = len(tokens)
    x = w["embedding.weight"][tokens]
    first_values = None
    for i in range(LAYERS):
        block = f"blocks.{i}"

        def normed(x, name, block=block, i=i):
            unit = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return unit * w[f"{block}.{name}.gain"] / (i + 1) ** 0.5

        h = normed(x, "ln1")
        rows = h @ w[f"{block}.attn.qkv.linear.weight"].T
        q, k, v = rows.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
        q = phase(q.view(length, HEADS, HEAD_DIM))
        k = phase(k.view(length, KV_HEADS, HEAD_DIM))
        v = v.view(length, KV_HEADS, HEAD_DIM)
        own, first, scale = (
            w[f"{block}.attn.{name}"] for name in ("alpha1", "alpha2", "scale")
        )
        old = v if first_values is None else first_values
        v = scale * (own * v + first * old) / (own**2 + first**2 + 1e-8).sqrt()
        first_values = v if first_values is None else first_values
        y = torch.empty(length, HEADS, HEAD_DIM, dtype=torch.float64)
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            unit_q = q[:, head] / (q[:, head].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            unit_k = k[:, kv] / (k[:, kv].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            gain = w[f"{block}.attn.sdpa_qknorm.gain"]
            scores = gain * unit_q @ unit_k.T / HEAD_DIM**0.5
            hidden = torch.ones(length, length).triu(1).bool()
            y[:, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, kv]
        read = h[:, :HEAD_DIM] if gate == "per-head-hd" else h
        gates = 2 * (read @ w[f"{block}.attn.attn_gate.linear.weight"].T).sigmoid()
        y = y * gates.view(length, HEADS, -1)
        x = x + y.flatten(1) @ w[f"{block}.attn.out.linear.weight"].T
        left, right = (normed(x, "ln2") @ w[f"{block}.ffn.up.linear.weight"].T).chunk(2, -1)
        inner = left * left.sigmoid() * right
        x = x + inner @ w[f"{block}.ffn.down.linear.weight"].T
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (unit * w["final_norm.gain"]) @ w["lm_head.linear.weight"].T


def phase(x: Tensor) -> Tensor:
    """[T,H,D]: channels i and i + D/2 as a complex number, times its phase."""
    half = HEAD_DIM // 2
    turns = torch.arange(half, dtype=torch.float64)
    angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-2 * turns / HEAD_DIM)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def released_config(gate: str) -> str:
    model = {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_ff": HIDDEN + 3,  # rounded down to a multiple of 64 there
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "theta": 10_000,
        "weight_tying": True,
        "attn_qknorm": True,
        "attn_val_residual": True,
        "attn_gating": gate,
        "layernorm_scaling": True,
    }
    return json.dumps({"model": model, "data": {}, "optim": {}})


@pytest.mark.parametrize("gate", ["per-head", "elementwise", "per-head-hd"])
def test_a_released_checkpoint_computes_the_released_formulas(tmp_path, apart, gate):
    tensors = released_checkpoint(gate)
    held = {"config": released_config(gate), "model": tensors, "optimizer": [], "iteration": 5}
    torch.save(held | {"run_id": None}, tmp_path / "last.pt")
    import_from(tmp_path / "last.pt", tmp_path / "ours", context=16)
    tokens = torch.randint(VOCAB, (16,))
    with torch.no_grad():
        ours = built(load(tmp_path / "ours"))(tokens[None])[0]
    assert apart(ours.double(), released_forward(tensors, tokens, gate)) <= LIMIT


def hugging_face_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As convert_imu1_checkpoint.py renames them, with its tables beside."""
    words = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.gain": "model.norm.weight",
        "lm_head.linear.weight": "lm_head.weight",
        "ln1.gain": "input_layernorm.weight",
        "ln2.gain": "post_attention_layernorm.weight",
        "attn.qkv.linear.weight": "self_attn.qkv_proj.weight",
        "attn.out.linear.weight": "self_attn.o_proj.weight",
        "attn.attn_gate.linear.weight": "self_attn.attn_gate.weight",
        "attn.sdpa_qknorm.gain": "self_attn.qk_norm.gain",
        "attn.alpha1": "self_attn.alpha1",
        "attn.alpha2": "self_attn.alpha2",
        "attn.scale": "self_attn.value_scale",
        "ffn.up.linear.weight": "mlp.up_proj.weight",
        "ffn.down.linear.weight": "mlp.down_proj.weight",
    }
    named = {}
    for name, value in tensors.items():
        if name == "lm_head.weight":
            continue
        _, _, rest = name.partition("blocks.")
        number, _, tail = rest.partition(".")
        named[f"model.layers.{number}.{words[tail]}" if rest else words[name]] = value
    tables = {"model.rotary_emb.cos_cached": torch.ones(4, 4)}
    tables["model.layers.0.input_layernorm.position_scale"] = torch.tensor(1.0)
    return named | tables


@pytest.fixture
def published(tmp_path):
    """tensors of a checkpoint -> a folder in the layout of the published model."""

    def of(tensors):
        folder = tmp_path / "published"
        folder.mkdir()
        config = SMOLLM2 | {
            "model_type": "imu_1",
            "architectures": ["Imu1ForCausalLM"],
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "rope_parameters": None,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "attn_qknorm": True,
            "attn_val_residual": True,
            "attn_gating": "per-head",
            "layernorm_scaling": True,
        }
        (folder / "config.json").write_text(json.dumps(config))
        save_file(hugging_face_names(tensors), folder / "model.safetensors")
        return folder

    return of


def test_the_published_layout_computes_the_same_and_its_tables_are_not_read(
    published, tmp_path, apart
):
    tensors = released_checkpoint("per-head")
    import_from(published(tensors), tmp_path / "ours")
    tokens = torch.randint(VOCAB, (16,))
    with torch.no_grad():
        ours = built(load(tmp_path / "ours"))(tokens[None])[0]
    assert apart(ours.double(), released_forward(tensors, tokens, "per-head")) <= LIMIT


def test_exported_again_a_published_model_has_the_same_bits(published, tmp_path, apart):
    from transformers import AutoModelForCausalLM

    tensors = released_checkpoint("per-head")
    import_from(published(tensors), tmp_path / "ours")
    export(load(tmp_path / "ours"), tmp_path / "back", None, "")
    kept = {value.numpy().tobytes() for value in tensors_in(tmp_path / "back").values()}
    for name in tensors.keys() - {"lm_head.weight"}:  # of a tie that its head does not heed
        assert tensors[name].numpy().tobytes() in kept, name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    tokens = torch.randint(VOCAB, (16,))
    with torch.no_grad():
        found = model(tokens[None]).logits[0].double()
    assert apart(found, released_forward(tensors, tokens, "per-head")) <= LIMIT


def test_the_other_scale_of_the_scores_may_be_asked_for(published, tmp_path):
    import_from(published(released_checkpoint("per-head")), tmp_path / "ours", qk_scale=2.5)
    (norm,) = load(tmp_path / "ours").recipe.model.attention.on_qk
    assert norm.scale == 2.5


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, refused):
    path, ours = tmp_path / "last.pt", tmp_path / "ours"
    torch.save({"state_dict": {}}, path)
    refused(lambda: import_from(path, ours), "no checkpoint of IMU-1")
    torch.save({"config": "{}", "model": {}}, path)
    refused(lambda: import_from(path, ours), "its config lacks")
    torch.save({"config": pytest.raises, "model": {}}, path)
    refused(lambda: import_from(path, ours), "as tensors and plain values alone")
    path.write_bytes(b"torn")
    refused(lambda: import_from(path, ours), "cannot read", "last.pt")
