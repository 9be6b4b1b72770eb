"""Headless Chromium for tests, driven by its own DevTools protocol: there is no driver to install beside it."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import pytest
from websocket import WebSocket, create_connection

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here (looked for {', '.join(NAMES)})")


class Page:
    """One tab. errors: what its console called an error, exceptions and failed requests among them."""

    def __init__(self, socket: WebSocket):
        self.socket, self.sent, self.errors = socket, 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # else no element of a headless page has it

    def call(self, method: str, **parameters: Any) -> dict:
        """The result of a method of the protocol, https://chromedevtools.github.io/devtools-protocol/."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            self._note(answer["method"], answer["params"])
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _note(self, event: str, told: dict) -> None:
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in told["args"]))

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Goes to an address, in a window of that many CSS pixels, and waits until it is loaded; forgets `errors`."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")  # so that an address that differs after # alone is loaded anew
        self.wait("location.href == 'about:blank'")
        self.errors.clear()
        found = self.call("Page.navigate", url=address)
        assert "errorText" not in found, f"{address}: {found['errorText']}"
        self.wait("location.href != 'about:blank' && document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """The value, as JSON takes it, of a JavaScript expression; of a promise, what it brings."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Waits until an expression is something: true, a number that is not 0, a text, an element."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < until, f"not true after {seconds:.0f} seconds: {script}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element, which is scrolled to first."""
        found = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoViewIfNeeded()"
        found += "; const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = self.run(f"(() => {{ {found} }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """A key, by its name and its number, where the focus is: "Enter", 13."""
        what = {"key": key, "code": key, "windowsVirtualKeyCode": code} | ({"text": "\r"} if key == "Enter" else {})
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **what)

    def screenshot(self, path: str | Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            shot = self.call(
                "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=size | {"scale": 1}
            )
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium() -> Iterator[Page]:
    """A browser with an empty profile, and its one tab; it ends with the block."""
    assert CHROMIUM is not None
    with TemporaryDirectory(ignore_cleanup_errors=True) as home:
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={home}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"]
        options += ["--no-sandbox"] if os.name == "posix" and os.getuid() == 0 else []  # as root it starts with none
        process = subprocess.Popen([CHROMIUM, *options, "about:blank"], stderr=subprocess.DEVNULL)
        try:
            port = soon(lambda: (Path(home) / "DevToolsActivePort").read_text().split()[0])
            tabs = soon(lambda: [tab for tab in _json(f"http://127.0.0.1:{port}/json/list") if tab["type"] == "page"])
            socket = create_connection(tabs[0]["webSocketDebuggerUrl"], suppress_origin=True, timeout=120)
            yield Page(socket)
            socket.close()
        finally:
            process.terminate()
            process.wait(30)


def _json(address: str) -> Any:
    with urlopen(address, timeout=30) as answer:
        return json.load(answer)


def soon(get: Any, seconds: float = 60) -> Any:
    """What `get` returns once that is true and does not raise an OSError or IndexError."""
    until = time.monotonic() + seconds
    while True:
        try:
            if found := get():
                return found
        except (OSError, IndexError):
            pass
        assert time.monotonic() < until, "Chromium did not start"
        time.sleep(0.05)
