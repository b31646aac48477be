"""Finding interventions: every file in ablations/interventions, and every file in a user's own folders."""

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterable
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
    name = f"ablab_plugins.{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as flaw:
        del sys.modules[name]
        line = next(
            (
                frame.lineno
                for frame in reversed(traceback.extract_tb(flaw.__traceback__))
                if frame.filename == str(path)
            ),
            0,
        )
        raise UserError(
            f"plugin {path}{f':{line}' if line else ''} cannot be imported: {type(flaw).__name__}: {flaw}"
        ) from flaw
    Part.foreign |= {kind: digest for kind, one in Part.known.items() if one.__module__ == name}
