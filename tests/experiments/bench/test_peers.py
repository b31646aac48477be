"""`ablab bench peers`: who is timed, in which company, and that its ratios are those of the rates beside them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime, settle
from ablab.experiments.bench import peers
from ablab.experiments.bench.nanochat import Nanochat, shape_of
from ablab.experiments.bench.peers import Asked, Seen, bench_peers, joined
from ablab.experiments.bench.phases import Marks
from ablab.experiments.bench.step import NoRoom, Timed

# The interface of nanochat's gpt.py, as far as it is used: built on the meta device, which holds no values.
GPT = """
import logging
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from nanochat.optim import MuonAdamW

logging.basicConfig(level=logging.INFO)
print("a banner")

@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_weights(self):
        for value in self.parameters():
            nn.init.normal_(value)

    def setup_optimizer(self):
        print("a learning rate")
        return MuonAdamW(self.parameters(), lr=0.1)

    def forward(self, idx, targets=None):
        assert idx.shape[1] == self.config.sequence_len
        return F.cross_entropy(self.lm_head(self.wte(idx)).flatten(0, 1), targets.flatten())
"""
OPTIM = "from torch.optim import SGD as MuonAdamW\n"
COUNTS = ("--steps", "2", "--windows", "2", "--warm-up", "1")
WIDE = "model.width=32"  # its smear gate reads 24 channels
NAMES = ["ablab", "ablab + fp8", "Hugging Face Llama", "nanochat"]


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "nano" / "nanochat"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "gpt.py").write_text(GPT)
    (package / "optim.py").write_text(OPTIM)
    return package.parent


def test_each_is_timed_beside_every_other(lab, ablab, checkout):
    pytest.importorskip("transformers")
    given = ("--nanochat", str(checkout), *COUNTS, "--out", "peers.json")
    ended = ablab("bench", "peers", lab.sheet("near"), WIDE, "with.fp8.gradient=e4m3", *given)
    assert ended.code == 0, ended.err
    told = json.loads((lab.root / "peers.json").read_text())
    assert [one["name"] for one in told["subjects"]] == NAMES
    rates = {one["name"]: one["tokens_per_second"] for one in told["subjects"]}
    for one in told["subjects"]:
        assert len(one["windows_ms"]) == 2
        assert one["tokens_per_step"] == 64
        for other in NAMES:
            ratio = told["ratios"][one["name"]][other]
            assert ratio == pytest.approx(rates[one["name"]] / rates[other])
            assert f"{ratio:.3f}" in ended.out
        assert f"{one['tokens_per_second']:,.0f}" in ended.out
    assert "a banner" not in ended.out


def test_a_process_each_is_told_the_same_and_each_is_visited_twice(
    lab, monkeypatch, checkout, capsys
):
    """The refusal of memory is made up; the visits are those of the processes, in this one."""
    pytest.importorskip("transformers")
    sheet = str(lab.root / lab.sheet("far"))
    asked = Asked(sheet, {"model.width": 32}, checkout, steps=1, windows=3, warm_up=0)
    together = peers.benches_in_turn
    visited = []

    def full(subjects, counts, device):
        if len(subjects) > 1:
            raise NoRoom("nanochat: out of memory")
        visited.append((subjects[0].name, counts.windows))
        return together(subjects, counts, device)

    monkeypatch.setattr(peers, "benches_in_turn", full)
    monkeypatch.setattr(peers, "_visited", peers.visit)
    found = bench_peers(asked)
    assert visited == [(name, 2) for name in (*NAMES, *reversed(NAMES))]
    assert [one["name"] for one in found["subjects"]] == NAMES
    assert found["windows"] == 4
    assert "out of memory; each is timed in a process of its own" in capsys.readouterr().err


def test_of_two_visits_all_windows_count():
    """4, 2 and 1, 3 ms: the median is 2.5, so 100 tokens are 40,000 a second; products reach 700 and 900 TFLOP/s."""

    def visit(windows, tflops):
        machine = {"matmul_tflops": tflops, "windows": 2, "device": "H100"}
        timed = Timed(
            "ablab", windows_ms=windows, tokens_per_step=100, flops_per_token=1_000_000_000
        )
        return Seen([timed], machine)

    seen = joined([visit([4.0, 2.0], 700.0)], [visit([1.0, 3.0], 900.0)], "cuda")
    (one,) = seen.timed
    assert one.windows_ms == pytest.approx([4, 2, 1, 3])
    assert one.tokens_per_second == pytest.approx(40_000)
    assert one.mfu == pytest.approx(40e12 / 989e12)
    assert one.mfu_measured == pytest.approx(40e12 / 800e12)
    assert seen.machine == {"matmul_tflops": 800.0, "windows": 4, "device": "H100"}


def test_nanochat_has_the_recipes_shape_and_takes_the_mean_gradient(
    tiny, token_folder, checkout
):
    recipe = tiny(model__width=32)
    shape = shape_of(recipe)
    assert shape["n_embd"] == recipe.model.width
    assert (shape["n_layer"], shape["n_head"]) == (recipe.model.layers, recipe.model.heads)
    assert shape["n_kv_head"] == recipe.model.kv_heads
    handlers = [*logging.getLogger().handlers]
    weights = []
    for rows in (4, 2):
        settled = settle(Runtime(device="cpu", micro_batch=rows), rows=4)
        peer = Nanochat(recipe, settled, token_folder, Marks(), checkout)
        peer.step()
        values = [value.detach().flatten() for value in peer.model.parameters()]
        weights.append(torch.cat(values))
        readout = recipe.model.width * recipe.data.vocab
        attention = recipe.data.context * recipe.model.layers * recipe.model.width
        assert peer.flops_per_token == 6 * (readout + attention)
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("model", [{"width": 16}, {"width": 32, "heads": 2}])
def test_a_shape_that_it_cannot_have_is_refused(model):
    """Heads of 8 channels that do not make up the width; too few channels for its smear gate."""
    heads = model.get("heads", 2)
    recipe = SimpleNamespace(
        model=SimpleNamespace(
            width=model["width"], heads=heads, attention=SimpleNamespace(head_dim=8)
        )
    )
    with pytest.raises(UserError, match=rf"model\.width={model['width']} has 2 heads of 8"):
        shape_of(recipe)


def spoiled(checkout: Path, text: str) -> Path:
    (checkout / "nanochat" / "gpt.py").write_text(text)
    return checkout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no nanochat/gpt.py; name the folder of a checkout"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("class GPT: pass", "cannot be used as nanochat at 92d63d4: AttributeError"),
        (GPT.replace("n_kv_head", "groups"), "TypeError"),
    ],
)
def test_a_folder_that_is_no_checkout_is_refused_in_a_line(
    tiny, token_folder, checkout, text, said
):
    folder = spoiled(checkout, text) if text else checkout / "nanochat"
    settled = settle(Runtime(device="cpu"), rows=4)
    with pytest.raises(UserError) as refusal:
        Nanochat(tiny(model__width=32), settled, token_folder, Marks(), folder)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 300 + len(str(folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["with.fp8.wher=both"], "Did you mean"),
        (["--nanochat", "nowhere"], "--nanochat nowhere: there is no nanochat/gpt.py"),
    ],
)
def test_a_mistake_is_one_line(lab, ablab, words, said):
    ended = ablab("bench", "peers", lab.sheet("near"), WIDE, *words, *COUNTS)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
