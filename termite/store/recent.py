"""A content store with what commands have just made kept in memory, in front of the store on disk.

Most files of a build are read again soon, if ever, and on this machine: moving one from a task's tmpfs to
another directory of the same tmpfs costs a hundredth of writing it to a disk.  What was made first goes to
disk when there is too much (`is_full`, `spill`) and in the end (`close`).  What is only here, others do not
see; they ask the master.  Any thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

from termite.store.local import ContentStore

SHARE_OF_MEMORY_FS = 4
"""The contents kept here take at most one part in this many of the file system they are on."""

MOST_BYTES = 512 << 20

LARGE_SHARE = 8
"""Contents larger than one part in this many of the bound go to disk at once."""

LEFT_AFTER_SPILL = 0.5


class RecentStore(ContentStore):
    """As a ContentStore; `use_memory` names the directory on a tmpfs, before which there is only the disk."""

    def __init__(self, directory: bytes | str, max_bytes: int) -> None:
        super().__init__(directory, max_bytes)
        self._memory = b""
        self._most_bytes = 0
        self._recent: dict[bytes, int] = {}  # hash -> size, in the order they came
        self._bytes = 0
        self._lock = threading.Lock()  # for the two above

    def use_memory(self, directory: bytes) -> None:
        """A directory that does not exist yet, on a file system in memory, that is ours alone."""
        os.mkdir(directory, 0o700)
        room = os.statvfs(directory)
        self._most_bytes = min(MOST_BYTES, room.f_blocks * room.f_frsize // SHARE_OF_MEMORY_FS)
        self._memory = directory

    def open(self, hash: bytes, size: int = -1) -> int:
        known = self._recent.get(hash, -1)
        if known >= 0 and size in (-1, known):
            with contextlib.suppress(FileNotFoundError):  # it has just gone to disk
                return os.open(self._place(hash), os.O_RDONLY | os.O_CLOEXEC)
        return super().open(hash, size)

    def has(self, hash: bytes) -> bool:
        return hash in self._recent or super().has(hash)

    def adopt(self, name: bytes, hash: bytes, size: int, *, dir_fd: int | None = None, recent: bool = False) -> None:
        if size * LARGE_SHARE > self._most_bytes:
            super().adopt(name, hash, size, dir_fd=dir_fd, recent=recent)
            return
        try:
            os.rename(name, self._place(hash), src_dir_fd=dir_fd)
        except OSError:  # a task on disk
            super().adopt(name, hash, size, dir_fd=dir_fd, recent=recent)
            return
        with self._lock:
            self._bytes += size - self._recent.pop(hash, 0)
            self._recent[hash] = size

    @property
    def is_full(self) -> bool:
        return self._bytes > self._most_bytes

    def spill(self, least_bytes: int = -1, limit_s: float = 60.0) -> None:
        """Moves the oldest to disk until at most so many bytes are left (default: half of the bound)."""
        least_bytes = int(self._most_bytes * LEFT_AFTER_SPILL) if least_bytes < 0 else least_bytes
        until = time.monotonic() + limit_s
        for hash in list(self._recent):
            if self._bytes <= least_bytes or time.monotonic() > until:
                break
            super().adopt(self._place(hash), hash, self._recent[hash])
            with self._lock:
                self._bytes -= self._recent.pop(hash)

    def close(self, limit_s: float = 5.0) -> None:
        """Moves to disk what can be moved in this time; the rest the master has."""
        self.spill(0, limit_s)

    def _place(self, hash: bytes) -> bytes:
        return b"%s/%s" % (self._memory, hash.hex().encode())
