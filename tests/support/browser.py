"""Headless Chromium, spoken to over a pipe by its DevTools protocol: pages as users see them."""

import base64
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest

TIMEOUT_S = 120


def chromium() -> str:
    """The program; the test skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium is installed: bash scripts/setup_system_tests.sh")
    return found


class Browser:
    """with Browser(folder) as browser: one tab. `requests`: the address of everything that it has asked for."""

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        self.complaints: list[str] = []  # of the console: what a page's policy has refused, for one
        self._loaded, self._number, self._buffer, self._answers = False, 0, b"", {}
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads its file descriptor 3 and writes to 4; the shell puts ours there.
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run",
            f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank",
        ]  # fmt: skip
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", chromium(), *options]
        self._process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._session = ""

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # it ends when nobody speaks to it
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Show a file in a window of that size, on a light or dark screen; returns when it has loaded all it loads."""
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._receive()

    def value(self, script: str) -> object:
        """Of a script in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def call(self, method: str, **parameters: object) -> dict:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while number not in self._answers:
            self._receive()
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self) -> None:
        """The next message."""
        while b"\0" not in self._buffer:
            ready, *_ = select.select([self._read], [], [], TIMEOUT_S)
            assert ready, "chromium does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, f"chromium has ended with {self._process.poll()}"
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        name, about = message.get("method"), message.get("params", {})
        if "id" in message:
            self._answers[message["id"]] = message
        elif name == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
