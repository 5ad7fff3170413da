"""Where running tasks keep what they write: in memory while there is plenty, on disk otherwise.

An overlay on tmpfs costs a third of one on a disk.  But memory is small: a task that failed while it
ran short is to be run again on disk (`was_tight`), because at home it would not have failed.  Loop only.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial

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

CLEAN_AT_ONCE = 32
"""So many directories of ended tasks are removed together, ..."""

CLEAN_AFTER_S = 0.2
"""... or those that there are after this time."""

CLEAN_LIMIT_S = 300.0


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


class Cleaner:
    """Removes task directories, many at a time, by `rm`: walking them in the interpreter costs more than the task.

    `remove` is for the loop; `flush` blocks and is for the thread that `run` puts it on.
    """

    def __init__(self, run: Callable[[Callable[[], None]], object]) -> None:
        self._run = run
        self._directories: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def remove(self, directory: bytes) -> None:
        """Soon, or at once if many wait."""
        self._directories.append(directory)
        if len(self._directories) >= CLEAN_AT_ONCE:
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CLEAN_AFTER_S, self._start)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        directories, self._directories = self._directories, []
        if directories:
            self._run(partial(remove_all, directories))

    def close(self) -> None:
        """Puts what still waits on its way."""
        self._start()


def remove_all(directories: list[bytes]) -> None:
    """Removes them with everything in them; blocks."""
    try:
        subprocess.run(
            [b"rm", b"-rf", b"--", *directories], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=CLEAN_LIMIT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
