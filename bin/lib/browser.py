"""A headless Chromium, driven through chromedriver's HTTP interface; for the tests of pages and for screenshots."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_LIMIT_S = 30.0
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-proxy-server",
]


def is_there() -> bool:
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


class Browser:
    """As a context manager: one window with an empty profile."""

    def __init__(self, width: int = 1240, height: int = 1000) -> None:
        self._dir = tempfile.mkdtemp(prefix="browser-")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": self._dir},
        )
        self._session = ""
        try:
            self._wait_ready()
            flags = [*_FLAGS, f"--user-data-dir={self._dir}/profile", f"--window-size={width},{height}"]
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            if self._session:
                self._ask("DELETE", self._session)
        finally:
            try:
                os.killpg(self._driver.pid, signal.SIGKILL)  # chromedriver's own session: it and what it started
            except ProcessLookupError:
                pass
            self._driver.wait()
            shutil.rmtree(self._dir, ignore_errors=True)

    def _wait_ready(self) -> None:
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if self._ask("GET", "/status")["ready"]:
                    return
            except OSError:
                if time.monotonic() > until or self._driver.poll() is not None:
                    raise
            time.sleep(0.05)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        data = json.dumps(body if body is not None else {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{method} {path}: {json.load(error)['value']['message'][:500]}") from None

    # -- what a person does --------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", {"url": url})

    def click(self, xpath: str) -> None:
        """Also when the page renews itself just then."""
        for attempt in range(5):
            try:
                self._ask("POST", f"{self._session}/element/{self._find(xpath)}/click")
                return
            except AssertionError as error:
                if attempt == 4 or "stale" not in str(error):
                    raise

    def click_link(self, text: str) -> None:
        self.click(f"//a[normalize-space()={json.dumps(text)}]")

    def type(self, xpath: str, text: str) -> None:
        self._ask("POST", f"{self._session}/element/{self._find(xpath)}/value", {"text": text})

    def _find(self, xpath: str) -> str:
        found: str = self._ask("POST", f"{self._session}/element", {"using": "xpath", "value": xpath})[_ELEMENT]
        return found

    # -- what a person sees --------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return str(self._ask("GET", f"{self._session}/url"))

    @property
    def title(self) -> str:
        return str(self._ask("GET", f"{self._session}/title"))

    @property
    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def run(self, script: str) -> Any:
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """What the browser complained about since the last look."""
        return [entry["message"] for entry in self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self, path: Path, width: int = 1120, most: int = 1000) -> None:
        """The whole page, as far down as `most`."""
        height = min(most, int(self.run("return document.documentElement.scrollHeight")))
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        shot = self._devtools("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": False})
        path.write_bytes(base64.b64decode(shot["data"]))
        self._devtools("Emulation.clearDeviceMetricsOverride", {})

    def prefer_dark(self) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def _devtools(self, command: str, params: dict[str, Any]) -> Any:
        return self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": params})
