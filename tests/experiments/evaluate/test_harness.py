"""Our scores of a model are lm-evaluation-harness's own scores of it, item by item."""

import json
from importlib.util import find_spec

import pytest

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.evaluate.evaluating import evaluate
from ablab.experiments.evaluate.subjects import How, subject_of

needs_lm_eval = pytest.mark.skipif(
    not find_spec("lm_eval"), reason="needs lm-evaluation-harness: pip install 'ablab[eval]'"
)
CHOICES = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{query}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WORDS = "a cat and the dogs ran after all of them until both were tired"
# Each text has an end of its own: rows that are alike but for their last token, and are scored from different ones
# on, the harness (0.4.13) mixes up: item 5 alone has -350.51, beside the others -359.68.
ITEMS = [
    {
        "query": " ".join([*WORDS.split()[i : i + 1 + 3 * i], f"{i}."]),
        "choices": ["a cat", "dogs", "the  dog ran"],
        "gold": i % 3,
    }
    for i in range(8)
]


@pytest.fixture
def include(tmp_path):
    folder = tmp_path / "yaml"
    folder.mkdir()
    data = folder / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, ITEMS)))
    (folder / "mine.yaml").write_text(CHOICES.format(path=data))
    (folder / "texts.yaml").write_text(ROLLING.format(path=data))
    return folder


@pytest.fixture
def llama(tmp_path):
    """A random Llama with a tokenizer that puts a BOS before every text, as Llama's does."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(letters, 2)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )
    words.save_pretrained(folder)
    return folder


@needs_lm_eval
def test_scores_are_the_harness_own_item_by_item(tmp_path, include, llama, monkeypatch):
    """Some prompts are longer than the model's context of 32 letters."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from ablab.experiments.evaluate import harness

    manager = TaskManager(include_path=str(include), include_defaults=False)
    theirs = simple_evaluate(
        HFLM(pretrained=str(llama), device="cpu", batch_size=3),
        tasks=["mine", "texts"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    subject = subject_of(str(llama), Store(tmp_path / "store"))
    ours = {}
    for name in ("mine", "texts"):
        exam = harness.exam(name, None, include)
        found = evaluate(subject, exam, How("cpu", batch=2), ["cpu"])
        ours |= {part.name: part for part in found.parts}
    for metric in ("acc", "acc_norm"):
        samples = sorted(theirs["samples"]["mine"], key=lambda one: one["doc_id"])
        assert ours[metric].values == [one[metric] for one in samples]
        assert ours[metric].score == theirs["results"]["mine"][f"{metric},none"]
        assert 0 < ours[metric].score < 1
    bits = theirs["results"]["texts"]["bits_per_byte,none"]
    assert ours["bits_per_byte"].score == pytest.approx(bits, rel=1e-5)


PAIRS = """\
task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@needs_lm_eval
def test_blimp_is_asked_as_the_harness_asks_it(tmp_path, include, llama, monkeypatch):
    """Its own template, lm_eval/tasks/blimp/_template_yaml, on a file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from ablab.experiments.evaluate import blimp, harness

    pairs = tmp_path / "pairs"
    pairs.mkdir()
    words = WORDS.split()
    lines = [
        {
            "sentence_good": " ".join(words[i : i + 4]),
            "sentence_bad": " ".join(words[i + 1 : i + 5]),
        }
        for i in range(9)
    ]
    (pairs / "order.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (include / "pairs.yaml").write_text(PAIRS.format(path=pairs / "order.jsonl"))
    subject = subject_of(str(llama), Store(tmp_path / "store"))
    found = []
    for exam in (blimp.exam(pairs), harness.exam("pairs", None, include)):
        (part,) = evaluate(subject, exam, How("cpu"), ["cpu"]).parts
        found.append(part.values)
    assert found[0] == found[1]
    assert len(set(found[0])) == 2


@needs_lm_eval
def test_what_the_harness_cannot_ask_is_refused_in_a_line(tmp_path, include):
    from ablab.experiments.evaluate import harness

    with pytest.raises(UserError, match="--include-path .* is no folder"):
        harness.exam("mine", None, tmp_path / "none")
    generates = CHOICES.replace("multiple_choice", "generate_until").replace("mine", "writes")
    generates = (
        generates.partition("metric_list")[0] + "metric_list: [{{metric: exact_match}}]\n"
    )
    (include / "writes.yaml").write_text(generates.format(path=include / "items.jsonl"))
    with pytest.raises(UserError, match="lets the model write"):
        harness.exam("writes", None, include)
    (include / "items.jsonl").unlink()
    with pytest.raises(UserError, match="cannot load mine: .*--include-path DIR"):
        harness.exam("mine", None, include)


@pytest.mark.skipif(bool(find_spec("lm_eval")), reason="lm-evaluation-harness is installed")
def test_without_the_harness_its_extra_is_named(include):
    from ablab.experiments.evaluate import harness

    with pytest.raises(UserError, match=r"pip install 'ablab\[eval\]'"):
        harness.exam("mine", None, include)
