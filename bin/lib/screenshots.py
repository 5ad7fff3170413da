"""Pictures of the pages for the README: docs/coordinator.png, worker.png, master.png, of a farm that builds Lua."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from browser import Browser, is_there
from projects import CHECKOUT, PROJECTS, clean_environment, unpack

from termite.cli.session import Daemon, OwnDaemons, program

DOCS = CHECKOUT / "docs"
MAX_BYTES = 150_000
BUILD_FOR_S = 40.0


def pages_of(daemon: Daemon) -> str:
    """The address that the log tells."""
    found: list[str] = []

    def look() -> bool:
        found.extend(re.findall(r"pages at (\S+)", daemon.log.read_text()))
        return bool(found)

    daemon.wait_until("pages", look)
    return found[0]


def commands_done(worker: Daemon) -> int:
    with urllib.request.urlopen(f"{pages_of(worker)}?json", timeout=10) as answer:
        return sum(mirror["done"] for mirror in json.load(answer)["mirrors"])


class Building:
    """Lua, again and again, after one failure."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._environment = clean_environment()
        self._environment["PATH"] = f"{Path(program('termite-make')).parent}:{self._environment['PATH']}"
        self._make: subprocess.Popen[bytes] | None = None

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self._root, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def go_on_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._make is None or self._make.poll() is not None:
                self._start("make", "-C", "src", "clean").wait()
                if self._make is None:
                    self._start(program("termite-shell-wrapper"), "-exec", "cc", "-c", "missing.c").wait()
                self._make = self._start(program("termite-make"), "-j6", *PROJECTS["lua"].make)
            time.sleep(0.1)

    def until(self, shows: Callable[[], bool]) -> None:
        """Builds on until the page shows something worth a picture."""
        for _ in range(60):
            self.go_on_for(0.3)
            if shows():
                return
        raise SystemExit("screenshots: no page showed a running command for 20 s")

    def stop(self) -> None:
        if self._make is not None:
            self._make.terminate()
            self._make.wait()


def take(work: Path) -> None:
    root = work / "lua"
    unpack(PROJECTS["lua"], root)
    daemons = OwnDaemons()
    building = Building(root)
    try:
        coordinator = daemons.start_coordinator("-web-port", "0", "-web-password", "termite")
        workers = [daemons.start_worker(3, None, "-web-port", "0") for _ in range(2)]
        master = daemons.start_master(root, 6, "-port", "0")
        building.go_on_for(BUILD_FOR_S)
        busiest = max(workers, key=commands_done)
        addresses = {"coordinator": coordinator, "worker": busiest, "master": master}
        with Browser() as browser:
            for name, daemon in addresses.items():
                browser.open(pages_of(daemon))
                building.until(lambda: "lua" in browser.text and ".c" in browser.text)
                browser.screenshot(DOCS / f"{name}.png")
    finally:
        building.stop()
        daemons.stop()


def main() -> int:
    if sys.argv[1:]:
        print("usage: bin/lib/screenshots.py    takes the pictures of the README anew; it has no flags")
        return 0 if sys.argv[1] in ("-h", "-help", "--help") else 2
    if not is_there():
        print("screenshots: chromium or chromedriver is missing; run bin/setup -tests", file=sys.stderr)
        return 1
    DOCS.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="termite-screenshots-", dir="/var/tmp"))
    work.chmod(0o755)
    try:
        take(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for path in sorted(DOCS.glob("*.png")):
        size = path.stat().st_size
        print(f"{path.relative_to(CHECKOUT)}: {size} bytes{'' if size < MAX_BYTES else ', which is too much'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
