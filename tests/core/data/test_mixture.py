"""Mixes: every prefix of a run has the shares, every source its own order, and what cannot be mixed is named."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.data.contents import digest_of
from ablab.core.data.mixture import Shares, digest_of_data
from ablab.core.data.tokens import Tokens
from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import Data, Recipe, check, plain, run_id
from ablab.core.train.evaluate import held_out_loss

SIZES = {"big": 1603, "odd": 700, "small": 320}  # training tokens: 99, 42 and 19 windows of 16
EPOCH = {"big": 99, "odd": 42, "small": 19}


@pytest.fixture(scope="module")
def store(write_token_folder, tmp_path_factory):
    """Three sources of one tokenizer; training token i of the k-th is 10,000 k + i, so that a row tells its place."""
    root = tmp_path_factory.mktemp("store") / "data"
    first = None
    for number, (name, size) in enumerate(SIZES.items()):
        folder = write_token_folder(
            root / name, train=size, val=400, vocab=30_000, top=64, seed=number, like=first
        )
        first = first or folder
        ids = np.arange(size, dtype="<u2") + 10_000 * number
        ids.tofile(folder / "train.bin")
        redo_digest(folder)
    return root


def redo_digest(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["digest"] = digest_of(folder, "uint16")
    (folder / "meta.json").write_text(json.dumps(meta))


def open_mix(tiny, store, mix, **more):
    recipe = tiny(data__vocab=30_000, data__mix=mix, **{"data__epochs": 100.0, **more})
    return Tokens(recipe, store / "mixed")


def windows_of(tokens, count):
    """(source, first token) of the first windows of a run of one row a step."""
    starts = [int(tokens.rows(step, 0, 1)[0, 0]) for step in range(count)]
    return [divmod(start, 10_000) for start in starts]


WEIGHTS = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.floats(0.001, 1000) | st.integers(1, 12).map(float),
    min_size=1,
)


@given(WEIGHTS, st.integers(1, 400))
def test_any_prefix_of_a_run_has_the_shares_within_one_window(weights, count):
    shares = Shares(weights)
    total = sum(weights.values())
    had = dict.fromkeys(shares.names, 0)
    for window in range(count):
        source, own = shares.at(window)
        name = shares.names[source]
        assert own == had[name]
        had[name] += 1
        for each, weight in weights.items():
            assert abs(had[each] - (window + 1) * weight / total) < 1 + 1e-6
    assert shares.counts(count) == [had[name] for name in shares.names]


@settings(max_examples=40)
@given(WEIGHTS, st.integers(0, 10**4))
def test_a_turn_is_the_same_whether_or_not_those_before_it_were_asked(weights, window):
    fresh, used = Shares(weights), Shares(weights)
    used.at(0)
    used.at(window // 2)
    assert fresh.at(window) == used.at(window)


def test_the_turns_of_written_decimals_repeat_after_their_sum():
    shares = Shares({"a": 0.7, "b": 0.2, "c": 0.1})
    assert shares.period == 10
    assert [shares.at(i)[0] for i in range(10)] == [shares.at(i)[0] for i in range(990, 1000)]
    assert shares.at(10**15) == (shares.at(0)[0], 7 * 10**14 + shares.at(0)[1])


@settings(max_examples=15)
@given(
    st.dictionaries(st.sampled_from(list(SIZES)), st.integers(1, 9).map(float), min_size=1),
    st.integers(0, 2**40),
)
def test_each_window_of_an_epoch_comes_exactly_once(tiny, store, mix, seed):
    tokens = open_mix(tiny, store, mix, data__batch=1, seed=seed)
    seen: dict[str, list[int]] = {name: [] for name in SIZES}
    for source, start in windows_of(tokens, 130):
        seen[list(SIZES)[source]].append(start)
    for name, starts in seen.items():
        for begin in range(0, len(starts), EPOCH[name]):
            epoch = starts[begin : begin + EPOCH[name]]
            assert len(set(epoch)) == len(epoch)
            assert len({start % 16 for start in epoch}) <= 1
            if len(epoch) == EPOCH[name]:
                assert max(epoch) - min(epoch) == (len(epoch) - 1) * 16


@settings(max_examples=15)
@given(
    st.sampled_from(list(SIZES)),
    st.integers(1, 5),
    st.lists(st.integers(1, 5).map(float), min_size=2, max_size=2),
    st.integers(0, 2**40),
)
def test_the_order_of_a_source_does_not_depend_on_the_others(
    tiny, store, name, weight, others, seed
):
    names = [other for other in SIZES if other != name]
    mix = {name: float(weight)} | dict(zip(names, others, strict=True))
    mixed = open_mix(tiny, store, mix, data__batch=1, seed=seed)
    alone = Tokens(
        tiny(data__vocab=30_000, data__name=name, data__batch=1, seed=seed), store / name
    )
    number = list(SIZES).index(name)
    own = [start for source, start in windows_of(mixed, 90) if source == number]
    assert own == [start for _, start in windows_of(alone, len(own))]


def test_a_mix_of_one_source_is_that_source(tiny, store):
    alone = Tokens(tiny(data__vocab=30_000, data__name="odd"), store / "odd")
    mixed = open_mix(tiny, store, {"odd": 3.0})
    for step in range(12):
        assert torch.equal(alone.rows(step, 0, 4), mixed.rows(step, 0, 4))
    assert torch.equal(alone.held_out_batch(0, 5), mixed.held_out_batch(0, 5))


@settings(max_examples=20)
@given(st.integers(0, 5000), st.integers(0, 2**40), st.integers(0, 3))
def test_a_row_is_a_pure_function_of_seed_step_and_row(tiny, store, step, seed, row):
    mix = {"big": 5.0, "odd": 2.0, "small": 0.3}
    fresh, used = (open_mix(tiny, store, mix, seed=seed) for _ in range(2))
    used.rows(step + 3, 0, 4)
    assert torch.equal(fresh.rows(step, 0, 4)[row], used.rows(step, row, 1)[0])


def test_the_order_in_which_sources_are_written_says_nothing(tiny, store):
    one = open_mix(tiny, store, {"big": 2.0, "odd": 1.0})
    other = open_mix(tiny, store, {"odd": 1.0, "big": 2.0})
    assert torch.equal(one.rows(3, 0, 4), other.rows(3, 0, 4))


# ---- what is measured ----


def test_every_source_is_held_out_alike_and_told_apart(tiny, store):
    tokens = open_mix(tiny, store, {"big": 9.0, "odd": 1.0}, data__held_out=320)
    assert [len(source.held_out_starts) for source in tokens.sources] == [10, 10]

    def nats_of(block):
        return (block[:, 1:] % 7).float()

    scores = held_out_loss(nats_of, tokens, 4, torch.device("cpu")).scores
    table = np.load(store / "big" / "token_bytes.npy").astype(np.float64)
    bits, size, nats = {}, {}, 0.0
    for first, name in ((0, "big"), (10, "odd")):
        targets = tokens.held_out_batch(first, 10)[:, 1:].numpy()
        weight = table[targets]
        bits[name] = ((targets % 7) * (weight > 0)).sum() / np.log(2)
        size[name] = weight.sum()
        nats += (targets % 7).sum()
        assert scores[f"bits_per_byte/{name}"] == pytest.approx(bits[name] / size[name])
    assert scores["bits_per_byte"] == pytest.approx(sum(bits.values()) / sum(size.values()))
    assert scores["loss"] == pytest.approx(nats / 320)


# ---- the recipe ----


def test_the_digest_of_a_mix_names_its_sources_and_no_weight():
    digests = {"a": "1", "b": "2"}
    of = [
        digest_of_data(Data("x", mix=mix), digests.get)
        for mix in ({"a": 1.0, "b": 2.0}, {"b": 1.0, "a": 1.0}, {"a": 1.0})
    ]
    assert of[0] == of[1] != of[2]
    assert digest_of_data(Data("x", mix={"a": 1.0, "c": 1.0}), digests.get) is None
    assert digest_of_data(Data("a"), digests.get) == "1"


def test_without_a_mix_a_recipe_keeps_its_name_and_weights_rename_it(tiny):
    mixed = tiny(data__mix={"a": 1.0, "b": 2.0})
    other = assign(mixed, "data.mix.b", 3.0)
    assert len({run_id(recipe) for recipe in (tiny(), mixed, other)}) == 3
    emptied = dataclasses.replace(mixed, data=dataclasses.replace(mixed.data, mix={}))
    assert run_id(emptied) == run_id(tiny())
    assert parse(Recipe, plain(mixed), "") == mixed


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"a": -1.0}, "data.mix.*must be a mapping, each a number > 0"),
        ({"a": float("nan")}, "data.mix.*must be a mapping, each a number > 0"),
        ({"a": float("inf")}, "data.mix.*must be a mapping, each a number > 0"),
        ({"a": "much"}, "data.mix.*must be a mapping, each a number > 0"),
        ({"../a": 1.0}, r"data\.mix: '\.\./a' must be a plain folder name"),
    ],
)
def test_a_weight_or_a_name_that_cannot_be_is_refused(tiny, mix, said):
    with pytest.raises(UserError, match=said):
        check(tiny(data__mix=mix))


def test_so_is_one_that_is_set_alone(tiny):
    mixed = tiny(data__mix={"a": 1.0})
    with pytest.raises(UserError, match=r"data\.mix\.a=-1\.0 must be a finite number > 0"):
        check(assign(mixed, "data.mix.a", -1.0))
    with pytest.raises(UserError, match=r"data\.epochs=2 limits a mix, and data\.mix is empty"):
        check(tiny(data__epochs=2.0))


# ---- what cannot be mixed ----


def test_more_tokens_than_there_are_need_the_epochs_said(tiny, store):
    """12 steps of 4 rows of 16: half of 768 tokens are 384, and `small` has 19 windows, 304 tokens."""
    said = (
        r"asks for 384 tokens of small, which has 304: 1\.26 epochs; set data\.epochs=1\.3, "
        r"lower its weight, or budget\.tokens to 608"
    )
    with pytest.raises(UserError, match=said):
        open_mix(tiny, store, {"big": 1.0, "small": 1.0}, data__epochs=1.0)
    open_mix(tiny, store, {"big": 1.0, "small": 1.0}, data__epochs=1.3)
    open_mix(tiny, store, {"big": 1.0, "small": 1.0}, data__epochs=1.0, budget__tokens=608)


def test_sources_of_two_tokenizers_are_refused(tiny, write_token_folder, tmp_path):
    first = write_token_folder(tmp_path / "first")
    write_token_folder(tmp_path / "second", seed=1)
    recipe = tiny(data__mix={"first": 1.0, "second": 1.0})
    with pytest.raises(
        UserError, match="first and second were tokenized by different tokenizers"
    ):
        Tokens(recipe, tmp_path / "mixed")
    merges = {"model": {"merges": [["a", "b"]]}, "truncation": None}
    for name, told in (("first", merges), ("second", {"model": {"merges": [["b", "a"]]}})):
        write_token_folder(tmp_path / f"{name}_told", seed=len(name), like=first)
        (tmp_path / f"{name}_told" / "tokenizer.json").write_text(json.dumps(told))
    recipe = tiny(data__mix={"first_told": 1.0, "second_told": 1.0})
    with pytest.raises(UserError, match="different tokenizers"):
        Tokens(recipe, tmp_path / "mixed")
    (tmp_path / "second_told" / "tokenizer.json").write_text(json.dumps(merges, indent=3))
    Tokens(recipe, tmp_path / "mixed")


def test_a_source_under_two_names_is_refused(tiny, store, write_token_folder, tmp_path):
    write_token_folder(tmp_path / "first")
    write_token_folder(tmp_path / "again")
    recipe = tiny(data__mix={"first": 1.0, "again": 1.0})
    with pytest.raises(UserError, match="again and first hold the same tokens"):
        Tokens(recipe, tmp_path / "mixed")


def test_a_source_that_is_missing_or_changed_is_named(tiny, store):
    with pytest.raises(UserError, match="no token folder .*/none; fill it"):
        open_mix(tiny, store, {"big": 1.0, "none": 1.0})
    with pytest.raises(UserError, match="sources big, odd hold data .* the recipe names 0bad"):
        open_mix(tiny, store, {"big": 1.0, "odd": 1.0}, data__digest="0bad")
