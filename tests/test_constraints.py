"""The versions that are installed, and the digests of their files, speak of the same packages."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", re.MULTILINE)
CURE = "make lock"


def pins_in(text: str) -> dict[str, set[str]]:
    """Package -> its versions; one that changes with the Python has several."""
    found: dict[str, set[str]] = {}
    for name, version in PIN.findall(text):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


def entries_of(lock: str) -> list[str]:
    return [one for one in re.split(r"^(?=\w)", lock, flags=re.MULTILINE) if "==" in one]


PINNED = pins_in((ROOT / "constraints.txt").read_text())
LOCK = (ROOT / "constraints.lock").read_text()
CUDA_LOCK = (ROOT / "constraints-cuda.lock").read_text()


def test_the_locks_hold_every_version_that_is_pinned():
    locked = pins_in(LOCK) | pins_in(CUDA_LOCK)
    others = {name: locked.get(name) for name in PINNED if locked.get(name) != PINNED[name]}
    assert not others, CURE


def test_every_locked_package_has_digests_of_its_files():
    for entry in entries_of(LOCK + CUDA_LOCK):
        digests = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)
        assert digests, entry
        assert len(set(digests)) == len(digests) == entry.count("--hash"), entry


def test_the_container_takes_what_it_needs_from_the_locks():
    """No container is built here: what it copies is there, is let through, and is all that the wheel is made of."""
    words = (ROOT / "Dockerfile").read_text()
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        name
        for line in re.findall(r"^COPY (.*) \S+$", words, flags=re.M)
        for name in line.split()
    }
    packed = re.findall(
        r'^"ablab.(\w+)" = "', (ROOT / "pyproject.toml").read_text(), flags=re.M
    )
    assert copied >= {"constraints.lock", "constraints-cuda.lock", "pyproject.toml", *packed}
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in let_through
    assert "--require-hashes --no-deps -r constraints.lock -r constraints-cuda.lock" in words


def test_what_a_cuda_build_of_torch_needs_stands_apart():
    """A CPU build is installed from the first lock alone."""
    assert {name.split("-")[0] for name in pins_in(CUDA_LOCK)} == {"nvidia", "cuda"}
    assert not [name for name in pins_in(LOCK) if name.startswith(("nvidia-", "cuda-"))]
