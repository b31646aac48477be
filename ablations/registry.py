"""Finding interventions: every file in ablations/interventions, and every file in a user's own folders."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path

from ablab.ablations import interventions
from ablab.core.errors import UserError
from ablab.core.language.part import Part
from ablab.core.recipe.intervention import REGISTRY, Intervention


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


def _import_file(path: Path) -> None:
    """Import one file under a name of its own, and remember the digest of what its parts are made of."""
    name = f"ablab_plugins.{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, "only a loader without a source has no spec"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except Exception as flaw:
        del sys.modules[name]
        raise UserError(
            f"plugin {path}{_line_of(flaw, path)} cannot be imported: {type(flaw).__name__}: {flaw}"
        ) from flaw
    Part.foreign |= {kind: digest for kind, one in Part.known.items() if one.__module__ == name}


def _line_of(flaw: Exception, path: Path) -> str:
    """`:LINE`, the innermost line of that file in the flaw's trace; empty if it has none."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(flaw.__traceback__)
        if frame.filename == str(path)
    ]
    return f":{lines[-1]}" if lines else ""
