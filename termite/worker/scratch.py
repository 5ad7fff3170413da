"""Where running tasks keep what they write: in memory while there is plenty, on disk otherwise.

An overlay on tmpfs costs a third of one on a disk.  But memory is small: a task that failed while it
ran short is to be run again on disk (`was_tight`), because at home it would not have failed.  Loop only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time

from termite.errors import BoxError

MEMORY_SHARE = 4
"""A mirror's tasks get one part in this many of the machine's memory."""

TIGHT_SHARE = 8
"""Less than one part in this many of that free is tight."""

LEAST_AVAILABLE = 512 << 20
"""With less memory to spare on the whole machine, new tasks go to disk."""

SAMPLE_EVERY_S = 0.1
LOOK_EVERY_S = 2.0
_MS_NOSUID, _MS_NODEV = 2, 4

_LEFT_BY_OVERLAY = (b"w/work/incompat/volatile", b"w/work/incompat", b"w/work/work", b"w/work", b"w", b"u")


class Scratch:
    """`sample` is to be called every `SAMPLE_EVERY_S` while tasks run."""

    def __init__(self, directory: bytes) -> None:
        self._memory = os.path.join(directory, b"memory")
        self._disk = os.path.join(directory, b"disk")
        self._serial = 0
        self._tight_at = 0.0  # monotonic seconds of the last sample that found memory tight; 0: never
        self._is_tight = False
        self._is_short = False  # is the whole machine short of memory?
        self._look_at = 0.0  # when to look again: the kernel takes a millisecond to answer
        os.mkdir(self._memory, 0o755)
        os.mkdir(self._disk, 0o755)
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_SHARE
        libc = ctypes.CDLL(None, use_errno=True)
        options = b"size=%d,mode=755" % size
        if libc.mount(b"termite-scratch", self._memory, b"tmpfs", _MS_NOSUID | _MS_NODEV, options):
            code = ctypes.get_errno()
            raise BoxError(f"cannot mount a tmpfs for running tasks: {os.strerror(code)}; run the worker as root")
        self.sample()

    def place(self, on_disk: bool = False) -> tuple[bytes, bool]:
        """(a directory that does not exist yet, True if it lies on disk)."""
        self._serial += 1
        on_disk = on_disk or self._is_tight
        return os.path.join(self._disk if on_disk else self._memory, b"%d" % self._serial), on_disk

    def sample(self) -> None:
        """Looks how much memory is left."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._is_short = _available() < LEAST_AVAILABLE
        st = os.statvfs(self._memory)
        self._is_tight = st.f_bavail * TIGHT_SHARE < st.f_blocks or self._is_short
        if self._is_tight:
            self._tight_at = now

    def was_tight(self, since: float) -> bool:
        """True if memory was tight after this moment (monotonic seconds)."""
        self.sample()
        return self._tight_at >= since


def _available() -> int:
    """Bytes of memory that this machine can spare."""
    with open("/proc/meminfo", "rb") as info:
        for line in info:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) << 10
    return LEAST_AVAILABLE


def remove(directory: bytes) -> None:
    """Removes a task's directory: what the kernel's overlay left by name, the rest by search."""
    fd = -1
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in _LEFT_BY_OVERLAY:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=fd)
        os.rmdir(directory)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        if fd >= 0:
            os.close(fd)
