"""The functions of a plan's stages, written out so that they stand alone: in a file that knows nothing of ablab.

A function is carried as its source says, with the functions and plain constants of its module that it uses.  What
cannot be carried (a closure, a lambda, a class, an import of anything but torch) is refused by name: none is dropped.
"""

import ast
import builtins
import dis
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

MAY_IMPORT = ("torch", "math", "__future__")
PLAIN = (int, float, bool, str, bytes, type(None))


class CannotStandAlone(Exception):
    """Why a function cannot be carried, in a few words, for people."""


class Carried:
    """Gathers functions, each once, with what they use."""

    def __init__(self) -> None:
        self.names: dict[FunctionType, str] = {}
        self.constants: dict[str, str] = {}  # name -> its value, written
        self.imports: set[str] = set()
        self.text: list[str] = []  # what is used stands before what uses it

    def name_of(self, function: Callable[..., Any]) -> str:
        """What the function is called in the file.  Raises CannotStandAlone."""
        if not isinstance(function, FunctionType):
            raise CannotStandAlone(f"{function!r:.60} is no plain function")
        if function not in self.names:
            self.names[function] = self._new_name(function)
            self.text.append(self._written(function))
        return self.names[function]

    def _new_name(self, function: FunctionType) -> str:
        module = function.__module__.rpartition(".")[2]
        name = f"{module}_{function.__name__}"
        taken = {*self.names.values(), *self.constants}
        while name in taken:
            name += "_"
        return name

    def _written(self, function: FunctionType) -> str:
        name = function.__name__
        if function.__code__.co_freevars:
            raise CannotStandAlone(f"{name}() is a closure")
        try:
            source = textwrap.dedent(inspect.getsource(function))
            (definition,) = ast.parse(source).body
        except (OSError, SyntaxError, ValueError):
            raise CannotStandAlone(f"the source of {name}() cannot be read") from None
        if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
            raise CannotStandAlone(f"{name}() is no plain function")
        self._refuse_imports(definition)
        used = {*_globals_of(function.__code__), *_in_defaults(definition)}
        renamed = {one: self._resolved(function, one) for one in sorted(used)}
        definition.name = self.names[function]
        return ast.unparse(_Renamed(renamed).visit(definition))

    def _refuse_imports(self, definition: ast.FunctionDef) -> None:
        for node in ast.walk(definition):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                if module.partition(".")[0] not in MAY_IMPORT:
                    raise CannotStandAlone(f"{definition.name}() imports {module}")

    def _resolved(self, function: FunctionType, name: str) -> str:
        """What a global name of the function becomes in the file."""
        if name not in function.__globals__:
            if hasattr(builtins, name):
                return name
            raise CannotStandAlone(f"{function.__name__}() uses {name}, which is not defined")
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            return self._module(function, name, value)
        if imported := _of_torch(value):
            self.imports.add(f"from {imported} import {value.__name__} as {name}")
            return name
        if isinstance(value, FunctionType):
            return self.name_of(value)
        if _is_plain(value):
            stem = function.__module__.rpartition(".")[2]
            constant = f"{stem}_{name}".upper()
            self.constants[constant] = repr(value)
            return constant
        raise CannotStandAlone(
            f"{function.__name__}() uses {name}, which is neither a function nor plain"
        )

    def _module(self, function: FunctionType, name: str, module: ModuleType) -> str:
        if module.__name__.partition(".")[0] not in MAY_IMPORT:
            raise CannotStandAlone(f"{function.__name__}() uses the module {module.__name__}")
        self.imports.add(f"import {module.__name__} as {name}")
        return name

    def written(self) -> str:
        """The functions as source, and the table that names them."""
        constants = [f"{name} = {value}" for name, value in sorted(self.constants.items())]
        names = sorted(self.names.values())
        table = "\n".join(f"    {name}={name}," for name in names)
        parts = [
            "\n".join(sorted(self.imports)),
            "\n".join(constants),
            *self.text,
            f"STAGES.update(\n{table}\n)",
        ]
        return "\n\n\n".join(part for part in parts if part) + "\n"


class _Renamed(ast.NodeTransformer):
    """Global names become those of the file; types of arguments, which may name anything, go."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node


def _globals_of(code: CodeType) -> Iterator[str]:
    """Names that the code, or a function inside it, looks up outside."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _in_defaults(definition: ast.FunctionDef) -> Iterator[str]:
    arguments = definition.args
    defaults = [*arguments.defaults, *arguments.kw_defaults]
    for default in defaults:
        for node in ast.walk(default) if default else ():
            if isinstance(node, ast.Name):
                yield node.id


def _of_torch(value: Any) -> str:
    """The module from which a function or class of torch or math may be imported; '' of anything else."""
    name = getattr(value, "__name__", "")
    if not name or getattr(math, name, None) is value:
        return "math" if name else ""
    for module in ("torch", "torch.nn.functional", "torch.nn"):
        if getattr(sys.modules.get(module), name, None) is value:
            return module
    return ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return type(value) in PLAIN
