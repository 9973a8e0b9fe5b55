"""The system's headless Chromium, driven by playwright: pages as users see them."""

import shutil
from pathlib import Path
from typing import Self

import pytest

# --host-resolver-rules: no name is looked up, whatever a page asks for.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


def chromium() -> str:
    """Return the program; the test skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium is installed: bash scripts/setup_system_tests.sh")
    return found


class Browser:
    """with Browser() as browser: one page at a time."""

    def __init__(self) -> None:
        self.requests: list[str] = []  # the address of everything that a page has asked for
        self.complaints: list[str] = []  # of the console: what a page's policy has refused, for one

    def __enter__(self) -> Self:
        sync_api = pytest.importorskip("playwright.sync_api")
        path = chromium()
        self._playwright = sync_api.sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        self._context = self._chromium.new_context()
        return self

    def __exit__(self, *_: object) -> None:
        self._chromium.close()
        self._playwright.stop()

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Show a file in a window of that size, on a light or dark screen; return when it has loaded all it loads."""
        self._context.close()
        self._context = self._chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=width < 600
        )
        self._page = self._context.new_page()
        self._page.on("request", lambda request: self.requests.append(request.url))
        self._page.on("console", lambda message: self.complaints.append(message.text))
        self._page.goto(path.as_uri(), wait_until="load")

    def value(self, script: str) -> object:
        """Return what a script in the page gives."""
        return self._page.evaluate(script)

    def picture(self) -> bytes:
        """Return the whole page as a PNG."""
        return self._page.screenshot(full_page=True)
