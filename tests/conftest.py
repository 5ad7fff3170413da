"""What this machine lets the tests try, and that nothing is left when they have run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_report_header() -> list[str]:
    tools = ["make", "gcc", "g++", "cmake", "ninja", "autoreconf", "dpkg-source", "chromium", "chromedriver"]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return [
        f"termite: uid {os.getuid()}, kernel {os.uname().release}, {os.cpu_count()} cores, "
        f"/dev/fuse {'there' if os.path.exists('/dev/fuse') else 'missing'}, "
        f"tools missing: {', '.join(missing) or 'none'}"
    ]


MARK = f"TERMITE_TEST_RUN={os.getpid()}"
"""In the environment of everything that this run starts."""


def _left() -> list[str]:
    """Processes and mounts of this run, and the directories of its farms."""
    own = f"termite-test-{os.getpid()}-"
    found = [line.strip() for line in Path("/proc/mounts").read_text().splitlines() if own in line]
    for directory in ("/tmp", "/var/tmp", "/srv"):
        found += [str(path) for path in Path(directory).glob(f"{own}*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if int(process.name) != os.getpid() and MARK.encode() in environment:
            found.append(f"process {process.name}: {command[:200]!r}")
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    name, _, value = MARK.partition("=")
    os.environ[name] = value
    yield
    left = _left()
    assert not left, left
