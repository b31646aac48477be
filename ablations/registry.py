"""Finding interventions: every file in ablations/interventions, and every file in a user's own folders."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path

from ablab.ablations import interventions
from ablab.ablations.own_files import digest_of, is_own, own_files
from ablab.core.errors import UserError, place_in, told
from ablab.core.language.part import Part
from ablab.core.recipe.intervention import REGISTRY, Intervention

# of the user's own: every file that was imported, and those of its folder that it imports
OWN: set[str] = set()


def discover(plugins: Iterable[str | Path] = ()) -> dict[str, type[Intervention]]:
    """Import all of them; returns name -> class.  Raises UserError naming a plugin file that cannot be imported."""
    for module in pkgutil.iter_modules(interventions.__path__):
        importlib.import_module(f"{interventions.__name__}.{module.name}")
    for folder in map(Path, plugins):
        if not folder.is_dir():
            raise UserError(
                f"--plugins {folder} is not a folder; name the folder that holds your intervention files"
            )
        for path in sorted(folder.glob("[!_]*.py")):
            _import_file(path.resolve())
    return REGISTRY


def raised_at(flaw: BaseException) -> str:
    """`FILE:LINE` of the user's own code that raised it, or called what did; '' where none did."""
    return place_in(flaw, OWN)


def _import_file(path: Path) -> None:
    """Import one file under a name of its own, and remember the digest of what its parts are made of."""
    name = f"ablab_plugins.{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return
    before = set(sys.modules)
    OWN.update(map(str, own_files(path, path.parent)))
    spec = importlib.util.spec_from_loader(name, FromSource(name, str(path)))
    assert spec is not None and spec.loader, "only a loader without a source has no spec"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _no_bytecode():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as flaw:
        del sys.modules[name]
        where = place_in(flaw, {str(path)}) or path
        raise UserError(f"plugin {where} cannot be imported: {told(flaw)}") from flaw
    _refuse_unseen(path, set(sys.modules) - before)
    _sign(path.parent)


def _refuse_unseen(path: Path, modules: Iterable[str]) -> None:
    """What came with the file from its folder must be part of its digest.  Raises UserError."""
    for module in modules:
        source = _file_of(module)
        if is_own(source, path.parent) and str(source) not in OWN:
            raise UserError(
                f"plugin {path} imports {source} by no import statement, so an edit of that would rename no run; "
                "write `import` with its name"
            )


def _sign(folder: Path) -> None:
    """Give every part that a file of the folder defines the digest of that file, and of what it imports."""
    for kind, one in Part.known.items():
        source = _file_of(one.__module__)
        if kind not in Part.foreign and is_own(source, folder) and str(source) in OWN:
            Part.foreign[kind] = digest_of(source, folder)


def _file_of(module: str) -> Path:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file or "/").resolve()


class FromSource(SourceFileLoader):
    """Reads the file that is there.

    Bytecode is told apart by size and second alone: an edit within one that keeps the size would run the old code.
    """

    def get_code(self, name: str):
        return self.source_to_code(self.get_data(self.path), self.path)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Nothing that is imported in here leaves bytecode, for the same reason."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
