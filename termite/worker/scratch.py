"""Where running tasks keep what they write: in memory while there is plenty, on disk otherwise.

An overlay on tmpfs costs a third of one on a disk.  But memory is small: a task that failed while it
ran short is to be run again on disk (`was_tight`), because at home it would not have failed.  Loop only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections import deque

from termite.errors import BoxError

MEMORY_SHARE = 4
"""A mirror's tasks get one part in this many of the machine's memory."""

TIGHT_SHARE = 8
"""Less than one part in this many of that free is tight."""

LEAST_AVAILABLE = 512 << 20
"""With less memory to spare on the whole machine, new tasks go to disk."""

RESULTS = b"memory/results"
"""In the mirror's directory; files are named after their hash, see store/recent.py."""

SAMPLE_EVERY_S = 0.1
LOOK_EVERY_S = 2.0
_MS_NOSUID, _MS_NODEV = 2, 4


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
        self.results = os.path.join(directory, RESULTS)  # where the content store may keep some
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


def open_result(pid: int, directory: str, hash: bytes) -> int:
    """A descriptor of contents in the memory of another process, whose mounts we do not see; OSError if not there."""
    path = os.path.join(f"/proc/{pid}/root{directory}", RESULTS.decode(), hash.hex())
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


class Sweeper:
    """Removes the directories of ended tasks, in a process of its own: `mkbox --sweep`."""

    def __init__(self, mkbox: bytes) -> None:
        self._waiting: deque[bytes] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._socket.setblocking(False)
            theirs.set_inheritable(True)
            argv = [b"termite-mkbox", b"--sweep", b"%d" % theirs.fileno()]
            try:
                self._pid = os.posix_spawn(mkbox, argv, {}, setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
            except OSError as e:
                raise BoxError(f"cannot start {os.fsdecode(mkbox)}: {e.strerror}") from e

    def remove(self, directory: bytes) -> None:
        """Soon; what cannot be removed goes with the mirror's whole directory."""
        self._waiting.append(directory)
        with contextlib.suppress(OSError):  # BlockingIOError, most likely: with the next one
            while self._waiting:
                self._socket.send(self._waiting[0])
                self._waiting.popleft()

    def close(self, limit_s: float = 10.0) -> None:
        """Ends the process when it has done all; blocks; safe to repeat."""
        with contextlib.suppress(OSError):
            self._socket.settimeout(limit_s)
            while self._waiting:
                self._socket.send(self._waiting.popleft())
        self._socket.close()
        until = time.monotonic() + limit_s
        while self._pid and os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.005)
        self._pid = 0
