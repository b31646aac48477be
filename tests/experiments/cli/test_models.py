"""From a run to a folder that others load, and back; and texts that come as they are drawn."""

import json

import pytest
import torch

from ablab.core.data import corpus
from ablab.core.interop.folder import tokenizer_of
from ablab.core.interop.score import AblabScorer, Row, TransformersScorer
from ablab.core.interop.weights import built, load
from ablab.core.recipe.recipe import run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.store import Store
from ablab.core.train.run import run

TEXT = "The cat sat on the mat, and the dog ran after the cat until both were tired. "
VOCAB = 280
REPORT = """\
# tales

## Verdicts

| arm | what it says | OFF means |
| --- | --- | --- |
| `base` | base is worse: +0.2 against full | nothing |
| `- gating` | gating: inconclusive, without it +0.01 | unscaled |

## Numbers

| `base` | 3 | 2.0 |
"""

pytestmark = pytest.mark.usefixtures("own_module_cache")


@pytest.fixture(scope="module")
def trained(lab, tiny):
    """A run on words in the lab's store, with its weights; its id."""
    from ablab.core.recipe.edit import edit, put

    (lab.root / "text.txt").write_text(TEXT * 40)
    tokenizer = lab.root / "tokenizer.json"
    corpus.train_tokenizer([lab.root / "text.txt"], tokenizer, VOCAB)
    folder = lab.store / "data" / "words"
    (lab.root / "val.txt").write_text(TEXT * 8)
    meta = corpus.tokenize([lab.root / "text.txt"], [lab.root / "val.txt"], tokenizer, folder)
    imu1 = [{"qk_norm": {"gain": "scalar"}}, "gating", "value_residual", "z_loss"]
    recipe = tiny(imu1, data__vocab=VOCAB, data__context=32)
    recipe = edit(recipe, "data.name", put("words"))
    recipe = edit(recipe, "data.digest", put(meta.digest))
    id = run_id(recipe)
    store = Store(lab.store)
    run(recipe, Runtime(device="cpu", keep_weights=True), folder, store.run(id))
    return id


@pytest.fixture(scope="module")
def reported(lab, trained):
    """An experiment whose plan holds the run, and its report."""
    store = Store(lab.store)
    rows = [Planned("- gating", 0, 0, trained), Planned("base", 0, 0, "0" * 16)]
    store.write_plan(GridPlan("tales", "q", "val/loss", "lower", "add_one", rows))
    (lab.store / "reports" / "tales").mkdir(parents=True)
    (lab.store / "reports" / "tales" / "report.md").write_text(REPORT)


def test_a_run_becomes_a_folder_that_transformers_loads(lab, ablab, trained, reported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = ablab("export-hf", trained[:8], "--out", "exported", "--json").json
    assert told["architecture"] == "AblabForCausalLM"
    assert any("z_loss" in note for note in told["notes"])
    out = lab.root / "exported"
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    batch = tokenizer(["The cat", "The dog ran after"], return_tensors="pt", padding=True)
    assert (
        batch["attention_mask"][0].tolist()[0] == 0
    )  # padded on the left, as generate wants it
    texts = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(texts[1], skip_special_tokens=True).startswith("The dog ran after")
    ours = built(load(lab.run_folder(trained)))
    rows = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(rows).logits, ours(rows), rtol=1e-5, atol=1e-5)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0


def test_the_card_says_whence_and_what_was_found(lab, ablab, trained, reported):
    ablab("export-hf", trained, "--out", "with_card")
    card = (lab.root / "with_card" / "README.md").read_text()
    result = json.loads((lab.run_folder(trained) / "result.json").read_text())
    recipe = load(lab.run_folder(trained)).recipe
    for word in (trained, recipe.data.digest, result["code"], result["weights"], "val/loss"):
        assert word in card
    assert f"{result['metrics']['val/loss']:.6g}" in card
    assert "- `- gating` of tales:\n  - gating: inconclusive, without it +0.01" in card
    assert "base is worse" not in card
    assert "ARCHITECTURE" not in card and "NOTES" not in card


def greedy(lab, trained, prompt: str, count: int) -> str:
    """What the model would write, by one forward a token."""
    from tokenizers import Tokenizer

    folder = lab.run_folder(trained)
    weights = load(folder)
    model = built(weights)
    path = tokenizer_of(folder, weights.recipe, Store(lab.store))
    tokenizer = Tokenizer.from_file(str(path))
    row = tokenizer.encode(prompt).ids
    start = len(row)
    for _ in range(count):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    # a character that is cut off at the end is left out
    return tokenizer.decode(row[start:]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_text_goes_on_as_the_model_would_write_it(lab, ablab, trained):
    words = ("generate", trained, "--max-tokens", "12", "--temperature", "0")
    said = ablab(*words, "--prompt", "The cat")
    assert said.code == 0, said
    assert said.out == f"The cat{greedy(lab, trained, 'The cat', 12)}\n"
    assert "12 tokens in" in said.err and "tokens/s" in said.err


def test_several_prompts_are_a_batch_and_each_draws_as_if_alone(lab, ablab, trained):
    words = ("generate", trained, "--max-tokens", "9", "--json", "--top-p", "0.9")
    prompts = ["The cat", "", "the dog ran after the"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    texts = ablab(*words, *asked, "--seed", "3").json["texts"]
    assert [text["prompt"] for text in texts] == prompts
    for i, text in enumerate(texts):
        alone = ablab(*words, "--prompt", prompts[i], "--seed", str(3 + i)).json["texts"][0]
        assert alone == text
    assert {text["tokens"] for text in texts} <= set(range(1, 10))
    lines = ablab("generate", trained, *asked, "--max-tokens", "3").out
    assert all(f"--- {i}\n" in lines for i in (1, 2, 3))


def test_an_exported_folder_comes_back_and_speaks_the_same(lab, ablab, trained):
    ablab("export-hf", trained, "--out", "there")
    told = ablab("import-hf", "there", "--out", "back")
    assert told.code == 0 and "parameters, width 32, 3 layers, 4 heads" in told.out
    words = ("--prompt", "The cat", "--temperature", "0", "--max-tokens", "8")
    assert ablab("generate", "back", *words).out == ablab("generate", trained, *words).out
    ablab("export-hf", "back", "--out", "there_again")
    first, second = (lab.root / name / "model.safetensors" for name in ("there", "there_again"))
    assert first.read_bytes() == second.read_bytes()


def test_both_scorers_read_the_same_words_and_find_them_as_likely(lab, ablab, trained):
    ablab("export-hf", trained, "--out", "scored")
    ours = AblabScorer.of(lab.run_folder(trained), Store(lab.store), batch=2)
    theirs = TransformersScorer.of(str(lab.root / "scored"), trust_remote_code=True)
    assert (ours.context, ours.first) == (theirs.context, theirs.first) == (32, 0)
    rows = []
    for given, scored in (("The cat", " sat on the mat"), ("the dog", " ran"), ("a", "")):
        ids = [ours.ids(given), ours.ids(scored)]
        assert ids == [theirs.ids(given), theirs.ids(scored)]
        rows.append(Row(*map(tuple, ids)))
    for one, other in zip(ours.scores(rows), theirs.scores(rows), strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-4)
        assert one.likeliest == other.likeliest


@pytest.fixture(scope="module")
def small_llama(lab):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": VOCAB}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=32, eos_token_id=5)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(lab.root / "llama")
    return "llama"


def test_a_small_model_grows_and_says_how_far_its_function_moved(lab, ablab, small_llama):
    how = ("--width", "48", "--n-heads", "6", "--n-kv-heads", "2")
    kept = ablab("convert", "smollm2", small_llama, *how, "--mode", "preserve", "--out", "wide")
    assert kept.code == 0, kept
    assert "the function is preserved: logits on random tokens differ by" in kept.out
    moved = ("--mode", "preserve", "--with", "{qk_norm: {gain: scalar}}", "--out", "normed")
    assert "NOT preserved" in ablab("convert", "smollm2", small_llama, *how, *moved).out
    weights = load(lab.root / "wide")
    assert weights.recipe.model.width == 48
    assert "mode preserve" in weights.source.done[0]
    ablab("export-hf", "wide", "--out", "wide_exported")
    config = json.loads((lab.root / "wide_exported" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == 5


REFUSED = {
    "export-hf nobody --out new": ["'nobody' is not the id of one of"],
    "export-hf RUN --out taken": ["taken exists already; nothing was written"],
    "export-hf RUN --out new --tokenizer absent.json": [
        "cannot read the tokenizer absent.json"
    ],
    "export-hf llama --out new": ["holds no recipe.yaml; import it first"],
    "import-hf nowhere --out new": ["nowhere holds no config.json"],
    "import-hf llama --out taken": ["taken exists already"],
    "import-hf llama --out new --context 64": ["exceeds the 32 tokens"],
    "import-hf text.txt --out new": ["cannot read text.txt"],
    "generate llama --prompt a": ["import it first: ablab import-hf"],
    "generate RUN --prompt a --max-tokens 99": ["tokens exceed the model's context of 32"],
    "generate RUN --prompt a --top-k 0": ["--top-k"],
    "generate RUN --prompt a --device cuda": ["torch sees no GPU here"],
    "convert smollm2 llama --width 16 --out new": ["width=16 is less than the 24"],
    "convert smollm2 llama --width 48 --out new --with qk_nrm": ["'qk_nrm'", "qk_norm"],
    "convert smollm2 llama --width 48 --out new --with {": ["is not YAML"],
    "convert smollm2 llama --width 48 --out taken": ["taken exists already"],
    "convert smollm2 llama --width 48 --out new --mode twice": ["--mode"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_request_that_cannot_be_met_is_one_line_and_writes_nothing(
    lab, ablab, trained, small_llama, words
):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (lab.root / "taken").mkdir(exist_ok=True)
    before = lab.files(), sorted(lab.root.iterdir()), list((lab.root / "taken").iterdir())
    ended = ablab(*words.replace("RUN", trained).split(" "))
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    for word in REFUSED[words]:
        assert word in ended.err
    assert (
        lab.files(),
        sorted(lab.root.iterdir()),
        list((lab.root / "taken").iterdir()),
    ) == before


def test_a_model_without_words_asks_for_them(lab, ablab, small_llama, trained):
    ablab("import-hf", small_llama, "--out", "mute")
    ended = ablab("generate", "mute", "--prompt", "a")
    assert ended.code == 2 and "name one with --tokenizer FILE" in ended.err
    said = ablab(
        "generate",
        "mute",
        "--prompt",
        "a",
        "--max-tokens",
        "3",
        "--tokenizer",
        "tokenizer.json",
    )
    assert said.code == 0, said
