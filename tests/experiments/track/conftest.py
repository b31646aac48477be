"""`ablab ui` as a user meets it: a server in a process of its own, and a browser that photographs its pages."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ablab.experiments.track.ui_app import is_installed

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1600,1000",
    "--virtual-time-budget=60000",
    "--dump-dom",
)


class Served:
    """Up to the line that names the first experiment.  `link` is the address of its saved view."""

    def __init__(self, root: Path, port: int):
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        code = (
            "from pathlib import Path; from ablab.experiments.track.ui import serve; "
            f"serve(Path({str(root)!r}), port={port})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.head = self.process.stdout.readline()
        _, _, link = self.process.stdout.readline().partition(": ")
        self.link = link.strip()

    def stop(self) -> str:
        """What it said since."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture(scope="session")
def free_port():
    """A function that finds one."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture
def serve(free_port):
    """A function from the root of a store to its server."""
    return lambda root: Served(root, free_port())


@pytest.fixture
def photograph(tmp_path):
    """A function that keeps NAME.png of a page and returns the page's HTML.

    Look at the pictures, in $ABLAB_PICTURES or in pytest's temporary folder: an empty page is told by its size alone.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")

    def look(name: str, page: str, least_bytes: int) -> str:
        picture = Path(os.environ.get("ABLAB_PICTURES", tmp_path)) / f"{name}.png"
        places = (f"--user-data-dir={tmp_path / 'chromium'}", f"--screenshot={picture}")
        done = subprocess.run(
            [chromium, *FLAGS, *places, page], capture_output=True, text=True, timeout=120
        )
        assert picture.stat().st_size > least_bytes
        return done.stdout

    return look


@pytest.fixture
def window():
    """A function from an address to a page that is clicked through as a person does; skips without a browser.

    Every wait has a ceiling of a minute: a busy machine takes a while.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    if not is_installed():
        pytest.skip("installed before MLflow had a page of ours: pip install -e .")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def open_(address: str):
            context = browser.new_context(viewport={"width": 1440, "height": 1000})
            context.set_default_timeout(60_000)
            page = context.new_page()
            page.goto(address)
            return page

        yield open_
        browser.close()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> tuple[Path, str]:
    """A database made by another process, once (3 s), and all that this process said."""
    folder = tmp_path_factory.mktemp("migrated")
    code = (
        "from pathlib import Path; from ablab.core.store.store import Store; "
        "from ablab.experiments.track.mlflow_view import MlflowView; "
        "assert MlflowView(Store(Path('store'))).ensure()"
    )
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return folder / "store" / "mlflow.db", done.stdout + done.stderr


@pytest.fixture(scope="session")
def lacking():
    return words_lacking


def words_lacking(words: set[str], look: Callable[[], str]) -> set[str]:
    """The words that a page does not show.  A busy machine loads its tables late, so look up to three times."""
    for _ in range(3):
        html = look()
        absent = {word for word in words if word not in html}
        if not absent:
            break
    return absent
