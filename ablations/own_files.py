"""What a user's own file is made of: itself, and what it imports from its folder, as far as that goes."""

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

INSTALLED = {"site-packages", "dist-packages"}  # also where an environment lies in the folder


def digest_of(source: Path, folder: Path) -> str:
    """sha256 of the file and of its helpers, 12 hex digits; of a file without helpers, of its bytes alone."""
    digest = hashlib.sha256(source.read_bytes())
    for helper in own_files(source, folder)[1:]:
        inner = hashlib.sha256(helper.read_bytes()).hexdigest()
        digest.update(f"\n{helper.relative_to(folder)} {inner}".encode())
    return digest.hexdigest()[:12]


def own_files(source: Path, folder: Path) -> list[Path]:
    """The file, then in order every file below the folder that it imports, itself or through another.

    Read from the text: an import counts wherever it stands, and nothing is executed.  A file that is no Python, whose
    import will fail, imports nothing.
    """
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported_by(path, folder)
    return [source, *sorted(found - {source})]


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file was written for the folder, and not installed below it."""
    return path.is_relative_to(folder) and INSTALLED.isdisjoint(path.parts)


def _imported_by(path: Path, folder: Path) -> Iterator[Path]:
    """Every file of the folder that a name may mean, whichever entry of sys.path comes first."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    anywhere = [folder, *(Path(entry or ".") for entry in sys.path)]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    yield from _files_of(alias.name, anywhere, folder)
            case ast.ImportFrom(module, names, level):
                roots = list(path.parents)[level - 1 : level] if level else anywhere
                for alias in names:
                    yield from _files_of(f"{module or ''}.{alias.name}", roots, folder)


def _files_of(name: str, roots: Iterable[Path], folder: Path) -> Iterator[Path]:
    """The module `name` and the packages that hold it."""
    words = [word for word in name.split(".") if word]
    for root in roots:
        place = root
        for word in words:
            for file in (place / f"{word}.py", place / word / "__init__.py"):
                if file.is_file() and is_own(file.resolve(), folder):
                    yield file.resolve()
            place = place / word
