"""What every test may ask for: a recipe of a few thousand parameters, its model, a batch, and a folder of tokens.

`tiny`, `build` and `batch` are fixtures that hold functions, session-wide, so that hypothesis may use them too.
"""

import gc
import json
import os
import weakref
from importlib.util import find_spec

from ablab.core.runtime.runtime import visible_gpus

# Before torch: the order of sums, and so the bits, depends on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not visible_gpus():
    # Before triton: without a GPU its kernels run in the CPU interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from hypothesis import settings

from ablab.ablations.registry import discover
from ablab.core.data.contents import digest_of

VOCAB, SPECIAL = 64, 0
discover()
# --hypothesis-profile=fresh draws other examples in each run, `repeatable` the same ones until a test changes;
# `thorough` draws more of them.
settings.register_profile("fresh", deadline=None)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def lean_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_INTERPRET" in os.environ and find_spec("triton"):
            from tests.interpreted import do_nothing_in_vain

            do_nothing_in_vain(patch)
        yield


@pytest.fixture(scope="session")
def warmed():
    """What commands are forked from, in tests that start many."""
    from tests.experiments.warmed import Warmed

    held = Warmed()
    yield held
    held.stop()


@pytest.fixture(scope="session")
def tiny():
    return tiny_recipe


@pytest.fixture(scope="session")
def build():
    return build_model


@pytest.fixture(scope="session")
def batch():
    return make_batch


@pytest.fixture(scope="session")
def drive():
    return drive_parameters


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory):
    """1,000 training tokens with nothing to learn but frequencies; id 0 is special and has no bytes.

    Read-only by agreement.
    """
    return write_tokens(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def write_token_folder():
    return write_tokens


@pytest.fixture
def held(monkeypatch):
    """module, name of a class there -> its objects that are in memory.  Nothing looks for garbage by itself."""
    gc.disable()

    def objects(module, name: str) -> weakref.WeakSet:
        made = getattr(module, name)
        found = weakref.WeakSet()

        def noting(*given, **named):
            one = made(*given, **named)
            found.add(one)
            return one

        monkeypatch.setattr(module, name, noting)
        return found

    yield objects
    gc.enable()


@pytest.fixture(scope="session")
def refusals():
    """recipe, dtype -> what the kernels that it concerns have against it, those of a library that need not be there
    excepted."""
    from ablab.core.fusion.places import KERNELS, OPTIONAL, concerns, flaw

    def of(recipe, dtype: str) -> set[str]:
        own = [place for place in KERNELS if place not in OPTIONAL]
        said = {flaw(place, recipe, dtype) for place in own if concerns(place, recipe)}
        return said - {""}

    return of


def tiny_recipe(treatment=(), **paths):
    """Width 32, 3 layers, 4 heads of 8, vocabulary 64, 12 steps of 4 rows of 16 tokens, 3 of them warm-up.

    tiny(["qk_norm", {"gating": {"per": "head"}}], optim__lr=0.01): base paths with `__` for `.`, then the treatment.
    """
    from ablab.core.parts.schedule import Cosine
    from ablab.core.recipe.intervention import resolve, treatment_of
    from ablab.core.recipe.load import assign
    from ablab.core.recipe.recipe import Attention, Budget, Data, Model, Recipe

    recipe = Recipe(
        data=Data("tiny", vocab=VOCAB, context=16, batch=4, held_out=320),
        model=Model(width=32, layers=3, attention=Attention(head_dim=8)),
        schedule=Cosine(warmup_steps=3),
        budget=Budget(tokens=12 * 64),
    )
    for path, value in paths.items():
        recipe = assign(recipe, path.replace("__", "."), value)
    return resolve(recipe, treatment_of(treatment))


def build_model(recipe, dtype=None, stirred=0.0, **more):
    """The recipe's Transformer with its initial weights.  dtype: of activations; default fp32.

    stirred: std of noise added to every parameter, so that nothing sits at a special start such as 0 or 1.
    """
    import torch

    from ablab.core.model.init import initialise
    from ablab.core.model.transformer import Transformer

    model = Transformer(recipe, dtype or torch.float32, **more)
    initialise(model, recipe)
    draw = torch.Generator().manual_seed(7)
    for value in model.parameters() if stirred else ():
        value.data += stirred * torch.randn(value.shape, generator=draw)
    return model


def drive_parameters(recipe, start, gradients, device="cpu", **how):
    """Move free-standing parameters by the recipe's chains.

    start: name -> (Param, first value); gradients: for each step, name -> gradient; how: as Optimizer takes it.
    Returns the weights before and after each step, name -> tensor, and the optimizer.
    """
    import torch

    from ablab.core.model.layers import parameter
    from ablab.core.train.banks import Optimizer

    model = torch.nn.Module()
    for name, (declared, value) in start.items():
        model.register_parameter(name, parameter(declared))
        getattr(model, name).data.copy_(value)
    optimizer = Optimizer(model.to(device), recipe, **how)
    seen = [weights_of(model)]
    for t, gradient in enumerate(gradients, 1):
        for name, value in model.named_parameters():
            value.grad.copy_(gradient[name])
        optimizer.step(t)
        seen.append(weights_of(model))
    return seen, optimizer


def weights_of(model):
    """name -> a copy."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def make_batch(recipe, rows=None, seed=0):
    """Random tokens, int64 [rows or batch, context + 1]."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    shape = (rows or recipe.data.batch, recipe.data.context + 1)
    return torch.randint(recipe.data.vocab, shape, generator=draw)


def write_tokens(
    folder,
    train=1000,
    val=400,
    vocab=VOCAB,
    top=None,
    seed=0,
    like=None,
):
    """A token folder as core/data/corpus.py leaves it: uint16 ids below `top`, drawn with falling frequency.

    like: a folder of the same tokenizer.
    """
    draw = np.random.default_rng(seed)
    top = top or vocab
    odds = 1 / np.arange(1, top + 1)
    folder.mkdir(parents=True)
    for name, size in (("train", train), ("val", val)):
        ids = draw.choice(top, size, p=odds / odds.sum())
        ids.astype("<u2").tofile(folder / f"{name}.bin")
    token_bytes = draw.integers(1, 6, vocab).astype(np.int32)
    token_bytes[SPECIAL] = 0
    if like:
        token_bytes = np.load(like / "token_bytes.npy")
    np.save(folder / "token_bytes.npy", token_bytes)
    meta = {
        "schema": 1,
        "name": folder.name,
        "vocab": vocab,
        "dtype": "uint16",
        "end_of_text": SPECIAL,
        "train_tokens": train,
        "val_tokens": val,
        "train_bytes": 3 * train,
        "val_bytes": 3 * val,
        "digest": digest_of(folder, "uint16"),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def own_module_cache(tmp_path_factory):
    """Where transformers copies the code beside a model: not into the home of whoever runs the tests."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    from transformers.utils import logging

    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def pytest_addoption(parser):
    more = "also test the interventions in this folder; repeat for more"
    parser.addoption(
        "--plugins",
        dest="intervention_folders",
        action="append",
        default=[],
        metavar="DIR",
        help=more,
    )


# -- garbage -----------------------------------------------------------------------------------------------------------
# A run collects it before its memory comes, and each time looked through all that 6,000 tests had imported: 50 of the
# 117 s of test_interventions and test_trainer.  What was there before is set aside.


def set_aside():
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    set_aside()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    before = full_collections()
    ran = yield
    if full_collections() > before:
        set_aside()
    return ran


def full_collections() -> int:
    return gc.get_stats()[-1]["collections"]


def pytest_unconfigure():
    gc.unfreeze()


def pytest_configure(config):
    """Before collection: tests are parametrized over the registry."""
    from ablab.core.errors import UserError

    try:
        discover(config.getoption("intervention_folders"))
    except UserError as mistake:
        raise pytest.UsageError(str(mistake)) from None
