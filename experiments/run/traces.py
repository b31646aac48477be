"""The liveness traces that a store remembers: each is asked once for a recipe, a state of the code, a path."""

from pathlib import Path

import msgspec

from ablab.core.store.files import FLAWS, write_atomically
from ablab.core.store.store import Store


class Traces:
    """STORE/liveness.json: "run id/code fingerprint/path" -> trace.  A cache: what cannot be read is computed again.

    served: the path on which traces are taken.  Traces of two paths differ in their last bits, and would make an inert
    arm look alive.
    """

    def __init__(self, store: Store, code: str, served: str):
        self.path = store.root / "liveness.json"
        self.of = f"{code}/{served}"
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
        return f"{run}/{self.of}"


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, *FLAWS):
        return {}
