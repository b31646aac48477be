"""What transformers loads computes what was trained: every intervention, cached, padded, sampled, and trained on."""

import dataclasses
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from ablab.core.errors import UserError
from ablab.core.interop import native
from ablab.core.interop.exporting import export, forward_of
from ablab.core.interop.weights import load
from ablab.core.language.declare import Stage
from ablab.core.language.parse import fields_of
from ablab.core.language.part import Part, part
from ablab.core.model.objective import token_losses
from ablab.core.recipe.edit import append, edit, put
from ablab.core.recipe.intervention import REGISTRY

LIMIT = 1e-5  # fp32, relative to the scale of the logits
IMU1 = [
    {"qk_norm": {"gain": "scalar"}},
    "gating",
    "value_residual",
    "ln_scaling",
    {"mup": {"base_width": 16}},
]
LOOKING_BACK = [
    "smear",
    {"sliding_window": {"window": 3}},
    "value_embeddings",
    "x0_lambdas",
    "unet_skips",
    {"partial_rope": {"fraction": 0.5}},
    "sandwich_norm",
    "soft_cap",
    "relu2",
]
STACKS = {"llama": [], "qwen3": ["qk_norm"], "imu1": IMU1, "looking back": LOOKING_BACK}
CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "imu1": "Ablab", "looking back": "Ablab"}
# What changes the forward and can be exported, in all its doses; a later one may be refused, but never dropped.
EXPORTED = {
    "gating",
    "ln_scaling",
    "mup",
    "parallel_block",
    "partial_rope",
    "qk_norm",
    "relu2",
    "sandwich_norm",
    "sliding_window",
    "smear",
    "soft_cap",
    "unet_skips",
    "value_embeddings",
    "value_residual",
    "x0_lambdas",
}
every_stack = pytest.mark.parametrize("stack", STACKS)


@pytest.fixture
def pair(tiny, exported):
    """Name of a stack -> our model and the exported one, with grouped heads and a tied readout."""

    def of(stack):
        return exported(tiny(STACKS[stack], model__attention__group=2, model__tied=True))

    return of


def words(hint) -> list:
    return [
        word
        for option in get_args(hint)
        for word in ((option,) if isinstance(option, str) else words(option))
    ]


def variants():
    """(name, dose): the default of every intervention, and each other word of its dose."""
    for name, cls in sorted(REGISTRY.items()):
        yield name, {}
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for field, hint in fields_of(cls).items():
            for word in words(hint):
                if word != defaults[field]:
                    yield name, {field: word}


def requirements(name: str) -> list[str]:
    wanted = [name]
    for one in wanted:
        wanted += [need for need in REGISTRY[one].about.requires if need not in wanted]
    return wanted[1:]


@pytest.mark.parametrize("variant", list(variants()), ids=str)
def test_every_intervention_is_exported_exactly_or_refused_in_one_line(
    tiny, exported, batch, apart, variant
):
    """By existing: one that changes the forward is either in the export, or the export says that it is not."""
    name, dose = variant
    control = tiny(requirements(name))
    recipe = tiny([*requirements(name), {name: dose}])
    if same_forward(recipe, control):
        assert native.class_of(forward_of(recipe)) == native.class_of(forward_of(control))
        return
    try:
        ours, theirs = exported(recipe)
    except UserError as refusal:
        assert name not in EXPORTED, refusal
        assert "cannot be exported" in str(refusal) and "\n" not in str(refusal)
        return
    rows = batch(recipe)[:, :-1]
    with torch.no_grad():
        assert apart(theirs(rows).logits, ours(rows)) <= LIMIT


def same_forward(one, other) -> bool:
    one, other = forward_of(one), forward_of(other)
    scales = [recipe.parametrization.multipliers(recipe.model) for recipe in (one, other)]
    return one.model == other.model and scales[0] == scales[1]


@every_stack
def test_a_native_class_is_chosen_where_it_computes_the_same(pair, batch, apart, stack):
    ours, theirs = pair(stack)
    assert type(theirs).__name__ == f"{CLASSES[stack]}ForCausalLM"
    rows = torch.randint(64, (2, 16))
    with torch.no_grad():
        assert apart(theirs(rows).logits, ours(rows)) <= LIMIT


@pytest.mark.parametrize(
    "treatment",
    [
        [{"qk_norm": {"gain": "scalar"}}],
        [{"qk_norm": {"scale": 1.5}}],
        [{"qk_norm": {"eps": 1e-5}}],
        [{"mup": {"base_width": 16, "alpha_in": 2.0}}],
        ["qk_norm", "soft_cap"],
    ],
    ids=str,
)
def test_what_qwen3_and_llama_compute_otherwise_is_not_handed_to_them(tiny, treatment):
    assert native.class_of(tiny(treatment)) is native.OWN_CLASS


# ---- decoding ----


@every_stack
def test_cached_decoding_equals_recomputation_token_by_token(pair, apart, stack):
    _, model = pair(stack)
    rows = torch.randint(64, (2, 14))
    cache = None
    with torch.no_grad():
        whole = model(rows).logits
        for first, piece in zip(
            [0, 5, 6, 7, 10], rows.split([5, 1, 1, 3, 4], dim=1), strict=True
        ):
            step = model(piece, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            there = slice(first, first + piece.shape[1])
            assert apart(step.logits, whole[:, there]) <= LIMIT


@every_stack
def test_a_padded_row_has_the_logits_of_the_row_by_itself(pair, apart, stack):
    _, model = pair(stack)
    row = torch.randint(1, 64, (1, 9))
    other = torch.randint(1, 64, (1, 13))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), row), dim=1)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = torch.cat((padded, other))
    with torch.no_grad():
        logits = model(both, attention_mask=mask, position_ids=positions).logits
        assert apart(logits[:1, 4:], model(row).logits) <= LIMIT
        assert apart(logits[1:], model(other).logits) <= LIMIT


@every_stack
def test_generate_takes_batches_with_left_padding(pair, stack):
    """Greedy: each row as if it were alone."""
    _, model = pair(stack)
    rows = [torch.randint(1, 64, (1, length)) for length in (3, 6)]
    padded = torch.cat((F.pad(rows[0], (3, 0)), rows[1]))
    mask = (padded > 0).long()
    how = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **how)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **how)
        assert found[6:].tolist() == alone[0, row.shape[1] :].tolist()


def recomputed(model, rows, count):
    """Greedy continuation without a cache."""
    for _ in range(count):
        logits = model(rows, use_cache=False).logits
        rows = torch.cat((rows, logits[:, -1:].argmax(-1)), dim=1)
    return rows


@every_stack
def test_generate_samples_searches_and_repeats_under_a_seed(pair, stack):
    _, model = pair(stack)
    rows = torch.randint(1, 64, (2, 4))
    how = {"attention_mask": torch.ones_like(rows), "max_new_tokens": 8, "pad_token_id": 0}
    with torch.no_grad():
        greedy = model.generate(rows, do_sample=False, **how)
        assert torch.equal(greedy, recomputed(model, rows, 8))
        beams = model.generate(rows, num_beams=3, do_sample=False, **how)
        assert torch.equal(
            beams, model.generate(rows, num_beams=3, do_sample=False, use_cache=False, **how)
        )
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(rows, do_sample=True, top_p=0.95, **how))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- training through it ----


@pytest.mark.parametrize("stack", ["imu1", "looking back"])
def test_its_loss_and_gradients_are_ours(pair, apart, stack):
    ours, theirs = pair(stack)
    rows = torch.randint(64, (2, 16))
    theirs.train()
    output = theirs(rows, labels=rows)
    output.loss.backward()
    loss = token_losses(ours(rows)[:, :-1], rows[:, 1:]).mean()
    loss.backward()
    assert output.past_key_values is None
    assert abs(output.loss.item() - loss.item()) <= LIMIT
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        grad = gradients[name.replace("embedding.table", "embed_tokens.weight")]
        assert apart(grad, value.grad) <= 1e-4, name


def test_saved_by_transformers_and_loaded_again_it_is_the_same(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    _, model = pair("imu1")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    rows = torch.randint(64, (2, 16))
    with torch.no_grad():
        assert torch.equal(again.eval()(rows).logits, model(rows).logits)


def test_a_model_made_from_its_config_alone_starts_like_ours(pair):
    from transformers import AutoModelForCausalLM

    _, model = pair("imu1")
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    weight = fresh.blocks[0].attention.qkv.weight
    assert weight.std().item() == pytest.approx(32**-0.5, rel=0.2)
    assert fresh.norm._parameters["gain"].eq(1).all()
    assert fresh(torch.randint(64, (1, 4))).logits.isfinite().all()


WITHOUT_ABLAB = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        assert name.partition(".")[0] != "ablab", name
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
rows = torch.arange(12)[None]
with torch.no_grad():
    print(*model(rows).logits[0, -1].tolist())
"""


def test_another_process_loads_it_where_ablab_is_not(tiny, kept, tmp_path, monkeypatch):
    ours, folder = kept(tiny(IMU1))
    export(load(folder), tmp_path / "out", None, "NOTES")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", WITHOUT_ABLAB, tmp_path / "out"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = torch.tensor([float(word) for word in ended.stdout.split()])
    with torch.no_grad():
        expected = ours(torch.arange(12)[None])[0, -1]
    torch.testing.assert_close(found, expected, rtol=LIMIT, atol=LIMIT)


# ---- what it cannot say is refused by name ----


def twice(factor):
    def scaled(x):
        return x * factor

    return scaled


class Helper:
    value = 2.0


def by_a_class(x):
    return x * Helper.value


def by_an_import(x):
    import json

    return x * len(json.dumps([]))


def unheard_of(q, k, start):
    return q, k


def unheard_of_mix(q, k, v, carry, start):
    return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


REFUSED = {
    "a closure": ("model.on_norm", twice(2.0), "scaled() is a closure"),
    "a lambda": ("model.on_norm", lambda x: x, "<lambda>() "),
    "a class": ("model.on_norm", by_a_class, "uses Helper, which is neither"),
    "an import": ("model.on_norm", by_an_import, "by_an_import() imports json"),
    "positions": ("model.attention.position", unheard_of, "positions by unheard_of()"),
    "a mix": ("model.attention.mix", unheard_of_mix, "attention by unheard_of_mix()"),
}


@pytest.fixture
def strange():
    """A part that builds a stage of the given function, known for the length of a test."""
    before = dict(Part.known)

    def of(function):
        @part(f"strange_{len(Part.known)}")
        class Strange(Part):
            def build(self, where):
                return Stage(function)

        return Strange()

    yield of
    Part.known.clear()
    Part.known.update(before)


@pytest.mark.parametrize("what", REFUSED)
def test_a_stage_that_cannot_stand_alone_is_refused_by_name(
    tiny, kept, tmp_path, refused, strange, what
):
    slot, function, words = REFUSED[what]
    one = strange(function)
    change = append(one) if slot == "model.on_norm" else put(one)
    _, folder = kept(edit(tiny(), slot, change))
    weights = load(folder)
    refused(lambda: export(weights, tmp_path / "out", None, ""), words, "cannot be exported")


def test_another_product_is_refused_by_name(tiny, kept, tmp_path, refused):
    weights = load(kept(tiny())[1])

    @part("strange_product")
    class Strange(Part):
        def product(self, path, linear):
            return None

    try:
        recipe = edit(weights.recipe, "model.products", append(Strange()))
        strange_one = replace(weights, recipe=recipe)
        refused(
            lambda: export(strange_one, tmp_path / "out", None, ""),
            "strange_product multiplies otherwise",
        )
    finally:
        del Part.known["strange_product"]


def test_a_folder_that_exists_is_left_as_it_is(tiny, kept, tmp_path, refused):
    weights = load(kept(tiny())[1])
    (tmp_path / "out").mkdir()
    refused(lambda: export(weights, tmp_path / "out", None, ""), "exists already")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"output_attentions": True}, "neither attentions"),
        ({"attention_mask": torch.ones(1, 3)}, "must have shape"),
        ({"position_ids": torch.full((1, 17), 16)}, "exceeds the context of 16"),
    ],
)
def test_the_exported_model_refuses_what_it_cannot_answer(pair, how, words):
    _, model = pair("imu1")
    with pytest.raises(ValueError, match=words):
        model(torch.ones(1, 17, dtype=torch.long), **how)
