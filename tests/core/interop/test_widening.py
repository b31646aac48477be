"""A wider model computes the same where its mode promises so, and has the copies where it repeats."""

import pytest
import torch

from ablab.core.interop.foreign import recipe_of
from ablab.core.interop.widening import Sizes, Widening, apart, widened, widened_recipe

PROMISED = 1e-4  # fp32, relative to the scale of the logits
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def grown(build):
    """Changes of the config, what is asked for -> both recipes and both sets of tensors."""

    def of(changes, treatment=(), **asked):
        old, _ = recipe_of(SMOLLM2 | changes, "small")
        model = build(old, stirred=0.2)
        before = {name: value.detach() for name, value in model.named_parameters()}
        widening = Widening(**asked)
        new = widened_recipe(old, widening, list(treatment))
        return old, before, new, widened(before, old, new, widening)

    return of


TWICE = {"width": 48, "heads": 6, "kv_heads": 2}
PRESERVED = {
    "twice as wide": TWICE,
    "wider, with as many heads": {"width": 40},
    "more units alone": {"width": 24, "hidden": 100},
    "units repeated": TWICE | {"hidden_by": "net2wider", "hidden": 100},
    "heads repeated": TWICE | {"heads_by": "net2wider"},
    "both, told apart": TWICE
    | {"heads_by": "net2wider", "hidden_by": "net2wider", "noise": 0.5},
    "a head of its own": TWICE | {"tied": False},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", PRESERVED)
def test_preserve_keeps_the_function(grown, which, tied):
    asked = PRESERVED[which]
    assert apart(*grown({"tie_word_embeddings": tied}, mode="preserve", **asked)) <= PROMISED


def test_preserve_keeps_it_with_interventions_that_start_neutral(grown):
    neutral = ["gating", "value_residual", "x0_lambdas"]
    assert apart(*grown({}, neutral, mode="preserve", **TWICE)) <= PROMISED


@pytest.mark.parametrize("other", ["qk_norm", "ln_scaling"])
def test_it_is_seen_that_other_interventions_change_it(grown, other):
    assert apart(*grown({}, [other], mode="preserve", **TWICE)) > 0.01


def test_preserve_norm_keeps_it_as_far_as_the_new_values_are_small(grown):
    distances = [
        apart(*grown({}, mode="preserve-norm", initial=initial, **TWICE))
        for initial in (0.0, 0.01, 1.0)
    ]
    assert distances[0] <= PROMISED < distances[2]
    assert distances == sorted(distances)


def test_noise_keeps_the_gains_and_the_corner_alone(grown):
    old, before, new, after = grown({}, mode="noise", initial=0.5, **TWICE)
    assert new.model.norm_eps == old.model.norm_eps
    assert torch.equal(after["norm.gain"][:24], before["norm.gain"])
    assert after["norm.gain"][24:].tolist() == [0.5] * 24
    gate_up = after["blocks.1.ffn.inner.gate_up.weight"]
    assert torch.equal(gate_up[:40, :24], before["blocks.1.ffn.inner.gate_up.weight"][:40])
    assert torch.equal(gate_up[80:120, :24], before["blocks.1.ffn.inner.gate_up.weight"][40:])
    assert (gate_up[40:80] != 0).all()
    qkv = after["blocks.2.attention.qkv.weight"]
    old_qkv = before["blocks.2.attention.qkv.weight"]
    for first, place in ((0, 0), (24, 48), (32, 64)):  # q, k, v of 24, 8 and 8 rows; 48, 16, 16
        rows = 24 if first == 0 else 8
        assert torch.equal(qkv[place : place + rows, :24], old_qkv[first : first + rows])


def test_repeated_units_are_read_as_often_as_they_stand(grown):
    _, before, _, after = grown({}, mode="preserve", hidden_by="net2wider", hidden=100, **TWICE)
    # 100 = 2 * 40 + 20: the first 20 units three times, the others twice
    copies = torch.tensor([3] * 20 + [2] * 20)
    up = before["blocks.0.ffn.inner.gate_up.weight"][40:].repeat_interleave(copies, dim=0)
    assert torch.equal(after["blocks.0.ffn.inner.gate_up.weight"][100:, :24], up)
    down = before["blocks.0.ffn.inner.down.weight"] / copies
    expected = down.repeat_interleave(copies, dim=1)
    torch.testing.assert_close(after["blocks.0.ffn.inner.down.weight"][:24], expected)


def test_noise_tells_copies_apart_and_sums_to_zero_over_them(grown):
    how = {"mode": "preserve", "hidden_by": "net2wider", "hidden": 80, "noise": 0.3}
    _, before, _, after = grown({}, **how, **TWICE)
    down = after["blocks.0.ffn.inner.down.weight"][:24].unflatten(1, (40, 2))
    assert (down[..., 0] != down[..., 1]).all()
    torch.testing.assert_close(down.sum(-1), before["blocks.0.ffn.inner.down.weight"])
    spread = (down[..., 0] - down[..., 1]).std() / before[
        "blocks.0.ffn.inner.down.weight"
    ].std()
    assert 0.1 < spread < 0.4  # of two draws of 0.3 / 2 and their mean taken away: 0.21


def test_what_is_not_asked_for_grows_with_the_width(grown):
    old, _, new, _ = grown({}, width=48)
    assert Sizes.of(new) == Sizes(48, 3, 1, 8, 80)
    assert new.model.attention.heads == 3
    assert Sizes.of(grown({}, width=48, heads=6)[2]) == Sizes(48, 6, 2, 8, 80)


REFUSED = {
    "narrower": ({"width": 16}, "width=16 is less than the 24"),
    "fewer heads": ({"width": 48, "heads": 2}, "heads=2 is less than the 3"),
    "other keys": (
        TWICE | {"kv_heads": 1, "mode": "preserve"},
        "would give old heads other keys",
    ),
    "uneven": ({"width": 48, "heads": 6, "kv_heads": 4}, "no multiple of kv_heads=4"),
    "part of the heads": (
        {"width": 48, "heads": 4, "kv_heads": 2, "heads_by": "net2wider"},
        "no multiple of 3",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_widened_so_is_refused(grown, refused, which):
    asked, words = REFUSED[which]
    refused(lambda: grown({}, **asked), words)


def test_a_head_of_its_own_cannot_be_tied_and_another_feed_forward_not_widened(
    grown, tiny, refused
):
    own = {"tie_word_embeddings": False}
    refused(lambda: grown(own, tied=True, **TWICE), "cannot be tied")
    relu2 = tiny(["relu2"])
    refused(lambda: widened_recipe(relu2, Widening(48), []), "only a model with swiglu")
