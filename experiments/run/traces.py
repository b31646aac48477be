"""The liveness traces that a store remembers: each is asked once for a recipe and a state of the code."""

from pathlib import Path

import msgspec

from ablab.core.store.files import write_atomically
from ablab.core.store.store import Store


class Traces:
    """STORE/liveness.json: "run id/code fingerprint" -> trace.  A cache: what cannot be read is computed again."""

    def __init__(self, store: Store, code: str):
        self.path = store.root / "liveness.json"
        self.code = code
        self.known = _read(self.path)

    def get(self, run: str) -> str | None:
        return self.known.get(self._key(run))

    def put(self, run: str, trace: str) -> None:
        self.known[self._key(run)] = trace

    def save(self) -> None:
        """Beside what another process has learned meanwhile."""
        everything = _read(self.path) | self.known
        write_atomically(self.path, msgspec.json.encode(everything))

    def _key(self, run: str) -> str:
        return f"{run}/{self.code}"


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}
