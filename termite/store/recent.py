"""A content store with what has just come kept in memory, in front of the store on disk.

Most files that commands make are read again soon, if ever, and on this machine: moving one from a task's tmpfs
to another directory of the same tmpfs costs a hundredth of writing it to a disk.  Small contents that come from
the master are not even files: whoever waits for them need not wait for that.  What came first goes to disk when
there is too much (`is_full`, `spill`), when there is time, and in the end (`close`).  What is only here, others
do not see; they ask the master.  Any thread.
"""

from __future__ import annotations

import contextlib
import hashlib
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

SMALL_BYTES, MOST_SMALL_BYTES = 128 << 10, 16 << 20
"""Contents up to this size need not even be a file, as long as there is not more of them than that in all."""


class RecentStore(ContentStore):
    """As a ContentStore; `use_memory` names the directory on a tmpfs, before which there is only the disk."""

    def __init__(self, directory: bytes | str, max_bytes: int) -> None:
        super().__init__(directory, max_bytes)
        self._memory = b""
        self._most_bytes = 0
        self._recent: dict[bytes, int] = {}  # hash -> size, in the order they came
        self._bytes = 0
        self._small: dict[bytes, bytes] = {}  # hash -> contents
        self._small_bytes = 0
        self._lock = threading.Lock()  # for the four above

    def use_memory(self, directory: bytes) -> None:
        """A directory that does not exist yet, on a file system in memory, that is ours alone."""
        os.mkdir(directory, 0o700)
        room = os.statvfs(directory)
        self._most_bytes = min(MOST_BYTES, room.f_blocks * room.f_frsize // SHARE_OF_MEMORY_FS)
        self._memory = directory

    def get(self, hash: bytes) -> bytes | None:
        """Small contents that came a moment ago."""
        return self._small.get(hash)

    def add(self, data: bytes) -> bytes:
        if not self._memory or len(data) > SMALL_BYTES or self._small_bytes + len(data) > MOST_SMALL_BYTES:
            return super().add(data)
        hash = hashlib.sha256(data).digest()
        with self._lock:
            if hash not in self._small and hash not in self._recent:
                self._small[hash] = data
                self._small_bytes += len(data)
        return hash

    def open(self, hash: bytes, size: int = -1) -> int:
        small = self._small.get(hash)
        if small is not None and size in (-1, len(small)):
            return _memory_file(small)
        known = self._recent.get(hash, -1)
        if known >= 0 and size in (-1, known):
            with contextlib.suppress(FileNotFoundError):  # it has just gone to disk
                return os.open(self._place(hash), os.O_RDONLY | os.O_CLOEXEC)
        return super().open(hash, size)

    def place_of(self, hash: bytes, size: int) -> bytes:
        """The file in memory that holds these contents until they go to disk; b"": there is none."""
        return self._place(hash) if self._recent.get(hash, -1) == size else b""

    def has(self, hash: bytes) -> bool:
        return hash in self._small or hash in self._recent or super().has(hash)

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
    def holds(self) -> int:
        """Bytes that are in memory only."""
        return self._bytes + self._small_bytes

    @property
    def is_full(self) -> bool:
        return self._bytes > self._most_bytes

    def spill(self, least_bytes: int = -1, limit_s: float = 60.0) -> None:
        """Moves the oldest to disk until at most so many bytes are left (default: half of the bound)."""
        least_bytes = int(self._most_bytes * LEFT_AFTER_SPILL) if least_bytes < 0 else least_bytes
        until = time.monotonic() + limit_s
        if least_bytes == 0:
            self._spill_small(until)
        for hash in list(self._recent):
            if self._bytes <= least_bytes or time.monotonic() > until:
                break
            super().adopt(self._place(hash), hash, self._recent[hash])
            with self._lock:
                self._bytes -= self._recent.pop(hash)

    def _spill_small(self, until: float) -> None:
        for hash, data in list(self._small.items()):
            if time.monotonic() > until:
                break
            if not super().has(hash):
                with self.writer(hash, len(data)) as writer:
                    writer.write(data)
                    writer.commit()
            with self._lock:
                del self._small[hash]
                self._small_bytes -= len(data)

    def close(self, limit_s: float = 5.0) -> None:
        """Moves to disk what can be moved in this time; the rest the master has."""
        self.spill(0, limit_s)

    def _place(self, hash: bytes) -> bytes:
        return b"%s/%s" % (self._memory, hash.hex().encode())


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("contents", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd
