"""A headless Chromium for tests, driven over the WebDriver protocol with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs Chromium and its driver (Debian: chromium and chromium-driver)"
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)


class Browser:
    """One page."""

    def __init__(self, driver: str, session: str) -> None:
        self._base = f"{driver}/session/{session}"

    def open(self, url: str) -> None:
        _call("POST", f"{self._base}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return _call("POST", f"{self._base}/execute/sync", {"script": script, "args": []})

    def wait_for(self, condition: str, timeout_s: float = 30.0) -> Any:
        """Wait until an expression is true and return its value."""
        until = time.monotonic() + timeout_s
        while not (value := self.run(f"return {condition}")):
            if time.monotonic() > until:
                shown = self.run("return document.body.innerText")
                raise AssertionError(f"not within {timeout_s:.0f} s: {condition}\n{shown}")
            time.sleep(0.2)
        return value

    def resize(self, width: int, height: int) -> None:
        """Give the page exactly this size, narrower than a window can be too."""
        self._devtools("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        })

    def screenshot(self, path: Path) -> None:
        """Write the whole page, also what has to be scrolled to."""
        found = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Return what the browser has complained of since the last call: errors, and what the policy refused."""
        entries = _call("POST", f"{self._base}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return _call("POST", f"{self._base}/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile, and end it and its driver."""
    driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    base, session = "", ""
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if "started successfully on port" in line:
                base = "http://127.0.0.1:" + line.rstrip(".\n").rpartition(" ")[2]
                break
        options = {"binary": CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call("POST", f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        yield Browser(base, session)
    finally:
        if session:
            _call("DELETE", f"{base}/session/{session}")
        driver.terminate()
        driver.wait(10)
        if driver.stdout is not None:
            driver.stdout.close()


def _call(method: str, url: str, content: Any = None) -> Any:
    data = json.dumps(content).encode() if content is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
