"""Weights folders of stirred models, and how transformers loads what is exported of them."""

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.interop.exporting import export
from ablab.core.interop.folder import Source
from ablab.core.interop.weights import load, write


@pytest.fixture(scope="session", autouse=True)
def no_code_at_home(own_module_cache):
    """For all tests here."""


@pytest.fixture
def kept(build, tmp_path):
    """recipe -> its stirred model, and the weights folder that holds it."""
    count = 0

    def of(recipe, **more):
        nonlocal count
        count += 1
        model = build(recipe, stirred=0.1)
        folder = tmp_path / f"weights{count}"
        tensors = {name: value.detach() for name, value in model.named_parameters()}
        write(folder, recipe, tensors, Source(), **more)
        return model, folder

    return of


@pytest.fixture
def exported(kept, tmp_path):
    """recipe -> our model, and the model that transformers loads from its export."""
    from transformers import AutoModelForCausalLM

    def of(recipe):
        model, folder = kept(recipe)
        out = folder.with_name(f"{folder.name}_exported")
        export(load(folder), out, None, "ARCHITECTURE NOTES")
        return model, AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()

    return of


@pytest.fixture(scope="session")
def apart():
    """The largest difference of two tensors, over the scale of the second."""

    def of(ours, theirs) -> float:
        assert ours.shape == theirs.shape
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    return of


@pytest.fixture
def refused(tmp_path):
    """call, words -> the line with which it is refused; nothing was written."""

    def of(call, *words: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(UserError) as refusal:
            call()
        said = str(refusal.value)
        for word in words:
            assert word in said
        assert "\n" not in said
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return said

    return of


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)
