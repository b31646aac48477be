"""How `Runtime.compile` divides a model into graphs, and that dividing changes nothing.

Compiled by a backend that only counts.
"""

from functools import partial
from importlib import import_module
from types import MethodType

import pytest
import torch

from ablab.core.model.objective import heads_of
from ablab.core.runtime.compilation import compiled
from ablab.core.runtime.runtime import Runtime, repeat_bits
from ablab.core.train.trainer import Trainer

FULL = [
    "qk_norm",
    "gating",
    "value_residual",
    "ln_scaling",
    "mup",
    "muon",
    "normuon",
    "cautious_wd",
    "z_loss",
    "soft_cap",
]


@pytest.fixture
def graphs(monkeypatch):
    """Every graph compiled since."""
    made, real = [], torch.compile

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **more: real(function, **{"backend": count} | more)
    )
    yield made
    torch.compiler.reset()


def trained(recipe, folder, compile, steps=3):
    trainer = Trainer(recipe, Runtime(device="cpu", compile=compile), folder)
    norms = [trainer.advance().item() for _ in range(steps)]
    return norms, trainer.close_window(), trainer.evaluate(), trainer.digest()


@pytest.mark.parametrize("treatment", [[], FULL], ids=["base", "full"])
@pytest.mark.parametrize("compile", [True, "blocks"])
def test_a_compiled_run_is_the_eager_run(tiny, token_folder, graphs, treatment, compile):
    recipe = tiny(treatment)
    eager = trained(recipe, token_folder, False)
    assert not graphs and trained(recipe, token_folder, compile) == eager and graphs


def test_equal_blocks_share_a_graph_though_their_numbers_differ(tiny, token_folder, graphs):
    """LayerNorm scaling has another factor in each layer; value residual mixes the first values into the others."""
    counts = []
    for layers in (4, 9):
        torch.compiler.reset()
        graphs.clear()
        trained(tiny(FULL, model__layers=layers), token_folder, "blocks", steps=2)
        counts.append(len(graphs))
    assert counts[0] == counts[1] <= 12


def test_one_graph_of_the_whole_model_has_no_others_beside_it(tiny, token_folder, graphs):
    trained(tiny(FULL), token_folder, True, steps=2)
    assert len(graphs) == 3  # the loss, the optimizer step, the held-out loss


def test_what_hooks_do_around_a_block_stays_outside_its_graph(tiny, build, monkeypatch):
    """As gathering its weights does (core/train/fully_sharded.py)."""
    recipe = tiny()
    model = build(recipe)
    within = []

    def seen(function, **how):
        def call(*given):
            within.append("graph")
            found = function(*given)
            within.append("end")
            return found

        return call

    monkeypatch.setattr(torch, "compile", seen)
    compiled(model, heads_of(model), "blocks", hooked=True)
    model.blocks[0].register_forward_pre_hook(lambda *given: within.append("before"))
    model.blocks[0].register_forward_hook(lambda *given: within.append("behind"))
    model.blocks[0](torch.zeros(1, 4, 32), {})
    assert within == ["before", "graph", "end", "behind"]


@pytest.fixture
def algorithms():
    """As they were, afterwards."""
    asked = torch.are_deterministic_algorithms_enabled()
    yield
    repeat_bits(asked)


def test_where_bits_shall_repeat_the_compiler_decides_by_rule_and_not_by_the_clock(algorithms):
    for asked in (True, False, True):
        repeat_bits(asked)
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert import_module("torch._inductor.config").deterministic == asked


def test_what_a_plan_chooses_is_never_a_bound_method(tiny, build):
    """torch 2.11 guards none: a graph traced through one would serve a module that holds a kernel in its place."""
    model = build(tiny(FULL))
    held = [value for module in model.modules() for value in vars(module).values()]
    assert [value for value in held if isinstance(value, partial)]
    assert not [value for value in held if isinstance(value, MethodType)]
