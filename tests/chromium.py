"""Control headless Chromium over the DevTools protocol on a pipe. Needs neither a driver nor a library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT_S: Final = 60
# Chromium reads commands from file descriptor 3 and writes answers to 4.
_ON_3_AND_4: Final = (
    "import fcntl, os, sys\n"
    "fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]\n"
    "for fd, to in zip(fds, (3, 4)): os.dup2(fd, to)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


def chromium() -> str | None:
    """Return Chromium's path, or None if it is not installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """A page that the browser has loaded."""

    browser: Browser
    session: str
    url: str
    said: list[str] = field(default_factory=list)
    """Console messages, exceptions and browser warnings."""
    requested: list[str] = field(default_factory=list)
    """Requested URLs."""
    is_loaded: bool = False

    def command(self, method: str, **parameters: Any) -> Any:
        return self.browser.command(method, parameters, self.session)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, target: Path, *, whole: bool = True) -> Path:
        data = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        target.write_bytes(base64.b64decode(data))
        return target

    def heard(self, method: str, event: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self.is_loaded = True
            case "Network.requestWillBeSent":
                self.requested.append(event["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.said.append(f"console.{event['type']}: {event['args']}")
            case "Runtime.exceptionThrown":
                self.said.append(f"exception: {event['exceptionDetails']}")
            case "Log.entryAdded":
                self.said.append(f"{event['entry']['level']}: {event['entry']['text']}")


class Browser:
    """A running Chromium; `open_browser` starts one."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self._write_fd, self._read_fd = write_fd, read_fd
        self._buffer = b""
        self._number = 0
        self._pages: dict[str, Page] = {}

    @contextmanager
    def page(self, url: str, width: int, height: int = 900, *, scheme: Literal["light", "dark"] = "light") -> Iterator[Page]:
        """Load `url` in a window of this size."""
        target = self.command("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.command("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session, url)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.command(f"{domain}.enable")
        page.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.command("Page.navigate", url=url)
        while not page.is_loaded:
            self._receive()
        yield page
        self.command("Target.closeTarget", {"targetId": target})

    def command(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> Any:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters or {}, **({"sessionId": session} if session else {})}
        # Chromium responds only after it has read the whole command.
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write_fd, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"chromium said nothing for {_TIMEOUT_S} s"
            data = os.read(self._read_fd, 1 << 16)
            assert data, "chromium went away"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if (page := self._pages.get(answer.get("sessionId", ""))) and "method" in answer:
            page.heard(answer["method"], answer["params"])
        return answer


@contextmanager
def open_browser(program: str, profile: Path, extra: Sequence[str] = ()) -> Iterator[Browser]:
    """Start Chromium with a fresh profile in `profile` and without background networking."""
    to_read, write_fd = os.pipe()
    read_fd, to_write = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _ON_3_AND_4, str(to_read), str(to_write), program),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-sync", "--disable-component-update", "--remote-debugging-pipe"),
            *(f"--user-data-dir={profile}", *extra),
        ],
        pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (to_read, to_write):
        os.close(fd)
    browser = Browser(write_fd, read_fd)
    try:
        yield browser
    finally:
        with suppress(OSError, AssertionError):
            browser.command("Browser.close")
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for fd in (write_fd, read_fd):
            os.close(fd)
