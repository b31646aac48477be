"""Triton's interpreter without what it does in vain, which is half of what kernels cost in it (Triton 3.6).

It puts functions of its own in the place of triton.language's when a kernel is launched, and at every call of a device
function once more: 1.4 ms each, to look for what is replaced already.  Here they are replaced once a launch, and looked
for once a process.

It computes sums and products of integers again in 64 bits, for an assertion that only `debug` would look at.
"""

import inspect
from dataclasses import replace
from types import FunctionType, ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import triton.language as tl
from triton.runtime import interpreter

from ablab.kernels import newton_schulz


def do_nothing_in_vain(change: pytest.MonkeyPatch) -> None:
    change.setattr(interpreter, "_patch_lang", Replacing(interpreter._patch_lang))
    change.setattr(interpreter, "_patch_builtin", replace_builtins)
    builder = interpreter.interpreter_builder
    seen = replace(builder.options, sanitize_overflow=builder.options.debug)
    change.setattr(builder, "options", seen)


class Replacing:
    """function -> the scope in which what it sees of triton.language is replaced; within a launch, of nothing more.

    replace: the interpreter's own way.
    """

    def __init__(self, replace) -> None:
        self.replace = replace
        self.scope: interpreter._LangPatchScope | None = None

    def __call__(self, function: FunctionType) -> "Replacing | Nothing":
        if self.scope:
            return Nothing()
        # Kernels see the one, functions of Triton's own library the other.
        sees_both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        self.scope = self.replace(sees_both)
        return self

    def restore(self) -> None:
        self.scope.restore()
        self.scope = None


class Nothing:
    def restore(self) -> None:
        pass


BUILTINS: dict[ModuleType | type, list[tuple[str, object]]] = {}


def replace_builtins(place: ModuleType | type, builder, scope) -> None:
    """What a module or a class has of them is looked for before anything is replaced."""
    if place not in BUILTINS:
        members = inspect.getmembers(place)
        BUILTINS[place] = [one for one in members if tl.core.is_builtin(one[1])]
    for name, member in BUILTINS[place]:
        interpreter._patch_attr(place, name, member, builder, scope)


def plain_products():
    """Newton-Schulz with torch's products: ours take seconds here, and tests/kernels compares them."""
    return patch.object(newton_schulz, "symmetric", plain_symmetric)


def plain_symmetric(
    x,
    alpha=1.0,
    beta=0.0,
    y=None,
    diagonal=0.0,
    scale=None,
    tiles=None,
):
    made = newton_schulz.plain_symmetric(x, alpha, beta, y, diagonal)
    return made if scale is None else made * scale[:, None, None]
