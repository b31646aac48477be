"""A browser that opens a page as a reader does; skips where there is none."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium.  Every wait has a ceiling of a minute: two busy cores take a while."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """A function from an address to a page of a new window.  `asked`: what it asked the network for."""
    windows = []

    def open_(address: str, width: int = 1440, scheme: str = "light"):
        size = {"width": width, "height": 900}
        window = browser.new_context(viewport=size, color_scheme=scheme)
        window.set_default_timeout(60_000)
        windows.append(window)
        page = window.new_page()
        page.asked = []
        page.faults = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda fault: page.faults.append(str(fault)))
        page.goto(address)
        return page

    yield open_
    for window in windows:
        window.close()
