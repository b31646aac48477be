"""Which code ran: a digest of what can change a number, and of nothing else."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "kernels", "ablations")


@cache
def code_fingerprint() -> str:
    """sha256 over the syntax of every source file that can change a number, 12 hex digits.

    Comments, docstrings and layout are not part of it.
    """
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(syntax(path.read_text("utf-8")).encode())
    return digest.hexdigest()[:12]


def syntax(source: str) -> str:
    """What the source says: equal for two texts that differ in comments, docstrings and layout alone."""
    return " ".join(_words(ast.parse(source)))


def _words(node: ast.AST) -> Iterator[str]:
    """The tree in order, each node closed by `)`.  Empty fields are left out: newer Pythons have more of them."""
    yield type(node).__name__
    for name in node._fields:
        value: Any = getattr(node, name, None)
        if name == "body" and _begins_with_a_docstring(node):
            value = value[1:]
        if isinstance(value, ast.AST):
            value = [value]
        if isinstance(value, list):
            if value:
                yield name
            for one in value:
                yield from _words(one) if isinstance(one, ast.AST) else [repr(one)]
        elif value is not None:
            yield f"{name}={value!r}"
    yield ")"


def _begins_with_a_docstring(node: ast.AST) -> bool:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
