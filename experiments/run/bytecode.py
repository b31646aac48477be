"""The bytecode of what is imported, kept where Python would keep none.

Some installers compile nothing (uv), slim images throw it away, PYTHONDONTWRITEBYTECODE forbids it, and a folder of
packages may not be ours to write.  Each process then compiles torch and its compiler anew, 1,900 files.
"""

import os
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

PREFIX = "PYTHONPYCACHEPREFIX"
FORBIDDEN = "PYTHONDONTWRITEBYTECODE"


def keep_bytecode() -> None:
    """In the user's cache, where that of torch is not kept beside it; by this process and those that it starts.

    Python itself sees to it that a file which has changed is compiled again.
    """
    torch = find_spec("torch")
    if sys.pycache_prefix or torch is None or torch.origin is None:
        return
    beside = Path(cache_from_source(torch.origin))
    if beside.exists() or (_is_ours(beside.parent) and not sys.dont_write_bytecode):
        return
    folder = cache() / "bytecode"
    sys.pycache_prefix = os.environ[PREFIX] = str(folder)
    sys.dont_write_bytecode = False  # nothing comes to lie beside a source
    os.environ.pop(FORBIDDEN, None)


def cache() -> Path:
    """Of this user, for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ablab"


def _is_ours(folder: Path) -> bool:
    """Whether Python can write there; it makes the folder itself."""
    there = folder if folder.exists() else folder.parent
    return there.is_dir() and os.access(there, os.W_OK)
