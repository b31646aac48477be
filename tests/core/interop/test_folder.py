"""A weights folder holds a model whole, is found by path or by the id of a run, and says in a line what it lacks."""

import json

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.interop.folder import Source, found, recipe_of, source_of, tokenizer_of
from ablab.core.interop.weights import built, load, take_over, write
from ablab.core.model import transformer
from ablab.core.recipe.recipe import run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.store import Store
from ablab.core.train.run import run


def test_what_is_written_is_read_again_bit_for_bit(tiny, kept, batch):
    recipe = tiny(["qk_norm", "multi_token"])
    model, folder = kept(recipe)
    again = built(load(folder))
    rows = batch(recipe)[:, :-1]
    assert torch.equal(again(rows), model(rows))
    assert load(folder).recipe == recipe


def test_before_a_model_is_built_the_one_before_it_goes(tiny, kept, held):
    _, folder = kept(tiny())
    blocks = held(transformer, "Block")
    for _ in range(3):
        built(load(folder))
    assert len(blocks) == tiny().model.layers


def test_the_folder_of_a_run_that_kept_its_weights_is_one(tiny, token_folder, tmp_path):
    store = Store(tmp_path)
    recipe = tiny(["gating"])
    record = store.run(run_id(recipe))
    result = run(recipe, Runtime(device="cpu", keep_weights=True), token_folder, record)
    folder = found(run_id(recipe)[:6], store)
    assert folder == record.folder
    names = [name for name, _ in built(load(folder)).named_parameters()]
    from ablab.core.interop.weights import digest_of

    weights = load(folder)
    assert digest_of(recipe, weights.tensors) == result.weights
    assert names and source_of(folder) == Source()
    assert tokenizer_of(folder, recipe, store) is None


def test_a_run_without_weights_and_one_that_goes_on_say_what_to_do(
    tiny, token_folder, tmp_path, refused
):
    store = Store(tmp_path)
    recipe = tiny()
    record = store.run(run_id(recipe))
    record.begin("data: {name: tiny}\n", {})
    refused(lambda: found(run_id(recipe), store), "has not ended")
    run(recipe, Runtime(device="cpu"), token_folder, record)
    refused(lambda: found(run_id(recipe), store), "kept no weights", "keep_weights=true")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonsense", ["is not the id of one of 2 runs", "name a weights folder"]),
        ("abcd", ["begins 2 runs (abcd1, abcd2)"]),
        ("abc", ["is not the id of one of 2 runs"]),
    ],
)
def test_a_name_that_is_no_model_is_refused(tmp_path, refused, name, words):
    for run_folder in ("abcd1", "abcd2"):
        (tmp_path / "runs" / run_folder).mkdir(parents=True)
    refused(lambda: found(name, Store(tmp_path)), *words)


def test_a_folder_of_the_other_side_is_told_to_be_imported(tmp_path, refused):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    refused(
        lambda: found(str(tmp_path / "theirs"), Store(tmp_path)),
        "holds no recipe.yaml; import it first: ablab import-hf",
    )


def test_tensors_that_are_not_the_recipes_are_named(tiny, kept, tmp_path, refused):
    recipe = tiny()
    model, folder = kept(recipe)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    new = tmp_path / "new"

    def leave(changed):
        return lambda: write(new, recipe, changed, Source())

    lacking = {name: value for name, value in tensors.items() if name != "norm.gain"}
    refused(leave(lacking), "lacks norm.gain of shape [32]")
    refused(leave(tensors | {"more": torch.ones(1)}), "holds more, for which")
    short = tensors | {"norm.gain": torch.ones(31)}
    refused(leave(short), "norm.gain of shape [31]", "asks for [32]")
    (folder / "weights.safetensors").write_bytes(b"torn")
    refused(lambda: load(folder), "cannot read", "weights.safetensors")
    (folder / "source.json").write_text("{")
    refused(lambda: source_of(folder), "source.json")
    (folder / "recipe.yaml").write_text("{data: {name: tiny}, model: {wdth: 3}}")
    refused(lambda: recipe_of(folder), "recipe.yaml: ", "unknown key 'model.wdth'")


def test_a_model_of_another_shape_takes_nothing_over(tiny, kept, build, refused):
    _, folder = kept(tiny())
    other = build(tiny(["gating"]))
    before = other.embedding.table.clone()
    refused(lambda: take_over(other, load(folder)), "lacks blocks.0.attention.on_heads.gating")
    assert torch.equal(other.embedding.table, before)


def test_a_folder_that_exists_is_left_as_it_is(tiny, kept, refused):
    recipe = tiny()
    model, folder = kept(recipe)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    refused(lambda: write(folder, recipe, tensors, Source()), "exists already")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tiny, kept, tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    vocabulary = {f"w{i}": i for i in range(65)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(path))  # noqa: S106 (no password)
    with pytest.raises(UserError, match="has 65 ids, but the model has 64"):
        kept(tiny(), tokenizer=path)
    path.write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        kept(tiny(), tokenizer=path)


def test_the_tokenizer_of_a_mix_is_that_of_its_sources(
    tiny, tmp_path, write_token_folder, refused
):
    from dataclasses import replace

    store = Store(tmp_path)
    recipe = tiny()
    mixed = replace(recipe, data=replace(recipe.data, name="both", mix={"one": 2, "two": 1}))
    run_folder = tmp_path / "runs" / "abcd"
    for number, name in enumerate(("one", "two")):
        assert tokenizer_of(run_folder, mixed, store) is None
        tokens = write_token_folder(tmp_path / "data" / name, seed=number)
        (tokens / "tokenizer.json").write_text("{}")
    first = tmp_path / "data" / "one" / "tokenizer.json"
    assert tokenizer_of(run_folder, mixed, store) == first
    other = replace(mixed, data=replace(mixed.data, digest="0" * 16))
    refused(lambda: tokenizer_of(run_folder, other, store), "was trained on 0000000000000000")
