"""A fake master's files in a real mount."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from termite.attr.cache import Stale
from termite.mirror.fuse import Mount
from tests.mirror.told import FakeMaster


def mounts_below(directory: Path) -> list[str]:
    return [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if str(directory) in line]


def fuse_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fuse-")]


def error_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


class Mounted:
    """A fake master's files, mounted; paths are relative to the mount."""

    def __init__(self, master: FakeMaster, root: bytes) -> None:
        self.master = master
        self.root = root
        self.mount = Mount(master.view, root)

    def path(self, path: bytes) -> bytes:
        return os.path.join(self.root, path)

    def read(self, path: bytes) -> bytes:
        with open(self.path(path), "rb", buffering=0) as file:
            return file.read()

    def exists(self, path: bytes) -> bool:
        return os.path.lexists(self.path(path))

    def stat(self, path: bytes) -> os.stat_result:
        return os.lstat(self.path(path))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self.path(path))

    def calls(self) -> dict[str, int]:
        return self.master.view.counters.as_dict()

    def tell(self, *paths: bytes) -> list[Stale]:
        """News of the master reaches view and kernel."""
        stale = self.master.tell(*paths)
        self.mount.forget(stale)
        return stale

    def quiet(self, look: Callable[[], object]) -> bool:
        """True if this reaches the kernel only."""
        before = self.calls()
        look()
        return self.calls() == before


@contextlib.contextmanager
def mounted(master: FakeMaster, tmp_path: Path) -> Iterator[Mounted]:
    root = tmp_path / "mnt"
    root.mkdir()
    mirror = Mounted(master, os.fsencode(root))
    mirror.mount.start()
    try:
        yield mirror
    finally:
        mirror.mount.stop()
        assert mounts_below(tmp_path) == []
        assert fuse_threads() == []
        master.view.cache.check()
