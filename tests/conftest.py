"""What this machine lets the tests try, and that nothing is left when they have run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_report_header() -> list[str]:
    tools = ["make", "gcc", "g++", "cmake", "ninja", "autoreconf", "dpkg-source"]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return [
        f"termite: uid {os.getuid()}, kernel {os.uname().release}, {os.cpu_count()} cores, "
        f"/dev/fuse {'there' if os.path.exists('/dev/fuse') else 'missing'}, "
        f"tools missing: {', '.join(missing) or 'none'}"
    ]


def _traces() -> set[str]:
    """Our programs that run, mounts, and directories in the usual temporary places."""
    found = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if "termite" in line}
    for directory in ("/tmp", "/var/tmp", "/srv"):
        found |= {str(path) for path in Path(directory).glob("termite-*")}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"/termite-" in word or word.startswith((b"termite-", b"termite.worker")) for word in words[:3]):
            found.add(f"process {process.name}: {b' '.join(words)[:200]!r}")
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _traces()
    yield
    left = _traces() - before
    assert not left, sorted(left)
