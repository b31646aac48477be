"""runtime.kernels=same: a kernel serves a place in every cell, or in none."""

from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.fusion import places as fuse
from ablab.core.language.parse import parse
from ablab.core.runtime.runtime import Runtime
from ablab.experiments.run.service import common_places, settle_service

SHAPE = {"model__width": 64, "model__attention__head_dim": 32}
SAME = Runtime(device="cpu", dtype="bf16", kernels="same")


@pytest.fixture
def all_faster(monkeypatch):
    """A card on which every kernel was measured to be faster at every shape; its kernels run in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fuse, "_card", lambda: fuse.Card("this card", (1, 0)))
    everywhere = dict.fromkeys(fuse.KERNELS, lambda recipe: True)
    monkeypatch.setattr(fuse, "FASTER", {(1, 0): everywhere})


def test_a_place_that_one_cell_cannot_have_served_is_served_in_none(tiny, all_faster):
    plain, muon = tiny([], **SHAPE), tiny(["muon"], **SHAPE)
    gated = tiny([{"gating": {"per": "elementwise"}}], **SHAPE)
    everything = ("attention", "ffn", "loss", "optimizer", "residual")
    assert common_places(SAME, [plain]) == everything
    assert common_places(SAME, [plain, gated]) == ("ffn", "loss", "optimizer", "residual")
    neither = common_places(SAME, [tiny(["relu2"], **SHAPE), gated])
    assert neither == ("loss", "optimizer", "residual")
    # AdamW has no Newton-Schulz to be served
    assert set(common_places(SAME, [plain, muon])) == {*everything, "newton_schulz"}


def test_the_places_named_are_served_and_no_others(tiny, all_faster):
    recipe = tiny([], **SHAPE)
    named = replace(SAME, kernels=common_places(SAME, [recipe, tiny(["relu2"], **SHAPE)]))
    settled = fuse.places(recipe, settled_as(named))
    assert {place for place, one in settled.items() if one.kernel} == {
        "attention",
        "loss",
        "optimizer",
        "residual",
    }
    assert settled["ffn"].why == "torch: runtime.kernels=[attention, loss, optimizer, residual]"


def test_a_place_that_was_named_and_cannot_be_served_is_refused_in_one_line(tiny, all_faster):
    said = r"runtime.kernels=\[ffn\] cannot serve the ffn: the feed-forward is relu2"
    with pytest.raises(UserError, match=said) as refusal:
        fuse.places(tiny(["relu2"], **SHAPE), settled_as(replace(SAME, kernels=("ffn",))))
    assert "\n" not in str(refusal.value)


def settled_as(runtime):
    from ablab.core.runtime.runtime import settle

    return settle(runtime, 4)


def test_a_process_of_its_own_is_asked_where_same_is_asked_for_alone(tiny):
    auto = Runtime(device="cpu")
    assert settle_service(auto, [tiny()], ()) is auto
    asked = settle_service(replace(auto, kernels="same"), [tiny(), tiny(["muon"])], ())
    assert asked == replace(auto, kernels=())  # on a CPU no kernel is known to be faster


def test_places_are_listed_as_in_yaml_and_a_wrong_one_is_named():
    assert parse(Runtime, {"kernels": ["ffn", "loss"]}, "").kernels == ("ffn", "loss")
    with pytest.raises(UserError, match="kernels=.*must be one of auto, triton, torch, same"):
        parse(Runtime, {"kernels": ["fnf"]}, "runtime")
